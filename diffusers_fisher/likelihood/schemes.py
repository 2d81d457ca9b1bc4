"""Grids in log(sigma/alpha), the schemes that carry a sample along a grid, and the integral of the trace.

Notation: s = sigma/alpha, u = log s. The probability-flow ODE is dx~/du = s eps(x~, u) for every schedule (Karras et
al., 2206.00364). A scheme of order k takes eps for a polynomial in u through its last nodes and integrates
e^u eps exactly: Adams-Bashforth through k - 1 of them to the next node, one evaluation there, Adams-Moulton through k
to correct; the corrected point is not evaluated again (UniPC, Zhao et al., 2302.04867, has the same calls).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy
import torch

from ..errors import InputError


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Says how a sample is carried along a grid, and how the trace is integrated.

    Args:
        order: order of the path's error in the step size; also the number of nodes of the corrector.
        companion: order of a second solution by the same evaluations; the difference estimates the error.
        quadrature: number of nodes of the polynomial under the trace's integral.
        companion_quadrature: number of nodes of a second polynomial; the difference estimates the error.
        fine, coarse: factors of these differences in the error's estimate, on grids of small and of large steps. A
            factor exceeds 1 where the companion is of higher order: the difference is then the error, up to the
            companion's own error. It is less than 1 where the companion is of lower order, because the difference then
            overstates the error.
    """

    order: int
    companion: int
    quadrature: int
    companion_quadrature: int
    fine: float
    coarse: float


SCHEMES = {
    "euler": Scheme(1, 2, 2, 4, 1.25, 1.25),
    "trapezoid": Scheme(2, 3, 2, 4, 1.25, 1.25),
    "adams3": Scheme(3, 2, 4, 3, 0.4, 1.0),
    "adams4": Scheme(4, 3, 4, 3, 0.3, 1.0),
}
"""Schemes by name. Each costs one evaluation of the denoiser per node."""

DEFAULT_SCHEME = "adams4"


def scheme_of(name: str) -> Scheme:
    """Returns the scheme called `name`. Raises `InputError` for unknown names."""
    if name not in SCHEMES:
        raise InputError(f"`scheme` is {name!r}; allowed: {', '.join(SCHEMES)}.")
    return SCHEMES[name]


TRANSITION, WIDTH = 0.5, 1.2
"""Centre and width, in log s, of the range where the grid is up to twice as dense: separate modes merge there, so that
r changes fastest."""

CORE = (-3.6, 2.7)
"""Range of log s beyond which the grid thins out: below, r is nearly 1 and smooth, above, eps hardly changes."""

THINNING = (0.2, 0.5)
"""Fall of the logarithm of the grid's density per unit of log s, below and above the core."""


def noise_grid(low: float, high: float, num_steps: int) -> torch.Tensor:
    """Makes a grid of log s from `low` to `high`, (num_steps + 1,) float64, dense where Gaussian mixtures need it."""
    u = numpy.linspace(low, high, 4001)
    fall = THINNING[0] * numpy.maximum(CORE[0] - u, 0) + THINNING[1] * numpy.maximum(u - CORE[1], 0)
    density = (1 + numpy.exp(-(((u - TRANSITION) / WIDTH) ** 2) / 2)) * numpy.exp(-fall)
    # The nodes are at equal steps of the density's integral (by the trapezoidal rule), so a grid of half as many steps
    # has every other node.
    share = numpy.concatenate([[0.0], numpy.cumsum(density[1:] + density[:-1])])
    return torch.from_numpy(numpy.interp(numpy.linspace(0, share[-1], num_steps + 1), share, u))


