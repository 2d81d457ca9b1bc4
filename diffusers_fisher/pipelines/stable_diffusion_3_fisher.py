"""Stable Diffusion 3 and 3.5 with likelihood and guidance."""

from diffusers import StableDiffusion3Pipeline

from .mixin import FisherPipelineMixin


class StableDiffusion3FisherPipeline(FisherPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Flow matching: the likelihood's grid ends at 0.999 of the noise, where the standard prior holds.
    """

    _predicts_flow = True

    def _size_multiple(self) -> int:
        return self.vae_scale_factor * self.transformer.config.patch_size


StableDiffusion3FisherPipeline.__module__ = "diffusers_fisher"
