"""The trace at the nodes of a grid by random directions, and the error that the directions leave in its integral."""

from __future__ import annotations

import dataclasses

import torch

MOST_CHANGE = 4.0
"""Largest ratio of the traces of neighbouring levels by which their diagonals are brought to one size."""


@dataclasses.dataclass(frozen=True)
class NodeTrace:
    """Holds 1 - r of a batch at one node of the grid, float64.

    With y = sigma^2 F v/d for a direction v, v . y estimates 1 - r.

    Args:
        rest: (B,) 1 - r.
        by_probe: (k, B) its value by each probe; k = 0 where it is exact.
        square: (B,) mean of |y|^2 over the probes.
        diagonal: (B, d) mean of v * y over the probes, whose sum is `rest`.
        counts: (B,) number of probes of each sample; 1 where the trace is exact.
    """

    rest: torch.Tensor
    by_probe: torch.Tensor
    square: torch.Tensor
    diagonal: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def exact(cls, rest: torch.Tensor) -> NodeTrace:
        no_probes, zero = rest.new_empty(0, len(rest)), torch.zeros_like(rest)
        return cls(rest, no_probes, zero, rest.new_zeros(len(rest), 1), torch.ones_like(rest))

    @classmethod
    def sampled(cls, vectors: torch.Tensor, products: torch.Tensor) -> NodeTrace:
        """Takes directions v and products y, each (k, B, ...)."""
        diagonals = (vectors.double() * products).flatten(2)
        by_probe, square = diagonals.sum(2), products.flatten(2).square().sum(2).mean(0)
        counts = torch.full_like(square, len(vectors))
        return cls(by_probe.mean(0), by_probe, square, diagonals.mean(0), counts)

    def with_probe(self, rows: torch.Tensor, other: NodeTrace) -> NodeTrace:
        """Returns the mean with one probe more for the samples at `rows`, (n,) int64; `by_probe` is left as it was.

        Args:
            other: the trace of these samples by that probe alone.
        """
        counts = self.counts.index_add(0, rows, torch.ones_like(other.rest))

        def mean(values: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
            share = (1 / counts[rows]).view(-1, *[1] * (values.ndim - 1))
            return values.index_add(0, rows, share * (added - values[rows]))

        return NodeTrace(
            mean(self.rest, other.rest), self.by_probe, mean(self.square, other.square),
            mean(self.diagonal, other.diagonal), counts,
        )  # fmt: skip


class TraceRecord:
    """Collects the trace at the nodes of a grid, one after the other. Keeps no more than numbers, and one diagonal."""

    def __init__(self) -> None:
        self._rests: list[torch.Tensor] = []
        self._by_probe: list[torch.Tensor] = []
        self._squares: list[torch.Tensor] = []
        self._counts: list[torch.Tensor] = []
        self._products: list[torch.Tensor] = []
        self._diagonal: torch.Tensor | None = None

    def add(self, trace: NodeTrace) -> None:
        """Adds the trace at the next node."""
        if self._diagonal is not None:
            self._products.append((self._diagonal * trace.diagonal).sum(1))
        self._diagonal = trace.diagonal
        self._rests.append(trace.rest)
        self._by_probe.append(trace.by_probe)
        self._squares.append(trace.square)
        self._counts.append(trace.counts)

    @property
    def rests(self) -> torch.Tensor:
        """1 - r, (levels, B)."""
        return torch.stack(self._rests)

    @property
    def by_probe(self) -> torch.Tensor:
        """1 - r by each probe, (levels, k, B)."""
        return torch.stack(self._by_probe)

    def variance(self, fixed: bool) -> torch.Tensor:
        """Returns the variance of 1 - r at each node by its random directions, (levels, B).

        It is 0 where the directions are the same at all nodes: then their error is a smooth function of the level.
        """
        return torch.zeros_like(self._variance()) if fixed else self._variance()

    def deviation(self) -> torch.Tensor:
        """Returns the standard error of 1 - r at each node by its directions, (levels, B); 0 where it is exact.

        A single level's variance is uncertain in few dimensions, so that it is the mean over five levels.
        """
        variance = self._variance().T[:, None]
        mean = torch.nn.functional.avg_pool1d(variance, 5, stride=1, padding=2, count_include_pad=False)
        return mean[:, 0].T.clamp_min(0).sqrt()

    def level_errors(self) -> torch.Tensor:
        """Returns the standard error of 1 - r at each node, (levels, B): `deviation`, which needs two nodes or more;
        at a single node the scatter of its directions, infinite for one direction."""
        count = self.by_probe.shape[1]
        return self.deviation() if len(self._rests) > 1 or not count else scatter_error(self.by_probe[0])[None]

    def _variance(self) -> torch.Tensor:
        squares = torch.stack(self._squares)
        if len(self._by_probe[0]) == 0:
            return torch.zeros_like(squares)
        return trace_variance(squares, torch.stack(self._products), self.rests, torch.stack(self._counts))

    def standard_error(self, weights: torch.Tensor, fixed: bool) -> torch.Tensor:
        """Returns the standard error of the sum of `weights` (levels,) times 1 - r, (B,)."""
        if fixed and len(self._by_probe[0]):
            return scatter_error(torch.einsum("n,nkb->kb", weights, self.by_probe))
        # Clamped as a sum: in few dimensions a single level's variance is uncertain, and may be estimated below 0.
        return torch.einsum("n,nb->b", weights.square(), self.variance(fixed)).clamp_min(0).sqrt()


def trace_variance(
    squares: torch.Tensor, products: torch.Tensor, traces: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """Returns the variance of 1 - r by the mean over `counts` random signs, (levels, B); one per level is enough.

    The variance of v . A v over random signs v is 2 (|A|^2 - sum of A_ii^2) for a symmetric A (less for others, as the
    Jacobian of a network). |A v|^2 estimates |A|^2, and v * A v the diagonal of A with an error of the size of a row;
    but the product of two such diagonals by independent signs has no such bias. They come from neighbouring levels,
    where the diagonal is nearly the same but for its sum: that is brought to the level's own, and the mean over both
    sides is right to second order in the distance of the levels.

    Args:
        squares: (levels, B) |A v|^2, mean over the signs.
        products: (levels - 1, B) inner products of v * A v (mean over the signs) at each level and the next.
        traces: (levels, B) v . A v, mean over the signs.
        counts: (levels, B) number of signs.
    """
    # Far from the data a noisy trace may be near 0 or negative.
    ratios = (traces[1:] / traces[:-1]).nan_to_num(1.0).clamp(1 / MOST_CHANGE, MOST_CHANGE)
    before, after = products * ratios, products / ratios  # of a level with the one before it, and with the next
    diagonal = (torch.cat([after[:1], before]) + torch.cat([after, before[-1:]])) / 2
    return 2 * (squares - diagonal) / counts


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
