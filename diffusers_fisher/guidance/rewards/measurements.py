"""Rewards computed from pixels: brightness of regions, inpainting, deblurring and other linear problems."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy
import torch
import torch.nn.functional as F

from ...arguments import check_kinds
from ...errors import InputError
from ...images import UNIT_RANGE, ImageLike, image_tensor
from ..checks import name_of

if TYPE_CHECKING:
    from PIL.Image import Image

ROUNDING = 1e-3  # by which measurements may be outside of [0, 1]


class LinearReward:
    """Rewards the mean over channels of <weights, image>, such as the brightness of a region.

    Args:
        weights: (H, W), or (3, H, W); positive where the image should become brighter, negative where darker.
    """

    @check_kinds
    def __init__(self, weights: torch.Tensor):
        self.weights = weights

    def __repr__(self) -> str:
        return f"{type(self).__name__}(weights of shape {tuple(self.weights.shape)})"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if self.weights.shape[-2:] != images.shape[-2:]:
            raise InputError(
                f"The weights have {tuple(self.weights.shape[-2:])} pixels, the images {tuple(images.shape[-2:])}. "
                "Pass weights of the images' size."
            )
        return (images * self.weights.to(images)).mean(1).flatten(1).sum(1)

    @classmethod
    @check_kinds
    def left_minus_right(cls, height: int, width: int) -> LinearReward:
        """Makes a reward: mean brightness of the left half minus mean brightness of the right half.

        The middle column of an odd width counts for neither half.
        """
        if height < 1 or width < 2:
            raise InputError(f"The images have {height}x{width} pixels; allowed: at least 1x2, which has two halves.")
        side = torch.sign((width - 1) / 2 - torch.arange(width))
        return cls(side.expand(height, width) / (height * (width // 2)))


class MeasurementReward:
    """Rewards minus the mean squared distance between a measurement of the image and a target.

    With a `mask` and no operator, the problem is inpainting from the known pixels. With `gaussian_blur(std)` as
    operator, the problem is deblurring. Any differentiable operator can be used, such as downsampling or a projection.

    Args:
        target: the measurement of the wanted image, or one per image: PIL images, arrays (H, W, 3) or (B, H, W, 3), or
            tensors (3, H, W) or (B, 3, H, W), in `data_range`.
        mask: (H, W) weights in [0, 1] of the measured pixels, not all zero; None: all pixels count.
        operator: function from images (B, 3, H, W) to measurements of the target's size, in [0, 1]; None: the images
            themselves.
        data_range: values of black and white in arrays and tensors, which are scaled to [0, 1].

    Raises:
        InputError: the target is of another kind or has values outside of `data_range`, or the mask is not as above.
    """

    @check_kinds
    def __init__(
        self,
        target: ImageLike,
        mask: torch.Tensor | numpy.ndarray | Image | None = None,
        operator: Callable[[torch.Tensor], torch.Tensor] | None = None,
        data_range: tuple[float, float] = UNIT_RANGE,
    ):
        channels = target.shape[-3] if isinstance(target, torch.Tensor) and target.ndim > 2 else 3
        tolerance = 0.0 if operator is None else ROUNDING
        try:
            batch = image_tensor(target, 1, channels, data_range, tolerance)
        except InputError as error:
            raise InputError(f"The target of the reward: {error}") from error
        self.target = batch
        if isinstance(target, torch.Tensor) and data_range == UNIT_RANGE:
            self.target = target.reshape(batch.shape)  # in the target's own precision
        self.mask = torch.ones(batch.shape[-2:]) if mask is None else _weights(mask)
        if self.mask.is_complex() or not bool((self.mask >= 0).all()) or not 0 < float(self.mask.sum()) < math.inf:
            raise InputError("The mask must be non-negative and not all zero. Pass 1 for the known pixels.")
        self.operator = operator

    def __repr__(self) -> str:
        known = f"{float(self.mask.mean()):.0%} known"
        operator = "" if self.operator is None else f", operator={name_of(self.operator)}"
        return f"{type(self).__name__}(target of shape {tuple(self.target.shape)}, {known}{operator})"

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        result = images if self.operator is None else self.operator(images)
        count_fits = len(self.target) in (1, len(result))
        if self.target.shape[-3:] != result.shape[-3:] or self.mask.shape != result.shape[-2:] or not count_fits:
            noun = "images" if self.operator is None else "measurements"
            raise InputError(
                f"Target {tuple(self.target.shape)} and mask {tuple(self.mask.shape)} do not fit {noun} of shape "
                f"{tuple(result.shape)}; allowed: one target, or one per image, and one mask, of the {noun}' size."
            )
        weights = self.mask.to(result) / (self.mask.sum() * result.shape[1])
        return -((result - self.target.to(result)) ** 2 * weights).flatten(1).sum(1)


def _weights(mask: torch.Tensor | numpy.ndarray | Image) -> torch.Tensor:
    if isinstance(mask, torch.Tensor):
        return mask
    values = numpy.array(mask)
    if values.dtype.kind not in "biuf":
        raise InputError(
            f"The mask is a {type(mask).__name__}; allowed: a tensor, an array or a grey PIL image (H, W)."
        )
    return torch.from_numpy(values)


@check_kinds
def gaussian_blur(std: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function that blurs images (B, C, H, W) with a Gaussian of `std` pixels.

    The kernel ends at three standard deviations. Pixels outside of the image equal the nearest edge pixel.
    """
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
