"""Images in bins: from a density to the probability of an 8-bit image."""

from __future__ import annotations

import math

import torch

from ..errors import InputError

MODEL_RANGE = (-1.0, 1.0)
"""Range of pixels in diffusers' pixel models."""


def offset_bits(bins: int | None, data_range: tuple[float, float] = MODEL_RANGE) -> float:
    """Returns the bits per dimension that turn a density over values in `data_range` to the probability of a bin.

    `bins` values lie equally spaced on the range, its ends included, so a bin is (high - low)/(bins - 1) wide: 256 on
    [-1, 1] add log2(127.5).
    """
    return 0.0 if bins is None else math.log2((bins - 1) / (data_range[1] - data_range[0]))


def dequantised(
    samples: torch.Tensor,
    bins: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    data_range: tuple[float, float] = MODEL_RANGE,
) -> torch.Tensor:
    """Moves samples (B, ...) on `bins` equally spaced values to uniformly random points of their bins, float64.

    The mean log density of these points is at most the log probability of the bins (Theis et al., 1511.01844).

    Raises:
        InputError: fewer than two bins, an empty range, samples outside the range or between its values.
    """
    from diffusers.utils.torch_utils import randn_tensor

    position, width = bin_positions(samples, bins, data_range)
    # A normal draw's distribution function is uniform; diffusers knows how to draw by generators on other devices.
    normal = randn_tensor(samples.shape, generator=generator, device=samples.device, dtype=torch.float64)
    return data_range[0] + width * (position + torch.special.ndtr(normal) - 0.5)


def bin_positions(
    samples: torch.Tensor, bins: int, data_range: tuple[float, float] = MODEL_RANGE
) -> tuple[torch.Tensor, float]:
    """Returns the samples' places among `bins` equally spaced values, (B, ...) float64 whole numbers from 0, and the
    values' distance.

    Raises:
        InputError: fewer than two bins, an empty range, samples outside the range or between its values.
    """
    low, high = data_range
    if bins < 2 or not low < high:
        raise InputError(f"`bins` is {bins} on {data_range}; allowed: at least 2, on a range that is not empty.")
    width = (high - low) / (bins - 1)
    position = (samples.double() - low) / width
    if not bool(((position >= -0.01) & (position <= bins - 0.99)).all()):
        raise InputError(
            f"Samples reach from {float(samples.min()):.4g} to {float(samples.max()):.4g}; the declared range is "
            f"{low} to {high}. Declare the range they are in, or scale them."
        )
    distance = float((position - position.round()).abs().max())
    if distance > 0.01:  # images in float32 are within 1e-5 of a bin
        raise InputError(
            f"Samples lie up to {distance:.2f} bins beside the {bins} values of {low} to {high}. Round the images to "
            "their levels first, or leave `bins` out for a density without them."
        )
    return position.round(), width
