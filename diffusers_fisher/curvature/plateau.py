"""The plateau of a curve of dimensions by noise level.

The plateau is the widest range of consecutive levels, in log(sigma/alpha), at which the curve stays within 5% of its
mean over the range, at least 0.05, and two standard errors of its random directions; of equally wide ones the range at
lower noise. Two kinds of ranges count only where no other is wide, with a growth of the noise by a factor of e: those
with a mean above 0.9 d, because below the noise of the data themselves the curve is flat too, at nearly all d
dimensions, and those with a mean below 0.5, because below their distances the curve of single points is flat at 0.
"""

from __future__ import annotations

import dataclasses

import torch

TOLERANCE = 0.05
"""Largest deviation from the mean, relative to it."""

ERRORS = 2.0
"""Number of standard errors by which random directions may move a level's value further."""

NEARLY_ALL = 0.9
"""Share of the dimensions above which a range counts only where no other is wide."""

SINGLE_POINTS = 0.5
"""Dimension below which it counts likewise."""

WIDE = 1.0
"""Width from which on a range is a plateau, in log(sigma/alpha)."""


@dataclasses.dataclass(frozen=True)
class Plateau:
    """Holds the plateau of each of B curves.

    Args:
        value: (B,) mean of the curve over the plateau.
        ends: (B, 2) lowest and highest log(sigma/alpha).
        member: (levels, B) bool, which levels belong to it.
    """

    value: torch.Tensor
    ends: torch.Tensor
    member: torch.Tensor


def find_plateau(log_noise: torch.Tensor, curve: torch.Tensor, error: torch.Tensor, dims: int) -> Plateau:
    """Returns the plateau of each curve by the rule of this file.

    Args:
        log_noise: (levels,) log(sigma/alpha), increasing.
        curve: (levels, B) dimensions at the levels.
        error: (levels, B) standard errors by random directions; 0 where there are none, infinite for a single level.
        dims: dimensions of one sample.
    """
    count = len(log_noise)
    ranges = [(start, stop) for start in range(count) for stop in range(start + 1, count + 1)]
    means, widths = [], []
    for start, stop in ranges:
        part, mean = curve[start:stop], curve[start:stop].mean(0)
        allowed = TOLERANCE * mean.abs().clamp_min(1) + ERRORS * error[start:stop]
        fits = ((part - mean).abs() <= allowed).all(0)
        means.append(mean)
        widths.append(torch.where(fits, log_noise[stop - 1] - log_noise[start], -1.0))
    mean, width = torch.stack(means), torch.stack(widths)  # (ranges, B)
    best = torch.where((mean > NEARLY_ALL * dims) | (mean < SINGLE_POINTS), -1.0, width).max(0)
    # Rounded, because a step of the grid may miss the width by its last digit.
    chosen = torch.where(best.values >= WIDE - 1e-9, best.indices, width.argmax(0))
    starts, stops = torch.tensor(ranges)[chosen].T
    places = torch.arange(count)[:, None]
    return Plateau(
        mean.gather(0, chosen[None])[0], torch.stack([log_noise[starts], log_noise[stops - 1]], 1),
        (places >= starts) & (places < stops),
    )  # fmt: skip