def quadrature_weights(grid: torch.Tensor, points: int) -> torch.Tensor:
    """Returns weights w (levels,) float64 of a quadrature: the integral of f over the grid is sum w_i f_i.

    Every interval has a polynomial of its own, through the `points` nodes nearest to it: 2 is the trapezoidal rule, 4
    makes cubics. A single polynomial through all nodes would oscillate.
    """
    nodes, total = grid.tolist(), torch.zeros(len(grid), dtype=torch.float64)
    points = min(points, len(nodes))
    for index in range(len(nodes) - 1):
        first = min(max(0, index + 1 - points // 2), len(nodes) - points)  # at the ends the nearest are on one side
        weights = _weights(nodes[first : first + points], nodes[index], nodes[index + 1], numpy.ones_like)
        total[first : first + points] += torch.tensor(weights, dtype=torch.float64)
    return total


class Track:
    """Steps one solution along a grid, by evaluations that may lie at another solution's points.

    Args:
        x: (B, ...) float64, x~ at the first node.
        epsilon: (B, ...) float64, eps at the first node.
        order: number of nodes of the corrector.
        linearised: move every evaluation to this solution's own point by the isotropic part of the Jacobian of eps,
            (1 - r)/s, which the trace gives at no further cost.
    """

    def __init__(self, x: torch.Tensor, epsilon: torch.Tensor, order: int, linearised: bool = False):
        self.x = x
        self.order = order
        self.linearised = linearised
        self._epsilons = [epsilon]

    def predict(self, grid: Sequence[float], index: int) -> torch.Tensor:
        """Returns x~ at node `index` from the nodes before it."""
        points = min(max(1, self.order - 1), index)
        weights = step_weights(grid[index - points : index], grid[index - 1], grid[index])
        return self.x + _linear_combination(weights, self._epsilons[-points:])

    def correct(
        self, grid: Sequence[float], index: int, point: torch.Tensor, epsilon: torch.Tensor, slope: torch.Tensor
    ) -> None:
        """Moves to node `index`.

        Args:
            point: (B, ...) x~ at which eps was evaluated.
            epsilon: (B, ...) eps at `point`.
            slope: (B, 1, ...) change of eps per change of x~, (1 - r)/s.
        """
        if self.order == 1:
            self.x = self.predict(grid, index)
        else:
            points = min(self.order, index + 1)
            *weights, last = step_weights(grid[index - points + 1 : index + 1], grid[index - 1], grid[index])
            before = self.x + _linear_combination(weights, self._epsilons[-(points - 1) :])
            self.x = before + last * epsilon
            if self.linearised:
                # The corrector is implicit: x = before + last (eps + slope (x - point)), solved for x. Where the step
                # is so long that the denominator nears 0 or changes its sign, the linear model does not hold: 0.1
                # bounds the correction at ten times the explicit one.
                self.x = point + (self.x - point) / (1 - last * slope).clamp_min(0.1)
        if self.linearised:
            epsilon = epsilon + slope * (self.x - point)
        self._epsilons = [*self._epsilons, epsilon][-max(1, self.order - 1) :]


def step_weights(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """Returns w: the integral of e^u eps(u) from `start` to `end` is sum w_i eps(u_i), for eps polynomial in u.

    The polynomial goes through `nodes`, and e^u is integrated exactly: so a step has no error where eps is constant.
    """
    return _weights(nodes, start, end, numpy.exp)


_ABSCISSAE, _GAUSS_WEIGHTS = numpy.polynomial.legendre.leggauss(16)  # exact to rounding, e^u over a decade included


def _weights(
    nodes: Sequence[float], start: float, end: float, factor: Callable[[numpy.ndarray], numpy.ndarray]
) -> list[float]:
    """Integrates `factor` times each Lagrange polynomial of `nodes` from `start` to `end`."""
    middle, half = (start + end) / 2, (end - start) / 2
    u = middle + half * _ABSCISSAE
    weights = half * _GAUSS_WEIGHTS * factor(u)
    result = []
    for index, node in enumerate(nodes):
        others = [*nodes[:index], *nodes[index + 1 :]]
        lagrange = numpy.prod([(u - other) / (node - other) for other in others], axis=0)  # of no others it is 1
        result.append(float((weights * lagrange).sum()))
    return result


def _linear_combination(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    first, *others = (weight * value for weight, value in zip(weights, values, strict=True))
    return sum(others, first)
