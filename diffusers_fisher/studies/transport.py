"""Is the map of the probability-flow ODE an optimal transport map? A numerical check through the diffusion Fisher.

Notation: x = alpha(t) x_0 + sigma(t) eps; the PF-ODE is dx/dt = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps.
The Jacobian A of its map obeys the same linear equation with d eps/dx = sigma F in place of eps (the DF ODE, Wang et
al., ICML 2025, arXiv 2505.23264, section 5). By Brenier's theorem the map is the optimal one for the quadratic cost
if and only if it is the gradient of a convex function, that is, A symmetric positive semi-definite everywhere.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import InputError, NumericalError, UnsupportedError
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.operator import FisherOperator
from ..noise import NoiseLevel, expand, log_noise_to_signal_range, timestep_at

DENSE_LIMIT = 4096
"""Largest dimension of one sample whose whole Jacobian is carried."""

Coefficient = Callable[[torch.Tensor], torch.Tensor]


CHECKED = 101
"""Times at which a schedule is checked, both ends among them."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A noise schedule in its own time and coordinates.

    Args:
        alpha, sigma: functions of the time, float64 scalars; differentiable.
        data_time, noise_time: where the map ends and where it starts, 0 < data_time < noise_time: steps are taken in
            log time.

    Raises:
        InputError: time, sigma or alpha not positive and finite at one of the ends or between them: the ODE is
            singular there; sigma/alpha that does not grow with time.
    """

    name: str
    alpha: Coefficient
    sigma: Coefficient
    data_time: float
    noise_time: float

    def __post_init__(self) -> None:
        if not 0 < self.data_time < self.noise_time < math.inf:
            raise InputError(
                f"Schedule '{self.name}' has data_time {self.data_time}, noise_time {self.noise_time}; allowed: "
                "0 < data_time < noise_time. Stop short of a singular end."
            )
        between = torch.linspace(math.log(self.data_time), math.log(self.noise_time), CHECKED, dtype=torch.float64)
        before = 0.0
        for time in (self.data_time, *between[1:-1].exp().tolist(), self.noise_time):
            level = self.level(time)
            if not (0 < float(level.alpha) < math.inf and 0 < float(level.sigma) < math.inf):
                raise InputError(
                    f"Schedule '{self.name}' has alpha {float(level.alpha):.3g}, sigma {float(level.sigma):.3g} at "
                    f"time {time:.6g}; both must be positive and finite. Stop short of the singular time."
                )
            if float(level.noise_to_signal) <= before:
                raise InputError(
                    f"Schedule '{self.name}' has sigma/alpha {float(level.noise_to_signal):.3g} at time {time:.6g}, "
                    f"{before:.3g} before it; allowed: growing with time, from the data to the noise."
                )
            before = float(level.noise_to_signal)

    def level(self, time: torch.Tensor | float) -> NoiseLevel:
        """Noise level at `time`."""
        time = torch.as_tensor(time, dtype=torch.float64)
        return NoiseLevel(self.alpha(time), self.sigma(time))

    def rates(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) with dx/dt = a x + b eps."""
        with torch.inference_mode(False), torch.enable_grad():
            time = time.clone().requires_grad_()
            values = [function(time) for function in (self.alpha, self.sigma)]
            slopes = [torch.autograd.grad(v, time)[0] if v.requires_grad else torch.zeros_like(v) for v in values]
        (alpha, sigma), (alpha_rate, sigma_rate) = [value.detach() for value in values], slopes
        drift = alpha_rate / alpha
        return drift, sigma_rate - sigma * drift


