"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .autoencoder import decode_latents, encode_pixels
from .base import Backbone


class StableDiffusionXLBackbone(Backbone):
    """Stable Diffusion XL. The sizes that the network is told are those of the image unless others are passed."""

    network_name = "unet"

    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The pooled embeddings that the network itself is given."""
        return self.encoded_conditions(conditions)[2]

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return encode_pixels(self._known_autoencoder, pixels, standardised=True)

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return decode_latents(self._known_autoencoder, latents, standardised=True)

    def finish(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        if self.pipe.watermark is None:
            return images, []
        return (self.pipe.watermark.apply_watermark(2 * images - 1) / 2 + 0.5).clamp(0, 1), []

    @property
    def _known_autoencoder(self) -> Any:
        vae = super()._known_autoencoder
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            raise InputError(
                "The autoencoder of Stable Diffusion XL overflows in float16, and its weights are not cast behind "
                "your back. Call pipe.vae.to(torch.float32), or load the pipeline in bfloat16."
            )
        return vae
