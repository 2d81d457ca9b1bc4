"""Deals the random directions of a likelihood's trace to the levels where they lower its variance most."""

from __future__ import annotations

import dataclasses

import torch

from .problem import Node, OdeProblem
from .traces import TraceRecord

NEIGHBOURS = (1, 1, 0, 1, 1)
"""Weights of the levels around one in its expected variance. Its own direction is left out: a number of further
directions that depended on the first one would make their mean biased."""


def deal_probes(
    problem: OdeProblem, nodes: list[Node], grid: list[float], weights: torch.Tensor
) -> tuple[TraceRecord, int]:
    """Returns the trace at the nodes with `num_probes` directions per node on average, and the evaluations by other
    denoisers than the problem's own.

    Every node brings its trace by one direction. Their scatter says where each sample needs the other directions.

    Args:
        nodes: one per level, with their states.
        grid: log(sigma/alpha) of the nodes.
        weights: (levels,) weights of 1 - r in the trace's integral.
    """
    first, result, calls = TraceRecord(), TraceRecord(), 0
    for node in nodes:
        first.add(node.trace)
    counts = dealt_counts(first.variance(fixed=False), weights, problem.integration.num_probes or 1)
    for node, log_noise, count in zip(nodes, grid, counts, strict=True):
        trace = node.trace
        for probe in range(1, int(count.max())):
            rows = (count > probe).nonzero()[:, 0]
            part = problem.select_samples(rows)
            trace = trace.with_probe(rows, part.trace_by_probe(node.state_of(rows), log_noise, probe))
            if part.denoiser is not problem.denoiser:  # else it counts them itself
                calls += part.denoiser.num_calls - part.calls_before
        # One probe stands for all of a node, so that every node has as many in `trace_by_level`.
        result.add(dataclasses.replace(trace, by_probe=trace.rest[None]))
    return result, calls


def dealt_counts(variance: torch.Tensor, weights: torch.Tensor, num_probes: int) -> torch.Tensor:
    """Returns the number of directions of every level, (levels, B) int64, at least 1 and `num_probes` on average.

    The sum of w^2 v/k over the levels is smallest where k is proportional to w sqrt(v).

    Args:
        variance: (levels, B) variance v of the trace by one direction, an estimate that may be below 0.
        weights: (levels,) weights w of the levels.
    """
    kernel = torch.tensor(NEIGHBOURS, dtype=variance.dtype)[None, None]
    around, number = (
        torch.nn.functional.conv1d(values.T[:, None], kernel, padding=len(NEIGHBOURS) // 2)[:, 0].T
        for values in (variance.clamp_min(0), torch.ones_like(variance))
    )
    share = weights.abs()[:, None] * (around / number).sqrt()
    share = torch.where(share.sum(0) > 0, share, 1.0)
    total = float(num_probes * len(weights))
    low, high = torch.zeros_like(share[0]), total / share.sum(0)
    for _ in range(60):  # bisection for the factor by which max(1, factor * share) has the right sum
        middle = (low + high) / 2
        is_low = (middle * share).clamp_min(1).sum(0) < total
        low, high = torch.where(is_low, middle, low), torch.where(is_low, high, middle)
    ends = (high * share).clamp_min(1).cumsum(0).round()  # rounded sums, so that the total stays
    return ends.diff(dim=0, prepend=torch.zeros_like(ends[:1])).long()
