"""HunyuanDiT."""

from __future__ import annotations

import torch

from .base import Backbone
from .safety import check_images


class HunyuanDiTBackbone(Backbone):
    """Knows HunyuanDiT: the transformer cuts latents into patches; sizes are taken as they are, without binning.

    The size conditions of the network are the call's defaults unless others are passed.
    """

    token_indices = (0, 2)
    pixel_multiple = 16

    def finish(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        return check_images(self.pipe, images)
