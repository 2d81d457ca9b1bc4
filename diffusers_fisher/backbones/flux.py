"""Flux."""

from __future__ import annotations

from typing import Any

from .packed import PackedBackbone


class FluxBackbone(PackedBackbone):
    """Knows Flux: flow matching, on latents packed to (B, h/2 * w/2, 4 * C).

    The guidance scale of Flux-dev is an input of the network, so a likelihood is that of one scale: the stock call's
    default unless `guidance_scale` is passed.
    """

    pooled_index = 1

    def unguided_scale(self, call_arguments: dict[str, Any]) -> float | None:
        scale = call_arguments.pop("guidance_scale", None)  # Flux-schnell takes any, and has no use for it.
        super().unguided_scale(call_arguments)
        return scale
