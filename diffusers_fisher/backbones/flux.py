"""Flux."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .base import Backbone


class FluxBackbone(Backbone):
    """Knows Flux: flow matching, on latents packed to (B, h/2 * w/2, 4 * C).

    The guidance scale of Flux-dev is an input of the network, so a likelihood is that of one scale: the stock call's
    default unless `guidance_scale` is passed.
    """

    predicts_flow = True
    pooled_index = 1

    @property
    def size_multiple(self) -> int:
        return 2 * self.factor

    @property
    def sample_size(self) -> int:
        return self.pipe.default_sample_size

    @property
    def latent_channels(self) -> int:
        return self.config["in_channels"] // 4

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self.pipe._pack_latents(latents, *latents.shape)

    def unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        if pixels is None:
            raise InputError("Packed latents don't tell the image's shape; give `pixels`, its height and width.")
        return self.pipe._unpack_latents(latents, *pixels, self.factor)

    def unguided_scale(self, call_arguments: dict[str, Any]) -> float | None:
        scale = call_arguments.pop("guidance_scale", None)  # Flux-schnell takes any, and has no use for it.
        super().unguided_scale(call_arguments)
        return scale
