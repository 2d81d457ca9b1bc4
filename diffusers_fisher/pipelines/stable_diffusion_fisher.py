"""Stable Diffusion 1.x and 2.x with likelihood and guidance."""

from diffusers import StableDiffusionPipeline

from .mixin import FisherPipelineMixin


class StableDiffusionFisherPipeline(FisherPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Made with `from_pretrained` from any Stable Diffusion 1.x or 2.x checkpoint, or from a pipeline at hand with
    `StableDiffusionFisherPipeline(**pipe.components)`.
    """


StableDiffusionFisherPipeline.__module__ = "diffusers_fisher"
