"""Models whose samples are the images themselves."""

from __future__ import annotations

import torch

from .base import Backbone


class PixelBackbone(Backbone):
    """Samples are the images themselves, (B, C, H, W) in [-1, 1]."""

    space = "pixel"
    scales_samples = False
    network_name = "unet"

    @property
    def factor(self) -> int:
        return 1

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which sizes must be multiples: the network halves its input between its blocks."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def image_channels(self) -> int:
        return self.config["in_channels"]

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return pixels, None

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def check_decoder(self) -> None:
        """Checks nothing: samples are images."""
