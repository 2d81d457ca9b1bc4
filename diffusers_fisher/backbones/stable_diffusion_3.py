"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

import torch

from .base import Backbone


class StableDiffusion3Backbone(Backbone):
    """Stable Diffusion 3 and 3.5: flow matching, on latents that the transformer cuts into patches."""

    predicts_flow = True

    @property
    def size_multiple(self) -> int:
        return self.factor * self.config["patch_size"]

    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The pooled embeddings that the network itself is given."""
        return self.encoded_conditions(conditions)[2]
