"""What PixArt's two pipelines share."""

from __future__ import annotations

import math
from typing import Any

import torch

from .conditions import encoded_conditions
from .space import LatentSpace


class PixArtSpace(LatentSpace):
    """Latents of PixArt; the network cuts them into patches."""

    def _size_multiple(self) -> int:
        return math.lcm(8, self.vae_scale_factor * self.transformer.config.patch_size)

    def _size_arguments(self, pixels: tuple[int, int]) -> dict[str, int]:
        """With the size as it is: binning would draw the stock call's own."""
        return {"height": pixels[0], "width": pixels[1], "use_resolution_binning": False}

    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The mean of the text encoder's embeddings over the prompt's own tokens: the network is given no other."""
        embeddings, mask, *_ = encoded_conditions(self, conditions)
        weights = mask.to(embeddings).unsqueeze(-1)
        return (weights * embeddings).sum(1) / weights.sum(1)
