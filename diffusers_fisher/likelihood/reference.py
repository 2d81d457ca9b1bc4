"""The reference for other likelihoods: adaptive steps and the whole Jacobian."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import InputError, NumericalError, UnsupportedError
from ..fisher.autodiff import AutodiffFisher
from ..fisher.estimator import FisherEstimator
from ..noise import timestep_at
from .output import LikelihoodOutput
from .problem import Integration, OdeProblem, prepare_problem
from .schemes import noise_grid
from .solver import make_output

FIRST_STEP = 0.1
"""First step of the adaptive solver in log(sigma/alpha)."""


def reference_log_likelihood(
    denoiser: Denoiser,
    samples: torch.Tensor,
    estimator: FisherEstimator | None = None,
    tolerance: float = 1e-5,
    num_levels: int = 9,
    prior_mean: torch.Tensor | float | None = None,
    prior_variance: torch.Tensor | float | None = None,
    space: str = "latent",
) -> LikelihoodOutput:
    """Integrates the log-likelihood of clean `samples` (B, ...) by torchdiffeq's `dopri5`, with exact traces.

    x~/sqrt(1 + s^2) and the integral of 1 - r are one state; the step is set by the worst sample of the batch, so
    results depend on the batch within the tolerance. For tests and benchmarks of small models: an evaluation takes d
    products with the Jacobian. Cost: as many evaluations as the tolerance needs, 60 to 300.

    Args:
        denoiser: denoiser at guidance scale 1.
        estimator: gives the trace at every evaluation; None: `AutodiffFisher(denoiser, chunk_size=64)`.
        tolerance: relative and absolute tolerance of the state; below 1e-6 the rounding of a float32 network makes
            steps collapse.
        num_levels: number of levels at which the unexplained noise fraction is kept: the nodes of the fixed schemes
            with as many nodes.
        prior_mean, prior_variance, space: as in `log_likelihood`.

    Returns:
        `LikelihoodOutput` whose `discretisation_error` is the difference from ten times the tolerance.

    Raises:
        UnsupportedError: torchdiffeq is not installed.
        InputError: as `log_likelihood`; a tolerance that is not between 0 and 0.1, fewer than two levels.
        NumericalError: a result that is not finite.
    """
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UnsupportedError(
            "The reference likelihood needs torchdiffeq, which is not installed: pip install "
            "'diffusers_fisher[transport]'."
        ) from None
    if not 0 < tolerance < 0.1 or num_levels < 2:
        raise InputError(
            f"`tolerance` is {tolerance}, `num_levels` {num_levels}; allowed: between 0 and 0.1, at least 2."
        )
    integration = Integration(num_levels - 1, None, prior_mean=prior_mean, prior_variance=prior_variance, space=space)
    estimator = AutodiffFisher(chunk_size=64) if estimator is None else estimator
    problem = prepare_problem(denoiser, samples, estimator, integration)
    grid = noise_grid(problem.low, problem.high, num_levels - 1)
    end, trace, r = _solve(odeint, problem, grid, tolerance)
    rough_end, rough_trace, _ = _solve(odeint, problem, grid, 10 * tolerance)
    prior = problem.prior(end)
    error = (prior + trace - problem.prior(rough_end) - rough_trace).abs()
    if not torch.isfinite(prior + trace).all():
        raise NumericalError(f"Reference log-likelihoods are not finite: {(prior + trace).tolist()}.")
    # One evaluation more, at the end itself, for the prior's error.
    node = problem.evaluate(end, timestep_at(problem.denoiser.scheduler, grid)[-1], float(grid[-1]))
    return make_output(
        problem, f"dopri5, tolerance {tolerance:g}", final_latents=end, prior_log_prob=prior, trace_log_prob=trace,
        standard_error=torch.zeros_like(trace), trace_by_level=trace.new_empty(num_levels, 0, len(trace)),
        trace_weights=trace.new_zeros(num_levels), unexplained_noise_fraction=r,
        unexplained_noise_error=torch.zeros_like(r),
        noise_to_signal=grid.exp(),
        discretisation_error=error, prior_error=problem.prior_error(end, node),
    )  # fmt: skip


def _solve(
    odeint: Any, problem: OdeProblem, grid: torch.Tensor, tolerance: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns x~ at the noise end, d times the integral of 1 - r, and r at the nodes (levels, B)."""
    shape, dimensions = problem.start.shape, problem.start[0].numel()

    def rates(u: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        s = math.exp(float(u))
        norm = math.hypot(1, s)
        x = (norm * state[:, :-1]).view(shape)
        # An adaptive solver may ask for levels that rounding puts beyond the ends.
        timestep = timestep_at(problem.denoiser.scheduler, u.detach().cpu().clamp(problem.low, problem.high))
        node = problem.evaluate(x, timestep, float(u))
        # d/du of x~/norm, with d(norm)/du = s^2/norm
        slope = s / norm * node.epsilon.flatten(1) - (s / norm) ** 2 * state[:, :-1]
        return torch.cat([slope, node.trace.rest[:, None].to(slope)], dim=1)

    def largest_norm(error: torch.Tensor) -> torch.Tensor:
        return error.view(shape[0], -1).square().mean(1).sqrt().max()

    begin = problem.start.flatten(1) / math.hypot(1, math.exp(problem.low))
    state = torch.cat([begin, begin.new_zeros(len(begin), 1)], dim=1)
    with torch.no_grad():
        states = odeint(
            rates, state, grid.to(state.device), method="dopri5", rtol=tolerance, atol=tolerance,
            # The first step is small, and the last one ends at the last node. At low noise all rates are nearly 0, so
            # the solver's own steps go far beyond the last level, where a network has no meaning.
            options={"norm": largest_norm, "first_step": FIRST_STEP, "step_t": grid[-1:].to(state.device)},
        )  # fmt: skip
        rests = [rates(u, state)[:, -1] for u, state in zip(grid, states, strict=True)]
    end = (math.hypot(1, math.exp(problem.high)) * states[-1][:, :-1]).view(shape)
    return end, dimensions * states[-1][:, -1], 1 - torch.stack(rests)
