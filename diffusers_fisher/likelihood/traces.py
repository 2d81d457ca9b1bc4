"""The trace at the nodes of a grid by random directions, and the error that the directions leave in its integral."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class NodeTrace:
    """Holds 1 - r of a batch at one node of the grid, float64.

    With y = sigma^2 F v/d for a direction v, v . y estimates 1 - r.

    Args:
        rest: (B,) 1 - r.
        by_probe: (k, B) its value by each probe; k = 0 where it is exact.
        square: (B,) mean of |y|^2 over the probes.
        diagonal: (B, d) mean of v * y over the probes, whose sum is `rest`.
    """

    rest: torch.Tensor
    by_probe: torch.Tensor
    square: torch.Tensor
    diagonal: torch.Tensor

    @classmethod
    def exact(cls, rest: torch.Tensor) -> NodeTrace:
        return cls(rest, rest.new_empty(0, len(rest)), torch.zeros_like(rest), rest.new_zeros(len(rest), 1))

    @classmethod
    def sampled(cls, vectors: torch.Tensor, products: torch.Tensor) -> NodeTrace:
        """Takes directions v and products y, each (k, B, ...)."""
        diagonals = (vectors.double() * products).flatten(2)
        by_probe, square = diagonals.sum(2), products.flatten(2).square().sum(2).mean(0)
        return cls(by_probe.mean(0), by_probe, square, diagonals.mean(0))


def node_variance(traces: Sequence[NodeTrace], fixed: bool) -> torch.Tensor:
    """Returns the variance of 1 - r at each node by its random directions, (levels, B).

    It is 0 where the directions are the same at all nodes: then their error is a smooth function of the level.
    """
    squares = torch.stack([trace.square for trace in traces])
    count = len(traces[0].by_probe)
    if fixed or count == 0:
        return torch.zeros_like(squares)
    products = [(trace.diagonal * later.diagonal).sum(1) for trace, later in itertools.pairwise(traces)]
    return trace_variance(squares, torch.stack(products), count)


def standard_error(
    traces: Sequence[NodeTrace], variance: torch.Tensor, weights: torch.Tensor, fixed: bool
) -> torch.Tensor:
    """Returns the standard error of the trace's integral by its random directions, (B,) nats."""
    if fixed and len(traces[0].by_probe):
        return scatter_error(torch.einsum("n,nkb->kb", weights, torch.stack([trace.by_probe for trace in traces])))
    # Clamped as a sum: in few dimensions a single level's variance is uncertain, and may be estimated below 0.
    return torch.einsum("n,nb->b", weights.square(), variance).clamp_min(0).sqrt()


def trace_variance(squares: torch.Tensor, products: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the variance of 1 - r by the mean over `count` random signs, (levels, B), from a single one per level.

    The variance of v . A v over random signs v is 2 (|A|^2 - sum of A_ii^2) for a symmetric A (less for others, as the
    Jacobian of a network). |A v|^2 estimates |A|^2, and v * A v the diagonal of A with an error of the size of a row;
    but the product of two such diagonals by independent signs has no such bias. They come from neighbouring levels,
    where A is nearly the same: the mean over both sides is right to second order in the distance of the levels.

    Args:
        squares: (levels, B) |A v|^2, mean over the signs.
        products: (levels - 1, B) inner products of v * A v (mean over the signs) at each level and the next.
    """
    first, last = products[:1], products[-1:]
    diagonal = (torch.cat([first, products]) + torch.cat([products, last])) / 2
    return 2 * (squares - diagonal) / count


def scatter_error(totals: torch.Tensor) -> torch.Tensor:
    """Returns the standard error of the mean of independent `totals` (k, ...): infinite for one, unless it is 0."""
    if len(totals) == 1:
        return torch.where(totals[0] == 0, 0.0, torch.inf).to(totals)
    return totals.std(0) / len(totals) ** 0.5


def level_error(by_level: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Returns the standard error of sums over levels with independent probes, (...), by their scatter alone.

    Args:
        by_level: (levels, k, ...) contribution of each level by each of its k probes; the sum's value is the mean over
            the probes of the sum over the levels.
        weights: (levels,) weights of the levels in the contributions.

    With one probe per level, the scatter is that about the mean of the two neighbours, (x_{i-1} - 2 x_i + x_{i+1})/2,
    whose variance is 3/2 of that of x_i where all have the same. It errs upwards where the course is curved.
    """
    if by_level.shape[1] > 1:
        return (by_level.var(1) / by_level.shape[1]).sum(0).sqrt()
    shape = (-1, *[1] * (by_level.ndim - 2))
    values = by_level[:, 0] / weights.view(shape)
    bend = (values[2:] - 2 * values[1:-1] + values[:-2]) / 2
    bend = torch.cat([bend[:1], bend, bend[-1:]])  # the ends take their neighbours' scatter
    return (weights.view(shape) * bend).square().sum(0).mul(2 / 3).sqrt()