def _scaled_linear_alpha(time: torch.Tensor) -> torch.Tensor:
    """Stable Diffusion's schedule in continuous time: beta(t) = 1000 (a + (b - a) t)^2, a^2 = 0.00085, b^2 = 0.012."""
    start, slope = 0.00085**0.5, 0.012**0.5 - 0.00085**0.5
    return torch.exp(-0.5 * 1000 * ((start + slope * time) ** 3 - start**3) / (3 * slope))


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule("vp", _scaled_linear_alpha, lambda t: torch.sqrt(1 - _scaled_linear_alpha(t) ** 2), 1e-3, 1.0),
        Schedule("sub-vp", _scaled_linear_alpha, lambda t: 1 - _scaled_linear_alpha(t) ** 2, 0.03, 1.0),
        Schedule("ve", torch.ones_like, torch.sqrt, 1e-3, 1.0),
        Schedule("edm", torch.ones_like, lambda t: t * 1.0, 0.03, 1.0),
        Schedule("flow-matching", lambda t: 1 - t, lambda t: t * 1.0, 0.03, 0.95),
    )
}
"""The five of the field. VE's time is its variance and EDM's its standard deviation, both up to 1, as in the paper's
experiment; all start near noise-to-signal 0.03."""


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """Step-size control (torchdiffeq's `dopri8`) to a relative tolerance; for closed forms in float64."""

    tolerance: float = 1e-8

    def arguments(self, grid: torch.Tensor) -> dict[str, Any]:
        """For `torchdiffeq.odeint` over `grid`."""
        # Without `step_t` the last step runs past the end and is interpolated back, at fourth order: a hundred times
        # the error of the steps themselves. Points in between are for pictures.
        ends = {"step_t": grid[-1:]}
        return {"method": "dopri8", "rtol": self.tolerance, "atol": self.tolerance * 1e-3, "options": ends}

    def coarser(self) -> Adaptive:
        """What the error is measured against."""
        return Adaptive(10 * self.tolerance)

    def grid(self, schedule: Schedule, num_points: int) -> torch.Tensor:
        """Log times at which results are kept, from noise to data."""
        return _log_times(schedule, num_points)


@dataclasses.dataclass(frozen=True)
class FixedSteps:
    """A given number of steps of a Runge-Kutta rule, equal in log time; for learned denoisers.

    Args:
        order: 4 (the 3/8 rule) or 2 (the midpoint rule); as many evaluations a step.
    """

    num_steps: int = 16
    order: int = 4

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise InputError(f"`num_steps` is {self.num_steps}; allowed: at least 2.")
        if self.order not in (2, 4):
            raise InputError(f"`order` is {self.order}; allowed: 2 or 4.")

    def arguments(self, grid: torch.Tensor) -> dict[str, Any]:
        """For `torchdiffeq.odeint` over `grid`."""
        return {"method": {2: "midpoint", 4: "rk4"}[self.order]}

    def coarser(self) -> FixedSteps:
        """What the error is measured against: so many steps that the difference is about twice the error or more."""
        steps = self.num_steps // 2 if self.order == 2 else 3 * self.num_steps // 4
        return FixedSteps(max(2, steps), self.order)

    def grid(self, schedule: Schedule, num_points: int) -> torch.Tensor:
        """The steps themselves: every one is kept."""
        return _log_times(schedule, self.num_steps + 1)


def _log_times(schedule: Schedule, count: int) -> torch.Tensor:
    return torch.linspace(math.log(schedule.noise_time), math.log(schedule.data_time), count, dtype=torch.float64)


Products = Callable[[torch.Tensor], torch.Tensor]
Field = Callable[[torch.Tensor, NoiseLevel], tuple[torch.Tensor, Products]]
"""`(x, level)` to the predicted noise (B, ...) and a function from vectors (k, B, ...) to the products with its
Jacobian, d eps/dx v: what moves samples and their Jacobians."""


def exact_field(distribution: Any) -> Field:
    """The field of a distribution in closed form (`DiracMixture`, `GaussianMixture`)."""

    def evaluate(x: torch.Tensor, level: NoiseLevel):
        posterior = distribution.posterior(x, level)
        return posterior.epsilon, lambda vectors: expand(level.sigma, x) * posterior.fisher(vectors)

    return evaluate


def denoiser_field(denoiser: Denoiser, estimator: FisherEstimator) -> Field:
    """The field of a learned denoiser, its Jacobian by any estimator; one without a denoiser gets this one.

    Cost an evaluation: one denoiser call, and the estimator's whole matrix (d products) or one product a direction.

    Raises:
        InputError: something else than an estimator, or a trace model of another denoiser.
    """
    estimator = check_estimator(estimator).bind(denoiser)

    def evaluate(x: torch.Tensor, level: NoiseLevel):
        timestep = timestep_at(denoiser.scheduler, level.log_noise_to_signal)
        own = denoiser.level(timestep)
        scale = expand(own.alpha / level.alpha, x)
        state = denoiser.state((scale * x).to(torch.float32), timestep.to(torch.float32))
        operator = estimator(state)
        factor = scale * expand(own.sigma, x)
        return state.epsilon.to(x.dtype), lambda vectors: factor * _products(operator, vectors)

    return evaluate


