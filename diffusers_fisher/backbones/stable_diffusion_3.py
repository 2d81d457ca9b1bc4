"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from .base import Backbone


class StableDiffusion3Backbone(Backbone):
    """Knows Stable Diffusion 3 and 3.5: flow matching, on latents that the transformer cuts into patches."""

    predicts_flow = True
    pooled_index = 2
    pixel_multiple = 1
