"""Rewards that measure the image itself: brightness of regions, inpainting, deblurring and other linear problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from ...errors import InputError


class LinearReward:
    """Mean over channels of <weights, image>: brightness of a region, difference of two regions.

    Args:
        weights: (H, W), or (3, H, W); positive where the image should become brighter.
    """

    def __init__(self, weights: torch.Tensor):
        self.weights = weights

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if self.weights.shape[-2:] != images.shape[-2:]:
            raise InputError(
                f"The weights are {tuple(self.weights.shape[-2:])} pixels, the images {tuple(images.shape[-2:])}; "
                "give weights of the images' size."
            )
        return (images * self.weights.to(images)).mean(1).flatten(1).sum(1)

    @classmethod
    def left_minus_right(cls, height: int, width: int) -> LinearReward:
        """Mean brightness of the left half minus that of the right half; a middle column counts for neither."""
        side = torch.sign((width - 1) / 2 - torch.arange(width))
        return cls(side.expand(height, width) / (height * (width // 2)))


class MeasurementReward:
    """Minus the mean squared distance of a linear measurement of the image to what was measured.

    With a `mask` alone it is inpainting of what is known; with `gaussian_blur(std)` as operator it is deblurring; any
    differentiable operator will do (downsampling, a projection).

    Args:
        target: (3, H, W), or (B, 3, H, W), in [0, 1]: what `operator` makes of the image looked for.
        mask: (H, W) weights in [0, 1] of the measured pixels, not all zero; None: all count.
        operator: images (B, 3, H, W) to what is measured, of the target's size; None: the images themselves.
    """

    def __init__(
        self,
        target: torch.Tensor,
        mask: torch.Tensor | None = None,
        operator: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        mask = torch.ones(target.shape[-2:]) if mask is None else mask
        if not bool((mask >= 0).all()) or float(mask.sum()) <= 0:
            raise InputError("The mask must be non-negative and not all zero; 1 marks pixels that are known.")
        self.target = target
        self.mask = mask
        self.operator = operator

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        seen = images if self.operator is None else self.operator(images)
        one_each = self.target.ndim == 3 or (self.target.ndim == 4 and len(self.target) in (1, len(seen)))
        if self.target.shape[-3:] != seen.shape[-3:] or self.mask.shape != seen.shape[-2:] or not one_each:
            what = "images" if self.operator is None else "measurements"
            raise InputError(
                f"Target {tuple(self.target.shape)} and mask {tuple(self.mask.shape)} do not fit {what} of "
                f"{tuple(seen.shape)}; allowed: one target, or one an image, and one mask, of the {what}' size."
            )
        weights = self.mask.to(seen) / (self.mask.sum() * seen.shape[1])
        return -((seen - self.target.to(seen)) ** 2 * weights).flatten(1).sum(1)


def gaussian_blur(std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images (B, C, H, W) blurred by a Gaussian of `std` pixels, cut off at three; edges are repeated outwards."""
    if not 0 < std < math.inf:
        raise InputError(f"`std` is {std}; allowed: a positive number of pixels.")
    radius = math.ceil(3 * std)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / std) ** 2)
    kernel /= kernel.sum()

    def blur(images: torch.Tensor) -> torch.Tensor:
        channels = images.shape[1]
        weights = kernel.to(images).expand(channels, 1, -1)
        padded = F.pad(images, (radius,) * 4, mode="replicate")
        rows = F.conv2d(padded, weights[:, :, None, :], groups=channels)
        return F.conv2d(rows, weights[:, :, :, None], groups=channels)

    return blur
