"""Stable Diffusion XL."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .autoencoder import pixels_of
from .base import Backbone


class StableDiffusionXLBackbone(Backbone):
    """Knows Stable Diffusion XL. The network's size conditions are those of the image unless others are passed."""

    network_name = "unet"
    pooled_index = 2
    standardises_latents = True

    def null_conditions(self, count: int) -> dict[str, Any]:
        conditions = super().null_conditions(count)
        if not self.pipe.config["force_zeros_for_empty_prompt"]:
            return conditions
        embeds, _, pooled, _ = self.encoded_conditions({"prompt": [""] * count})
        return {"prompt_embeds": torch.zeros_like(embeds), "pooled_prompt_embeds": torch.zeros_like(pooled)}

    def finish(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        if self.pipe.watermark is None:
            return images, []
        return (self.pipe.watermark.apply_watermark(pixels_of(images)) / 2 + 0.5).clamp(0, 1), []

    @property
    def _known_autoencoder(self) -> Any:
        vae = super()._known_autoencoder
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            raise InputError(
                "The autoencoder of Stable Diffusion XL overflows in float16, and its weights are not cast behind "
                "your back. Call pipe.vae.to(torch.float32), or load the pipeline in bfloat16."
            )
        return vae