def model_schedule(denoiser: Denoiser) -> Schedule:
    """The levels that the denoiser's scheduler covers, with sigma/alpha as time."""
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    return Schedule("model", torch.ones_like, lambda t: t * 1.0, math.exp(low), math.exp(high))


def _products(operator: FisherOperator, vectors: torch.Tensor) -> torch.Tensor:
    """F v (not F^T v) for every vector; the whole matrix once where there are many."""
    narrow = vectors.to(operator.state.sample.dtype)
    if 4 * len(vectors) < vectors[0, 0].numel():
        return operator.transposed().matmat(narrow).to(vectors.dtype)
    matrix = operator.dense().to(vectors.dtype)
    matrix = matrix if operator.symmetric else matrix.mT  # matvec of a learned operator is the transposed product
    return torch.einsum("bde,kbe->kbd", matrix, vectors.flatten(2)).view_as(vectors)


@dataclasses.dataclass
class TransportMap:
    """The PF-ODE map from noise to data at some points, with its Jacobian.

    All in units of the data (x/alpha), whatever the schedule's own coordinates.

    Args:
        start: (B, ...) at the noise end. end: (B, ...) at the data end.
        jacobian: (B, d, k) of the map at `start`, applied to the directions.
        trajectory: (T, B, ...). jacobians: (T, B, d, k). noise_to_signal: (T,).
        error: largest change of `jacobian` relative to its norm when the integration is coarser.
    """

    start: torch.Tensor
    end: torch.Tensor
    jacobian: torch.Tensor
    trajectory: torch.Tensor
    jacobians: torch.Tensor
    noise_to_signal: torch.Tensor
    error: float


def transport_map(
    field: Field,
    start: torch.Tensor,
    schedule: Schedule,
    integration: Adaptive | FixedSteps | None = None,
    directions: torch.Tensor | None = None,
    num_points: int = 2,
) -> TransportMap:
    """Carries `start` and the map's Jacobian from the schedule's noise end to its data end.

    Args:
        start: (B, ...) float64 points at the noise end, in units of the data (x/alpha).
        integration: `Adaptive()` by default; `FixedSteps(n)` for learned denoisers.
        directions: (k, B, ...) that the Jacobian is applied to; None: all d of them, the whole matrix.
        num_points: levels kept with adaptive steps, both ends included; those in between are interpolated.

    Raises:
        InputError: more than `DENSE_LIMIT` dimensions without directions. NumericalError: a result is not finite.
    """
    integration = Adaptive() if integration is None else integration
    dimensions = start[0].numel()
    if directions is None:
        if dimensions > DENSE_LIMIT:
            raise InputError(
                f"A whole Jacobian of {dimensions} dimensions is too large (limit {DENSE_LIMIT}); pass `directions`, "
                "some (k, B, ...) vectors, to have the products with these alone."
            )
        identity = torch.eye(dimensions, dtype=start.dtype, device=start.device)
        directions = identity[:, None].expand(-1, len(start), -1).reshape(dimensions, *start.shape)
    times, trajectory, jacobians = _integrate(field, start, directions, schedule, integration, num_points)
    coarse = _integrate(field, start, directions, schedule, integration.coarser(), 2)[2][-1]
    jacobian = jacobians[-1]
    if not (torch.isfinite(jacobian).all() and torch.isfinite(trajectory).all()):
        raise NumericalError(f"The map under schedule '{schedule.name}' is not finite; integrate more finely.")
    change = (jacobian - coarse).flatten(1).norm(dim=1) / jacobian.flatten(1).norm(dim=1)
    levels = [float(schedule.level(time).noise_to_signal) for time in times]
    return TransportMap(
        start, trajectory[-1], jacobian, trajectory, jacobians, torch.tensor(levels, dtype=torch.float64),
        float(change.max()),
    )  # fmt: skip


