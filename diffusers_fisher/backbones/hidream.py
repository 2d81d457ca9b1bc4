"""HiDream."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InputError
from .base import Backbone


class HiDreamBackbone(Backbone):
    """Knows HiDream: flow matching, on latents that the transformer cuts into patches.

    The call scales every size to one area, so that only sizes of that area are taken.
    """

    predicts_flow = True
    pooled_index = 4
    pixel_multiple = 1

    @property
    def sample_size(self) -> int:
        return self.pipe.default_sample_size

    def size_arguments(self, pixels: tuple[int, int]) -> dict[str, Any]:
        side, multiple = self.sample_size * self.factor, self.size_multiple
        scale = math.sqrt(side**2 / math.prod(pixels))
        taken = tuple(int(length * scale // multiple * multiple) for length in pixels)
        if taken != pixels:
            raise InputError(
                f"Height and width are {pixels}, which the call of {self.name} scales to {taken}, of the area of "
                f"{side} x {side}. Use images of a size that it leaves as it is, such as {taken}."
            )
        return super().size_arguments(pixels)
