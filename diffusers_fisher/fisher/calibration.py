"""The error of a trace model on images that it was not trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy
import torch

from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class TraceCalibration:
    """Says how far a trace model was from its denoiser's own trace on held-out images.

    Args:
        error: half-width of a 95% interval of the error of the trace's integral, bits/dim.
        samples: number of the held-out images.
        log_noise: rising log(sigma/alpha) of the levels below.
        bias: mean over the images of r by the model minus the denoiser's own, at each level.
        deviation: standard deviation over the images of this difference, at each level.
        scatter: root mean square of the same difference by a single random direction, at each level.
    """

    error: float
    samples: int
    log_noise: Sequence[float]
    bias: Sequence[float]
    deviation: Sequence[float]
    scatter: Sequence[float]

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.log_noise, self.bias, self.deviation, self.scatter)}
        numbers = [self.error, *self.log_noise, *self.bias, *self.deviation, *self.scatter]
        if len(lengths) != 1 or lengths == {0} or not all(map(math.isfinite, numbers)) or self.error < 0:
            raise InputError(
                f"A trace model's calibration has error {self.error} and entries for {sorted(lengths)} levels; "
                "allowed: finite numbers, an error of 0 or more, and one entry per level."
            )

    def scatter_at(self, log_noise: torch.Tensor) -> torch.Tensor:
        """Returns `scatter` at other levels by linear interpolation, constant beyond the ends; float64."""
        return torch.from_numpy(numpy.interp(log_noise.numpy(), self.log_noise, self.scatter))

    def error_at(self, log_noise: torch.Tensor) -> torch.Tensor:
        """Returns the root mean square over images of the model's error in r, at other levels; float64.

        A level's `deviation` by few images is uncertain, so that its square is the mean over five levels.
        """
        squares = torch.tensor([self.bias, self.deviation], dtype=torch.float64).square().sum(0)
        mean = torch.nn.functional.avg_pool1d(squares[None], 5, stride=1, padding=2, count_include_pad=False)[0]
        return torch.from_numpy(numpy.interp(log_noise.numpy(), self.log_noise, mean.sqrt().numpy()))
