"""Pipelines whose calls take latents packed to tokens."""

from __future__ import annotations

import torch

from ..errors import InputError
from .base import Backbone


class PackedBackbone(Backbone):
    """Pipelines of flow matching on latents whose patches of 2x2 are packed to tokens, (B, h/2 * w/2, 4 * C)."""

    predicts_flow = True
    patch_size = 2
    pixel_multiple = 1

    @property
    def sample_size(self) -> int:
        return self.pipe.default_sample_size

    @property
    def latent_channels(self) -> int:
        return self.config["in_channels"] // 4

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipe._pack_latents(latents, *latents.shape)

    def unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        return self.pipe._unpack_latents(latents, *known_pixels(pixels), self.factor)


def known_pixels(pixels: tuple[int, int] | None) -> tuple[int, int]:
    """Returns height and width in pixels. Raises `InputError` for None."""
    if pixels is None:
        raise InputError("Packed latents don't tell the image's shape; give `pixels`, its height and width.")
    return pixels
