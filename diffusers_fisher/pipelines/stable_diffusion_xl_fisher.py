"""Stable Diffusion XL with likelihood and guidance."""

from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from ..autoencoder import decoded, latent_moments
from ..errors import InputError
from .conditions import encoded_conditions
from .mixin import FisherPipelineMixin


class StableDiffusionXLFisherPipeline(FisherPipelineMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    The sizes that the network is told (`original_size`, `target_size`) are those of the image unless given.
    """

    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The pooled embeddings that the network itself is given."""
        return encoded_conditions(self, conditions)[2]

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return decoded(self._checked_vae(), latents, standardised=True)

    def _posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self._checked_vae()
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
        latents = posterior.mode().float()
        mean, deviation = latent_moments(vae, latents)
        factor = vae.config.scaling_factor / deviation
        return (latents - mean) * factor, posterior.std.float() * factor

    def _finished(self, images: Any) -> tuple[Any, list[bool]]:
        if self.watermark is None:
            return images, []
        return (self.watermark.apply_watermark(2 * images - 1) / 2 + 0.5).clamp(0, 1), []

    def _checked_vae(self) -> Any:
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            raise InputError(
                "The autoencoder of Stable Diffusion XL overflows in float16, and its weights are not cast behind "
                "your back. Call pipe.vae.to(torch.float32), or load the pipeline in bfloat16."
            )
        return self.vae


StableDiffusionXLFisherPipeline.__module__ = "diffusers_fisher"
