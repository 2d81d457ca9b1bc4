"""A numerical check, by the diffusion Fisher, whether the map of the probability-flow ODE is an optimal transport map.

Notation: x = alpha(t) x_0 + sigma(t) eps; the PF-ODE is dx/dt = (alpha'/alpha) x + (sigma' - sigma alpha'/alpha) eps.
The Jacobian A of its map obeys the same linear equation with d eps/dx = sigma F in place of eps (the DF ODE, Wang et
al., ICML 2025, arXiv 2505.23264, section 5). By Brenier's theorem the map is the optimal one for the quadratic cost
if and only if it is the gradient of a convex function, that is, A symmetric positive semi-definite everywhere.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..denoiser import Denoiser
from ..distributions import Distribution
from ..errors import InputError, NumericalError, UnsupportedError
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.operator import FisherOperator
from ..noise import NoiseLevel, expand, log_noise_to_signal_range, timestep_at

DENSE_LIMIT = 4096
"""Largest number of dimensions of a sample for which `transport_map` computes the whole Jacobian."""

Coefficient = Callable[[torch.Tensor], torch.Tensor]


NUM_CHECK_TIMES = 101
"""Number of times at which a schedule is checked, including both ends."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Describes a noise schedule in its own time and coordinates.

    Args:
        name: name of the schedule in tables.
        alpha, sigma: differentiable functions of the time, a float64 scalar.
        data_time, noise_time: times at which the map ends and starts, 0 < data_time < noise_time, because steps are
            equal in log time.

    Raises:
        InputError: time, sigma or alpha is not positive and finite at or between the ends, where the ODE would be
            singular; or sigma/alpha does not grow with time.
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
        times = _log_times(self, NUM_CHECK_TIMES)[1:-1].flip(0).exp().tolist()
        previous_ratio = 0.0
        for time in (self.data_time, *times, self.noise_time):
            level = self.level(time)
            if not (0 < float(level.alpha) < math.inf and 0 < float(level.sigma) < math.inf):
                raise InputError(
                    f"Schedule '{self.name}' has alpha {float(level.alpha):.3g}, sigma {float(level.sigma):.3g} at "
                    f"time {time:.6g}; both must be positive and finite. Stop short of the singular time."
                )
            if float(level.noise_to_signal) <= previous_ratio:
                raise InputError(
                    f"Schedule '{self.name}' has sigma/alpha {float(level.noise_to_signal):.3g} at time {time:.6g}, "
                    f"{previous_ratio:.3g} before it; allowed: growing with time, from the data to the noise."
                )
            previous_ratio = float(level.noise_to_signal)

    def level(self, time: torch.Tensor | float) -> NoiseLevel:
        """Returns the noise level at `time`."""
        time = torch.as_tensor(time, dtype=torch.float64)
        return NoiseLevel(self.alpha(time), self.sigma(time))

    def rates(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (a, b) with dx/dt = a x + b eps."""
        with torch.inference_mode(False), torch.enable_grad():
            time = time.clone().requires_grad_()
            values = [function(time) for function in (self.alpha, self.sigma)]
            slopes = [torch.autograd.grad(v, time)[0] if v.requires_grad else torch.zeros_like(v) for v in values]
        (alpha, sigma), (alpha_rate, sigma_rate) = [value.detach() for value in values], slopes
        drift = alpha_rate / alpha
        # In units of the data, x/alpha, only sigma/alpha changes; this is alpha times the derivative of sigma/alpha.
        return drift, sigma_rate - sigma * drift


def _log_times(schedule: Schedule, count: int) -> torch.Tensor:
    return torch.linspace(math.log(schedule.noise_time), math.log(schedule.data_time), count, dtype=torch.float64)


def _scaled_linear_alpha(time: torch.Tensor) -> torch.Tensor:
    """Returns alpha for beta(t) = 1000 (a + (b - a) t)^2, a^2 = 0.00085, b^2 = 0.012: Stable Diffusion's schedule."""
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
"""The five usual schedules by name. The time of VE is its variance and the time of EDM its standard deviation, both up
to 1, as in the paper's experiment. All end near a noise-to-signal ratio of 0.03."""


@dataclasses.dataclass(frozen=True)
class AdaptiveSteps:
    """Chooses steps (torchdiffeq's `dopri8`) for a relative tolerance; for closed forms in float64."""

    tolerance: float = 1e-8

    def arguments(self, grid: torch.Tensor) -> dict[str, Any]:
        """Returns the arguments of `torchdiffeq.odeint` over `grid`."""
        # Without `step_t` the last step would pass the end, and the result there would be interpolated at fourth
        # order, with a hundred times the error of the steps. Interpolation between the ends serves pictures only.
        options = {"step_t": grid[-1:]}
        return {"method": "dopri8", "rtol": self.tolerance, "atol": self.tolerance * 1e-3, "options": options}

    def coarsen(self) -> "AdaptiveSteps":
        """Returns the coarser integration by which the error is measured."""
        return AdaptiveSteps(10 * self.tolerance)

    def grid(self, schedule: Schedule, num_points: int) -> torch.Tensor:
        """Returns the log times of the results, from noise to data."""
        return _log_times(schedule, num_points)


@dataclasses.dataclass(frozen=True)
class FixedSteps:
    """Takes a fixed number of Runge-Kutta steps, equal in log time; for learned denoisers.

    Args:
        num_steps: number of steps, at least 2.
        order: 4 (the 3/8 rule) or 2 (the midpoint rule); also the number of evaluations per step.
    """

    num_steps: int = 16
    order: int = 4

    def __post_init__(self) -> None:
        if self.num_steps < 2:
            raise InputError(f"`num_steps` is {self.num_steps}; allowed: at least 2.")
        if self.order not in (2, 4):
            raise InputError(f"`order` is {self.order}; allowed: 2 or 4.")

    def arguments(self, grid: torch.Tensor) -> dict[str, Any]:
        """Returns the arguments of `torchdiffeq.odeint` over `grid`."""
        return {"method": {2: "midpoint", 4: "rk4"}[self.order]}

    def coarsen(self) -> "FixedSteps":
        """Returns the coarser integration by which the error is measured.

        It has so few steps that the difference of the results is at least about twice the error.
        """
        steps = self.num_steps // 2 if self.order == 2 else 3 * self.num_steps // 4
        return FixedSteps(max(2, steps), self.order)

    def grid(self, schedule: Schedule, num_points: int) -> torch.Tensor:
        """Returns the log times of all steps, from noise to data: every step has a result."""
        return _log_times(schedule, self.num_steps + 1)


Products = Callable[[torch.Tensor], torch.Tensor]
Field = Callable[[torch.Tensor, NoiseLevel], tuple[torch.Tensor, Products]]
"""A function of `(x, level)` that moves samples and their Jacobians. It returns the predicted noise (B, ...), and a
function from vectors v (k, B, ...) to the products with the Jacobian of the predicted noise, d eps/dx v."""


def exact_field(distribution: Distribution) -> Field:
    """Returns the field of a distribution in closed form (`DiracMixture`, `GaussianMixture`)."""

    def evaluate(x: torch.Tensor, level: NoiseLevel) -> tuple[torch.Tensor, Products]:
        posterior = distribution.posterior(x, level)
        return posterior.epsilon, lambda vectors: expand(level.sigma, x) * posterior.fisher(vectors)

    return evaluate


def denoiser_field(denoiser: Denoiser, estimator: FisherEstimator) -> Field:
    """Returns the field of a learned denoiser, with its Jacobian by any estimator.

    An estimator without a denoiser gets `denoiser`. Cost per evaluation: one denoiser call, and the estimator's whole
    matrix (d products) or one product per direction.

    Raises:
        InputError: `estimator` is no estimator, or its trace model belongs to another denoiser.
    """
    estimator = check_estimator(estimator).bind(denoiser)

    def evaluate(x: torch.Tensor, level: NoiseLevel) -> tuple[torch.Tensor, Products]:
        timestep = timestep_at(denoiser.scheduler, level.log_noise_to_signal)
        # The denoiser's level has the same sigma/alpha, but its own alpha: the sample is rescaled to it.
        model_level = denoiser.level(timestep)
        scale = expand(model_level.alpha / level.alpha, x)
        state = denoiser.state((scale * x).to(torch.float32), timestep.to(torch.float32))
        operator = estimator(state)
        factor = scale * expand(model_level.sigma, x)  # d eps/dx = sigma F at the model's sample, times `scale`
        return state.epsilon.to(x.dtype), lambda vectors: factor * _products(operator, vectors)

    return evaluate


def model_schedule(denoiser: Denoiser) -> Schedule:
    """Returns the schedule of all levels of the denoiser's scheduler, with sigma/alpha as time."""
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    return Schedule("model", torch.ones_like, lambda t: t * 1.0, math.exp(low), math.exp(high))


def _products(operator: FisherOperator, vectors: torch.Tensor) -> torch.Tensor:
    """Returns F v (not F^T v) for every vector. The whole matrix is computed once where there are many vectors."""
    if 4 * len(vectors) < vectors[0, 0].numel():
        return operator.transposed().matmat(vectors.to(operator.state.sample.dtype)).to(vectors.dtype)
    matrix = operator.dense().to(vectors.dtype)
    matrix = matrix if operator.symmetric else matrix.mT  # `matvec` of a learned operator is the transposed product
    return torch.einsum("bde,kbe->kbd", matrix, vectors.flatten(2)).view_as(vectors)


@dataclasses.dataclass
class TransportMap:
    """Holds the PF-ODE map from noise to data at some points, with its Jacobian.

    All values are in units of the data (x/alpha), for every schedule.

    Args:
        start: points at the noise end, (B, ...).
        end: points at the data end, (B, ...).
        jacobian: Jacobian of the map at `start`, applied to the directions, (B, d, k).
        trajectory: points at every level, (T, B, ...).
        jacobians: Jacobians at every level, (T, B, d, k).
        noise_to_signal: sigma/alpha of every level, (T,).
        error: largest change of `jacobian`, relative to its norm, when the integration is coarser.
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
    integration: AdaptiveSteps | FixedSteps | None = None,
    directions: torch.Tensor | None = None,
    num_points: int = 2,
) -> TransportMap:
    """Integrates `start` and the map's Jacobian from the schedule's noise end to its data end.

    Args:
        field: the field that moves samples, by `exact_field` or `denoiser_field`.
        start: points at the noise end, (B, ...) float64, in units of the data (x/alpha).
        schedule: the noise schedule.
        integration: `AdaptiveSteps()` by default; `FixedSteps(n)` for learned denoisers.
        directions: vectors (k, B, ...) that the Jacobian is applied to; None: all d directions, the whole matrix.
        num_points: number of levels that adaptive steps return, including both ends; inner levels are interpolated.

    Raises:
        InputError: the samples have more than `DENSE_LIMIT` dimensions, and no directions were passed.
        NumericalError: a result is not finite.
    """
    integration = AdaptiveSteps() if integration is None else integration
    dimensions = start[0].numel()
    if directions is None:
        if dimensions > DENSE_LIMIT:
            raise InputError(
                f"A whole Jacobian of {dimensions} dimensions is too large (limit {DENSE_LIMIT}). Pass `directions`, "
                "vectors of shape (k, B, ...), to compute only the products with them."
            )
        identity = torch.eye(dimensions, dtype=start.dtype, device=start.device)
        directions = identity[:, None].expand(-1, len(start), -1).reshape(dimensions, *start.shape)
    times, trajectory, jacobians = _integrate(field, start, directions, schedule, integration, num_points)
    coarse = _integrate(field, start, directions, schedule, integration.coarsen(), 2)[2][-1]
    jacobian = jacobians[-1]
    if not (torch.isfinite(jacobian).all() and torch.isfinite(trajectory).all()):
        raise NumericalError(f"The map under schedule '{schedule.name}' is not finite. Use smaller steps.")
    change = (jacobian - coarse).flatten(1).norm(dim=1) / jacobian.flatten(1).norm(dim=1)
    levels = torch.tensor([float(schedule.level(time).noise_to_signal) for time in times], dtype=torch.float64)
    return TransportMap(start, trajectory[-1], jacobian, trajectory, jacobians, levels, float(change.max()))


def _integrate(
    field: Field, start: torch.Tensor, directions: torch.Tensor, schedule: Schedule,
    integration: AdaptiveSteps | FixedSteps, num_points: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Returns times (T,), samples (T, B, ...) and Jacobians (T, B, d, k), in units of the data."""
    odeint = import_extra("torchdiffeq").odeint

    def rate(log_time: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, columns = state
        time = log_time.exp()  # dx/d(log t) = t dx/dt, so both rates are multiplied by the time
        drift, pull = (time * value for value in schedule.rates(time))
        epsilon, products = field(x, schedule.level(time))
        return drift * x + pull * epsilon, drift * columns + pull * products(columns)

    grid = integration.grid(schedule, num_points)
    times = grid.exp()
    scale = schedule.level(times[0]).alpha  # from units of the data to the schedule's coordinates
    with torch.no_grad():
        samples, columns = odeint(rate, (scale * start, scale * directions), grid, **integration.arguments(grid))
    alphas = torch.stack([schedule.level(time).alpha for time in times]).to(start.device)
    samples = samples / alphas.reshape(-1, *[1] * (samples.ndim - 1))
    jacobians = columns.flatten(3).permute(0, 2, 3, 1) / alphas.reshape(-1, 1, 1, 1)
    return times, samples, jacobians


def import_extra(name: str) -> ModuleType:
    """Imports a module of the extra `transport`: torchdiffeq or ot.

    Raises:
        UnsupportedError: the module isn't installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnsupportedError(
            f"Transport maps need the package '{name}', which is not installed ({error}). Install the extra: "
            "pip install 'diffusers_fisher[transport]'."
        ) from error


def asymmetry(matrices: torch.Tensor) -> torch.Tensor:
    """Returns |A - A^T|_F / (2 |A|_F) of (..., d, d) matrices.

    It is 0 for symmetric and 1 for antisymmetric matrices, and the same in every orthonormal basis.
    """
    difference = torch.linalg.matrix_norm(matrices - matrices.mT)
    return difference / (2 * torch.linalg.matrix_norm(matrices))


def off_diagonal_asymmetry(matrices: torch.Tensor) -> torch.Tensor:
    """Returns |A - A^T|_F / (sqrt(2) |A - diag A|_F), the index of the paper's experiment.

    It depends on the basis. It is 0 where A is diagonal.
    """
    off_diagonal = matrices - torch.diag_embed(matrices.diagonal(dim1=-2, dim2=-1))
    size = torch.linalg.matrix_norm(off_diagonal)
    index = torch.linalg.matrix_norm(off_diagonal - off_diagonal.mT) / (math.sqrt(2) * size)
    # Off-diagonal entries of a diagonal map are integration errors, whose index would be a random number.
    is_diagonal = size <= 1e-12 * torch.linalg.matrix_norm(matrices)
    return torch.where(is_diagonal, 0.0, index)


def least_eigenvalue(matrices: torch.Tensor) -> torch.Tensor:
    """Returns the least eigenvalue of (A + A^T)/2 over its largest absolute eigenvalue.

    It is not negative if the map is the gradient of a convex function.
    """
    values = torch.linalg.eigvalsh((matrices + matrices.mT) / 2)
    return values[..., 0] / values.abs().amax(-1)


@dataclasses.dataclass(frozen=True)
class CouplingCost:
    """Compares the cost of the PF-ODE's pairs with the lowest cost between the same points.

    Args:
        pairs: mean squared distance of the ODE's pairs.
        optimal: mean squared distance under the exact discrete plan between the same two point sets.
        gap: `pairs - optimal`; it is negative by rounding at most, and 0 where the ODE's pairs are optimal.
        standard_error: standard error of the gap over batches.
    """

    pairs: float
    optimal: float
    gap: float
    standard_error: float


def coupling_cost(start: torch.Tensor, end: torch.Tensor, batches: int = 8) -> CouplingCost:
    """Compares the pairs (start, end), (N, ...), with exact discrete optimal transport (POT), batch by batch.

    Raises:
        InputError: there are fewer than two batches of two pairs.
    """
    ot = import_extra("ot")
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
    standard_error = float(gaps.std() / batches**0.5)
    return CouplingCost(sum(pairs) / batches, sum(optimal) / batches, float(gaps.mean()), standard_error)