def _integrate(
    field: Field, start: torch.Tensor, directions: torch.Tensor, schedule: Schedule,
    integration: Adaptive | FixedSteps, num_points: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Times, (T, B, ...) samples and (T, B, d, k) Jacobians, in units of the data."""
    odeint = extra("torchdiffeq").odeint

    def rate(log_time: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]):
        x, columns = state
        time = log_time.exp()
        drift, pull = (time * value for value in schedule.rates(time))
        epsilon, products = field(x, schedule.level(time))
        return drift * x + pull * epsilon, drift * columns + pull * products(columns)

    grid = integration.grid(schedule, num_points)
    times = grid.exp()
    scale = schedule.level(times[0]).alpha  # units of the data to the schedule's own
    with torch.no_grad():
        found, columns = odeint(rate, (scale * start, scale * directions), grid, **integration.arguments(grid))
    alphas = torch.stack([schedule.level(time).alpha for time in times]).to(start.device)
    samples = found / alphas.reshape(-1, *[1] * (found.ndim - 1))
    jacobians = columns.flatten(3).permute(0, 2, 3, 1) / alphas.reshape(-1, 1, 1, 1)
    return times, samples, jacobians


def extra(name: str) -> Any:
    """A module of the `transport` extra, torchdiffeq or ot.

    Raises:
        UnsupportedError: it isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"Transport maps need the package '{name}', which is not installed ({error}). Install the extra: "
            "pip install 'diffusers_fisher[transport]'."
        ) from error


def asymmetry(matrices: torch.Tensor) -> torch.Tensor:
    """|A - A^T|_F / (2 |A|_F) of (..., d, d): 0 for symmetric, 1 for antisymmetric matrices; the same in every
    orthonormal basis."""
    difference = torch.linalg.matrix_norm(matrices - matrices.mT)
    return difference / (2 * torch.linalg.matrix_norm(matrices))


def off_diagonal_asymmetry(matrices: torch.Tensor) -> torch.Tensor:
    """|A - A^T|_F / (sqrt(2) |A - diag A|_F), the index of the paper's experiment; depends on the basis.

    0 where A is diagonal.
    """
    rest = matrices - torch.diag_embed(matrices.diagonal(dim1=-2, dim2=-1))
    size = torch.linalg.matrix_norm(rest)
    index = torch.linalg.matrix_norm(rest - rest.mT) / (math.sqrt(2) * size)
    negligible = size <= 1e-12 * torch.linalg.matrix_norm(matrices)  # integration noise has no symmetry
    return torch.where(negligible, 0.0, index)


def least_eigenvalue(matrices: torch.Tensor) -> torch.Tensor:
    """Least eigenvalue of (A + A^T)/2 relative to the largest in size: at least 0 for a convex potential."""
    values = torch.linalg.eigvalsh((matrices + matrices.mT) / 2)
    return values[..., 0] / values.abs().amax(-1)


@dataclasses.dataclass(frozen=True)
class CouplingCost:
    """Cost of the PF-ODE's coupling against the best one between the same points.

    Args:
        pairs: mean squared distance of the ODE's own pairs. optimal: of the exact discrete plan between the same two
            point sets; the ODE's pairs are optimal where the two agree.
        gap: `pairs - optimal`, not negative but for rounding. standard_error: of the gap, over batches.
    """

    pairs: float
    optimal: float
    gap: float
    standard_error: float


def coupling_cost(start: torch.Tensor, end: torch.Tensor, batches: int = 8) -> CouplingCost:
    """Compares the pairs (start, end), (N, ...), with exact discrete optimal transport (POT), batch by batch.

    Raises:
        InputError: fewer than two batches of two points.
    """
    ot = extra("ot")
    size = len(start) // batches
    if batches < 2 or size < 2:
        raise InputError(
            f"{len(start)} pairs in {batches} batches; allowed: two batches or more of two pairs or more."
        )
    pairs, optimal = [], []
    for left, right in zip(start.flatten(1).split(size)[:batches], end.flatten(1).split(size)[:batches], strict=True):
        costs = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist").square()
        uniform = torch.full((len(left),), 1 / len(left), dtype=costs.dtype)
        pairs.append(float(costs.diagonal().mean()))
        optimal.append(float(ot.emd2(uniform.numpy(), uniform.numpy(), costs.cpu().numpy())))
    gaps = torch.tensor(pairs, dtype=torch.float64) - torch.tensor(optimal, dtype=torch.float64)
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    return CouplingCost(mean(pairs), mean(optimal), float(gaps.mean()), float(gaps.std() / batches**0.5))
