"""Qwen-Image."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .autoencoder import latent_moments
from .packed import PackedBackbone
from .unguided import embeds_guidance


class QwenImageBackbone(PackedBackbone):
    """Knows Qwen-Image: the layout of Flux, with an autoencoder of videos, whose images have one frame.

    It guides by `true_cfg_scale`. A `guidance_scale` is an input of distilled networks, and must be passed to them.
    """

    token_indices = (0, 1)

    def unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        return super().unpack(latents, pixels).squeeze(2)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self._known_autoencoder
        posterior = vae.encode(pixels.to(vae.dtype).unsqueeze(2)).latent_dist
        mean, deviation = posterior.mode().squeeze(2).float(), posterior.std.squeeze(2).float()
        shift, scale = latent_moments(vae, mean, standardises=True)
        return (mean - shift) / scale, deviation / scale

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._known_autoencoder
        latents = latents.to(vae.dtype)
        shift, scale = latent_moments(vae, latents, standardises=True)
        return vae.decode((latents / (1 / scale) + shift).unsqueeze(2)).sample.squeeze(2)  # rounded as the stock call

    def unguided_scale(self, call_arguments: dict[str, Any]) -> float | None:
        scale = super().unguided_scale(call_arguments)
        if scale is None and embeds_guidance(self.config):
            raise InputError(
                f"The network of {self.name} takes the guidance scale as an input, and its call has no default. Pass "
                "`guidance_scale`."
            )
        return scale
