"""Refines the grid of a likelihood, image by image, until the stated discretisation error is small enough.

Notation: u = log(sigma/alpha), and eps_n is the predicted noise at node n of a path.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch

from ..errors import InputError
from .output import LikelihoodOutput, with_samples
from .schemes import Scheme

CONVERGED, NOT_CONVERGED = "converged", "not converged"

MAX_DENOISER_CALLS = 600
"""Default limit of evaluations per sample, enough for grids of 38, 76, 152 and 304 steps."""


class Foresight:
    """Measures how well the predicted noise along a path follows from the nodes before.

    At every node eps is extrapolated through the two and through the three nodes before. What the extrapolation
    misses, times the step, moves x~; times |eps|, it bounds what that is worth in log-density, because the gradient of
    the log-density is -eps/s. Where the grid resolves the path, three nodes miss less than two. Far from the data,
    where the path slides between two modes, eps jumps from node to node, and three nodes miss more than two, however
    fine the grid is. No trace is part of it.
    """

    def __init__(self) -> None:
        self._nodes: list[float] = []
        self._epsilons: list[torch.Tensor] = []
        self._missed: list[torch.Tensor] = []

    def add(self, node: float, epsilon: torch.Tensor) -> None:
        """Takes the next node u and eps (B, ...) there."""
        if self._nodes:
            length = epsilon.flatten(1).norm(dim=1) * (node - self._nodes[-1])
            errors = [epsilon - self._extrapolate(node, number) for number in (2, 3)]
            self._missed.append(torch.stack([length * error.flatten(1).norm(dim=1) for error in errors]))
        self._nodes, self._epsilons = [*self._nodes, node][-3:], [*self._epsilons, epsilon][-3:]

    def missed(self) -> torch.Tensor:
        """Returns what two and three nodes missed over the whole path, (2, B) nats."""
        return torch.stack(self._missed).sum(0).cpu()

    def _extrapolate(self, node: float, number: int) -> torch.Tensor:
        nodes, epsilons = self._nodes[-number:], self._epsilons[-number:]
        result = torch.zeros_like(epsilons[-1])
        for own, epsilon in zip(nodes, epsilons, strict=True):
            result = result + math.prod((node - other) / (own - other) for other in nodes if other != own) * epsilon
        return result


Solve = Callable[[torch.Tensor, int, Foresight], LikelihoodOutput]
"""Integrates the samples at some places of the batch, (n,) int64, over a grid of a number of steps, and shows its path
to a `Foresight`."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """Holds what one grid found for some samples.

    Args:
        log_prob: (B,) nats.
        own_error: (B,) nats, the discretisation error as this grid alone estimates it.
        missed: (2, B) nats, see `Foresight.missed`.
        noise_variance: (B,) nats^2 of the probes' noise in the difference from the grid of half as many steps; 0
            without. The probes of the common nodes are the same and have half the weight on the finer grid, so the
            difference has the variance of the finer grid's `log_prob`.
    """

    log_prob: torch.Tensor
    own_error: torch.Tensor
    missed: torch.Tensor
    noise_variance: torch.Tensor | float = 0.0

    def select_samples(self, left: torch.Tensor) -> Grid:
        """Returns what the grid found for the samples where `left` (B,) is true."""
        noise = self.noise_variance[left] if isinstance(self.noise_variance, torch.Tensor) else self.noise_variance
        return Grid(self.log_prob[left], self.own_error[left], self.missed[:, left], noise)


OWN_SHARE, MISSED_SHARE, MOST = 0.7, 0.006, 3.0
"""Weights of the two estimates, and the largest ratio of what three and two nodes miss that counts."""


def stated_error(grid: Grid, coarser: Grid | None, scheme: Scheme) -> torch.Tensor:
    """Returns the discretisation error that is stated for a grid's log-likelihoods, (B,) nats.

    It is the sum of three estimates. The weights were set on the development seeds of
    examples/benchmarks/discretisation.py:

    - the grid's own, from companions of another order, on which points near the data rely;
    - what extrapolation missed, times the fourth power of the ratio of what three and two nodes missed, where it
      exceeds 1: it states much where the grid does not resolve the path;
    - the difference from a coarser grid of half as many steps, divided as the scheme's order says.

    Args:
        coarser: the same samples on half as many steps; None for the first grid.
    """
    two, three = grid.missed
    ratio = (three / two.clamp_min(torch.finfo(torch.float64).tiny)).clamp(1, MOST)
    # A companion of higher order tells the error itself, one of lower order overstates it.
    own = (OWN_SHARE if scheme.order > scheme.companion else 1.0) * grid.own_error
    error = own + MISSED_SHARE * three * ratio**4
    if coarser is None:
        return error
    difference = ((grid.log_prob - coarser.log_prob).square() - grid.noise_variance).clamp_min(0).sqrt()
    return error + difference / (2**scheme.order - 1)


def check_refinement(
    tolerance: float | None, max_denoiser_calls: int, num_steps: int, step_halving: bool, name: str = "num_steps"
) -> None:
    """Checks the options of a refinement; `name` is what the caller calls the number of steps.

    Raises:
        InputError: a tolerance that is not positive, or together with `step_halving`; a limit below the first grid.
    """
    if tolerance is None:
        return
    if tolerance <= 0:
        raise InputError(f"`tolerance` is {tolerance}; allowed: a positive number of bits/dim, such as 0.01, or None.")
    if step_halving:
        raise InputError(
            "`tolerance` and `step_halving` were both given; a tolerance measures the error by several grids already. "
            "Leave out `step_halving`."
        )
    if max_denoiser_calls < num_steps + 1:
        raise InputError(
            f"`max_denoiser_calls` is {max_denoiser_calls}; the first grid takes {num_steps + 1} with `{name}` "
            f"{num_steps}. Allow at least as many, or take fewer steps."
        )


def refine(
    solve: Solve, count: int, num_steps: int, scheme: Scheme, tolerance: float, max_denoiser_calls: int,
    on_grid: Callable[[int], object],
) -> LikelihoodOutput:  # fmt: skip
    """Integrates `count` samples, and again on grids of twice as many steps each those samples that need it.

    Every decision is about one sample alone, so that its result depends on no other sample.

    Args:
        tolerance: largest discretisation error, bits/dim, at which a sample needs no finer grid.
        max_denoiser_calls: largest number of evaluations per sample.
        on_grid: called with the number of evaluations of every grid after the first.
    """

    def solve_grid(rows: torch.Tensor, steps: int, coarser: Grid | None) -> tuple[LikelihoodOutput, Grid]:
        foresight = Foresight()
        part = solve(rows, steps, foresight)
        # Probes that are the same at all nodes have a smooth error, which hardly differs between grids.
        noise = 0.0 if part.fixed_probes else part.standard_error.square()
        grid = Grid(part.log_prob, part.discretisation_error, foresight.missed(), noise)
        return dataclasses.replace(part, discretisation_error=stated_error(grid, coarser, scheme)), grid

    rows, steps = torch.arange(count), num_steps
    part, grid = solve_grid(rows, steps, None)
    result, total, calls = part, part.num_denoiser_calls, torch.full((count,), steps + 1)
    while True:
        left = ~(part.discretisation_error <= tolerance * part.dims * math.log(2))  # NaN needs a finer grid too
        rows, steps = rows[left], 2 * steps
        if not len(rows) or int(calls.max()) + steps + 1 > max_denoiser_calls:
            break
        on_grid(steps + 1)
        part, grid = solve_grid(rows, steps, grid.select_samples(left))
        result, total = with_samples(result, rows, part, steps // num_steps), total + part.num_denoiser_calls
        calls[rows] += steps + 1
    status = [CONVERGED] * count
    for row in rows.tolist():
        status[row] = NOT_CONVERGED
    return dataclasses.replace(result, num_denoiser_calls=total, denoiser_calls_per_image=calls, status=status)
