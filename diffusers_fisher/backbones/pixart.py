"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

import math
from typing import Any

import torch

from .base import Backbone


class PixArtBackbone(Backbone):
    """Knows PixArt: the transformer cuts latents into patches; sizes are taken as they are, without binning."""

    @property
    def size_multiple(self) -> int:
        return math.lcm(8, self.factor * self.config["patch_size"])

    def size_arguments(self, pixels: tuple[int, int]) -> dict[str, Any]:
        """Returns the call's arguments for the size as it is: with binning the call would draw noise of its own."""
        return {**super().size_arguments(pixels), "use_resolution_binning": False}

    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """Returns the mean of the text encoder's embeddings over the prompt's tokens, (B, width).

        The network itself takes no other tokens, and no pooled embeddings.
        """
        embeddings, mask, *_ = self.encoded_conditions(conditions)
        weights = mask.to(embeddings).unsqueeze(-1)
        return (weights * embeddings).sum(1) / weights.sum(1)
