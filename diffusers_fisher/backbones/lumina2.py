"""Lumina 2."""

from __future__ import annotations

from .base import Backbone


class Lumina2Backbone(Backbone):
    """Knows Lumina 2: flow matching, on latents that the transformer cuts into patches."""

    predicts_flow = True
    token_indices = (0, 1)
