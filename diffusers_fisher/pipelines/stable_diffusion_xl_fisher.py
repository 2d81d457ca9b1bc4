"""Stable Diffusion XL with likelihood and guidance."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from ..errors import InputError
from .mixin import FisherPipelineMixin


class StableDiffusionXLFisherPipeline(FisherPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    The sizes that the network is told (`original_size`, `target_size`) are those of the image unless given.
    """

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        mean, deviation = self._latent_moments(latents)
        vae = self._checked_vae()
        return vae.decode((latents * deviation / vae.config.scaling_factor + mean).to(vae.dtype)).sample

    def _encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        vae = self._checked_vae()
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float()
        mean, deviation = self._latent_moments(latents)
        return (latents - mean) * vae.config.scaling_factor / deviation

    def _finished(self, images: Any) -> tuple[Any, list[bool]]:
        if self.watermark is None:
            return images, []
        return (self.watermark.apply_watermark(2 * images - 1) / 2 + 0.5).clamp(0, 1), []

    def _latent_moments(self, like: torch.Tensor) -> tuple[Any, Any]:
        """Mean and standard deviation a channel by which some autoencoders' latents are standardised."""
        config = self.vae.config
        if config.get("latents_mean") is None or config.get("latents_std") is None:
            return 0.0, 1.0
        mean, deviation = (
            torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return mean.to(like), deviation.to(like)

    def _checked_vae(self) -> Any:
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            raise InputError(
                "The autoencoder of Stable Diffusion XL overflows in float16, and its weights are not cast behind "
                "your back. Call pipe.vae.to(torch.float32), or load the pipeline in bfloat16."
            )
        return self.vae


StableDiffusionXLFisherPipeline.__module__ = "diffusers_fisher"
