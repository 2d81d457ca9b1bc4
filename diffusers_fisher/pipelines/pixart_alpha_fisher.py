"""PixArt-alpha with likelihood and guidance."""

from diffusers import PixArtAlphaPipeline

from .mixin import FisherPipelineMixin
from .pixart_space import PixArtSpace


class PixArtAlphaFisherPipeline(PixArtSpace, FisherPipelineMixin, PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """


PixArtAlphaFisherPipeline.__module__ = "diffusers_fisher"
