"""PixArt-Sigma with likelihood and guidance."""

from diffusers import PixArtSigmaPipeline

from .mixin import FisherPipelineMixin
from .pixart_space import PixArtSpace


class PixArtSigmaFisherPipeline(PixArtSpace, FisherPipelineMixin, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """


PixArtSigmaFisherPipeline.__module__ = "diffusers_fisher"
