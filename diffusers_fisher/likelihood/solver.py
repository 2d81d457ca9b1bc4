"""Likelihood by the probability-flow ODE, integrated in log(sigma/alpha).

Notation: x~ = x/alpha, s = sigma/alpha; the ODE is dx~/d(log s) = s eps(x~, s), the same for every schedule
(Song et al., 2011.13456; Karras et al., 2206.00364). r = tr Cov[eps|x]/d, so tr F = d (1 - r)/sigma^2 and
log p~_{s_0}(x~_0) = log p~_{s_T}(x~_T) + d * integral of (1 - r) d(log s).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable

import torch

from ..arguments import check_generators, check_kinds
from ..denoiser import Denoiser
from ..errors import CoarseGridWarning, InputError, NumericalError
from ..fisher.estimate import Generators, Probes, rademacher
from ..fisher.estimator import FisherEstimator, check_estimator
from ..noise import expand, log_noise_to_signal_range, timestep_at
from .bins import dequantised, offset_bits
from .output import LikelihoodOutput
from .refinement import MAX_DENOISER_CALLS, NOT_CONVERGED, Foresight, check_refinement, refine
from .schemes import DEFAULT_SCHEME, Scheme, Track, noise_grid, quadrature_weights, scheme_of

Moment = torch.Tensor | float | None

MANY_PROBES = 64
"""Number of probes up to which more than the dimensions of a sample are allowed."""

COARSE = 0.05
"""Discretisation error, in bits/dim, above which a likelihood warns."""


@dataclasses.dataclass(frozen=True)
class OdeProblem:
    """Holds the samples and the denoiser of one likelihood, after all checks and random draws.

    Args:
        denoiser: denoiser at guidance scale 1; a guided output is the score of no density.
        start: (B, ...) float64, the points whose density is computed.
        dtype: dtype of the denoiser's inputs.
        estimator: gives the trace at every node, with its denoiser.
        probes: probes of the trace; None where the trace is exact.
        low, high: log(sigma/alpha) at the ends.
        mean, variance: float64 moments of the data, for the prior.
        calls_before: the denoiser's `num_calls` before the integration.
        integration: the caller's options.
    """

    denoiser: Denoiser
    start: torch.Tensor
    dtype: torch.dtype
    estimator: FisherEstimator
    probes: Probes | None
    low: float
    high: float
    mean: torch.Tensor
    variance: torch.Tensor
    calls_before: int
    integration: Integration

    def evaluate(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns eps (B, ...), 1 - r (B,) and its value by each probe (k, B) at x~ = `x`, all float64."""
        level = self.denoiser.level(timestep)
        needs_graph = self.estimator.needs_graph
        with torch.set_grad_enabled(needs_graph):
            model_input = (expand(level.alpha, x) * x).to(self.dtype).requires_grad_(needs_graph)
            state = self.denoiser.state(model_input, timestep.to(torch.float32))
            estimate = self.estimator(state).trace(self.probes)
        self.integration.on_step()
        factor = (level.sigma**2 / x[0].numel()).to(x.device)
        return state.epsilon.detach().double(), factor * estimate.value, factor * estimate.values

    def select_samples(self, rows: torch.Tensor) -> OdeProblem:
        """Returns the problem of some of the samples, with the same draws; `rows` (n,) int64 are their places."""
        selected = self.denoiser.select_samples(rows)
        estimator = self.estimator.select_samples(
            rows, lambda each: selected if each is self.denoiser else each.select_samples(rows)
        )
        probes = (
            None if self.probes is None else dataclasses.replace(self.probes, vectors=self.probes.vectors[:, rows])
        )
        return dataclasses.replace(
            self, denoiser=selected, start=self.start[rows], estimator=estimator, probes=probes,
            calls_before=selected.num_calls,
        )  # fmt: skip

    def prior(self, x: torch.Tensor) -> torch.Tensor:
        """Returns log N(x; mean, variance + s^2) at the noise end, (B,) nats."""
        # Without validation: `integrate_log_likelihood` reports a path that is not finite, in words.
        deviation = (self.variance + math.exp(self.high) ** 2).sqrt()
        prior = torch.distributions.Normal(self.mean, deviation, validate_args=False)
        return prior.log_prob(x).flatten(1).sum(1)


@check_kinds
@dataclasses.dataclass(frozen=True)
class Integration:
    """Says how a log-likelihood is integrated, and of which density.

    Args:
        num_steps: number of steps of the grid in log(sigma/alpha), see `noise_grid`; at least 2.
        num_probes: number of Rademacher probes for Hutchinson's trace; None: the operator's exact trace (d products).
        prior_mean, prior_variance: moments of the data, which broadcast to one sample; None for both: 0 and 1
            ("standard").
        noised: whether to evaluate at `samples + s_0 * noise` instead of at `samples`.
        step_halving: whether to measure the discretisation error by half as many steps, for half as many evaluations
            again.
        generator: draws the probes, the place in the bins, and the noise of `noised`, in this order.
        scheme: "euler", "trapezoid", "adams3" or "adams4", of order 1 to 4.
        bins: number of equally spaced values from -1 to 1 on which the samples lie: each is moved to a random point of
            its bin, and `bits_per_dim` is that of the bins. None: that of the density.
        space: "latent" or "pixel", for the output.
        on_step: called after every evaluation.
        tolerance: bits/dim; each sample's grid is refined until its discretisation error is at most this. None: all
            samples have one grid of `num_steps`. With a tolerance that is the first grid, and every further grid has
            twice as many steps.
        max_denoiser_calls: largest number of evaluations per sample with a tolerance.
        on_grid: called with the number of evaluations of every grid after the first.
    """

    num_steps: int = 20
    num_probes: int | None = 2
    prior_mean: Moment = None
    prior_variance: Moment = None
    noised: bool = False
    step_halving: bool = False
    generator: Generators = None
    scheme: str = DEFAULT_SCHEME
    bins: int | None = None
    space: str = "latent"
    on_step: Callable[[], object] = lambda: None
    tolerance: float | None = None
    max_denoiser_calls: int = MAX_DENOISER_CALLS
    on_grid: Callable[[int], object] = lambda number: None


@check_kinds
def integrate_log_likelihood(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration | None = None
) -> LikelihoodOutput:
    """Integrates the log-likelihood of clean `samples` (B, ...) under the model behind `denoiser`.

    The probes are the same at every node. Cost: `num_steps + 1` evaluations with the estimator's trace at each; the
    error estimate needs no more. Where the estimate exceeds 0.05 bits/dim, a `CoarseGridWarning` says so.

    Args:
        denoiser: denoiser at guidance scale 1; a guided output is the score of no density.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every node, such as `AutodiffFisher()`; one without a denoiser gets this one.
        integration: how to integrate; None: `Integration()`.

    Raises:
        InputError: too few steps or probes, samples that are not finite or not on their bins, half a prior or one that
            does not fit, an unknown scheme, an estimator that needs a graph under `torch.inference_mode`, a trace
            model of another denoiser.
        NumericalError: a result that is not finite.
    """
    options = integration or Integration()
    scheme, steps, num_probes = scheme_of(options.scheme), options.num_steps, options.num_probes
    if steps < 2:
        raise InputError(f"`num_steps` is {steps}; allowed: at least 2, sensibly 20 or more.")
    if num_probes is not None and num_probes < 1:
        raise InputError(f"`num_probes` is {num_probes}; allowed: at least 1, or None for the exact trace.")
    check_refinement(options.tolerance, options.max_denoiser_calls, steps, options.step_halving)
    problem = prepare_problem(denoiser, samples, estimator, options)
    if options.tolerance is None:
        output = integrate(problem, steps, scheme)
    else:
        output = refine(
            lambda rows, number, foresight: integrate(problem.select_samples(rows), number, scheme, foresight),
            len(problem.start), steps, scheme, options.tolerance, options.max_denoiser_calls, options.on_grid,
        )  # fmt: skip
    if not torch.isfinite(output.log_prob).all():
        raise NumericalError(
            f"Log-likelihoods are not finite: {output.log_prob.tolist()}; unexplained noise fractions by noise level: "
            f"{output.unexplained_noise_fraction.tolist()}."
        )
    if options.step_halving:
        half = integrate(problem, steps // 2, scheme)
        if not torch.isfinite(half.log_prob).all():
            raise NumericalError(
                "Log-likelihoods with half as many steps are not finite, so the discretisation error can't be "
                "measured. Take more steps, or pass `step_halving=False`."
            )
        error, calls = (output.log_prob - half.log_prob).abs(), half.num_denoiser_calls
        output = dataclasses.replace(output, discretisation_error=error, num_denoiser_calls=calls)
    if not torch.isfinite(output.discretisation_error).all():
        raise NumericalError(
            f"The discretisation error's estimates are not finite: {output.discretisation_error.tolist()}. Take more "
            "steps."
        )
    _warn_of_coarse_grids(output, options)
    return output


def _warn_of_coarse_grids(output: LikelihoodOutput, options: Integration) -> None:
    worst = float(output.discretisation_error.max()) / (output.dims * math.log(2))
    unconverged = output.status.count(NOT_CONVERGED) if output.status is not None else 0
    if unconverged:
        message = (
            f"{unconverged} of {len(output.log_prob)} samples did not reach the tolerance of {options.tolerance:g} "
            f"bits/dim in {options.max_denoiser_calls} evaluations: their error is estimated at up to {worst:.3f}. "
            "`status` says which."
        )
    elif output.status is None and worst > COARSE:
        message = (
            f"The grid of {options.num_steps} steps is coarse: its error is estimated at up to {worst:.3f} bits/dim. "
            "Take more steps."
        )
    else:
        return
    # One level is this function, and one the check of kinds of the function that calls it.
    warnings.warn(message, CoarseGridWarning, stacklevel=4)


def prepare_problem(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration
) -> OdeProblem:
    """Checks what is to be integrated, and makes all random draws. Raises as `integrate_log_likelihood`."""
    samples, bins, generator = check_samples(samples), integration.bins, integration.generator
    check_generators(generator, len(samples))
    if integration.num_probes is not None and integration.num_probes > max(samples[0].numel(), MANY_PROBES):
        raise InputError(
            f"`num_probes` is {integration.num_probes} for samples of {samples[0].numel()} dimensions; pass None for "
            "the exact trace, which costs fewer products."
        )
    moments = check_prior(samples, integration.prior_mean, integration.prior_variance)
    if check_estimator(estimator).needs_graph and torch.is_inference_mode_enabled():
        raise InputError(
            f"{type(estimator).__name__} differentiates the denoiser, which torch.inference_mode forbids even inside "
            "enable_grad; use torch.no_grad instead, or FiniteDifferenceFisher, which needs no graph."
        )
    estimator = estimator.bind(denoiser)
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    count = integration.num_probes
    probes = None if count is None else rademacher(count, samples, generator)
    start = samples.double() if bins is None else dequantised(samples, bins, generator)
    if integration.noised:
        start = start + math.exp(low) * standard_noise(samples, generator)
    return OdeProblem(
        denoiser, start, samples.dtype, estimator, probes, low, high, *moments, denoiser.num_calls, integration
    )


def integrate(
    problem: OdeProblem, num_steps: int, scheme: Scheme, foresight: Foresight | None = None
) -> LikelihoodOutput:
    """Carries x~ over the `num_steps` steps of `noise_grid` and integrates 1 - r.

    The evaluations lie on a path that knows nothing of the trace. Two more solutions follow it by the same
    evaluations, moved to their own points by (1 - r)/s: one of the scheme's order, whose end is the result's, and its
    companion of another order. `_error` compares the two. `foresight` sees the predicted noise at every node.
    """
    grid = noise_grid(problem.low, problem.high, num_steps)
    timesteps, nodes = timestep_at(problem.denoiser.scheduler, grid), grid.tolist()
    x = problem.start
    epsilon, rest, by_probe = problem.evaluate(x, timesteps[0])
    if foresight is not None:
        foresight.add(nodes[0], epsilon)
    path = Track(x, epsilon, scheme.order)
    solution, companion = (Track(x, epsilon, order, linearised=True) for order in (scheme.order, scheme.companion))
    # The solution of higher order is the nearest to the true one: the trace's points are measured against it.
    best = solution if scheme.order > scheme.companion else companion
    rests, rests_by_probe, shifts = [rest], [by_probe], []
    for index in range(1, len(nodes)):
        point, previous = path.predict(nodes, index), path.x
        epsilon, rest, by_probe = problem.evaluate(point, timesteps[index])
        if foresight is not None:
            foresight.add(nodes[index], epsilon)
        slope = expand(rest.clamp(0, 1) / math.exp(nodes[index]), x)
        for track in (path, solution, companion):
            track.correct(nodes, index, point, epsilon, slope)
        shifts.append(_norm(best.x - point) / _norm(point - previous).clamp_min(torch.finfo(torch.float64).tiny))
        rests.append(rest)
        rests_by_probe.append(by_probe)
    values, dimensions = torch.stack(rests), x[0].numel()
    weights = quadrature_weights(grid, scheme.quadrature).to(x.device)
    prior = problem.prior(solution.x)
    prior_error = (problem.prior(companion.x) - prior).abs()
    return make_output(
        problem, problem.integration.scheme, final_latents=solution.x, prior_log_prob=prior,
        trace_log_prob=dimensions * torch.einsum("n,nb->b", weights, values),
        trace_by_probe=dimensions * torch.einsum("n,nkb->kb", weights, torch.stack(rests_by_probe)),
        unexplained_noise_fraction=1 - values, noise_to_signal=grid.exp(),
        discretisation_error=_error(prior_error, values, torch.stack(shifts), grid.to(x.device), scheme, dimensions),
    )  # fmt: skip


def _error(
    prior_error: torch.Tensor, rests: torch.Tensor, shifts: torch.Tensor, grid: torch.Tensor, scheme: Scheme,
    dimensions: int,
) -> torch.Tensor:  # fmt: skip
    """Estimates the size of the discretisation error, (B,) nats, from one run.

    The fractions below were set on Gaussians and mixtures: docs/likelihood.md tells the cases that the sum covers, and
    its size.

    Args:
        prior_error: (B,) nats, difference of the prior between the two solutions' ends: the error of the path.
        rests: (levels, B) 1 - r at the nodes.
        shifts: (levels - 1, B) distance of each point where the trace was taken from the solution, in steps.
        grid: (levels,) log s.
    """
    # The error of the trace's integral if r were exact: the difference from another quadrature of the same values.
    others = [quadrature_weights(grid.cpu(), points) for points in (scheme.quadrature, scheme.companion_quadrature)]
    quadrature = torch.einsum("n,nb->b", (others[0] - others[1]).to(rests.device), rests)
    # The error of r itself, which was taken beside the solution. How much r varies there is not known, but how much it
    # varies along the path is: a point that is off by a fraction of a step counts that fraction of the step's change
    # in r. The local variance v = s^2 r/(1 - r) tells a smooth change from a surprise: where log v (logit r + 2 log s)
    # grows or falls over a step as over the step before, the change of r was foreseeable.
    r = (1 - rests).clamp(1e-9, 1 - 1e-9)
    growth = (r.logit() + 2 * grid[:, None]).diff(dim=0)
    before = torch.nn.functional.pad(growth[:-1], (0, 0, 1, 0))
    steps = grid.diff()[:, None]
    surprise = (r[1:] - torch.sigmoid(r[:-1].logit() - 2 * steps + before)).abs()
    offsets = shifts * steps
    # On the cases that the fractions were set on, a twentieth of the whole change covers the error where r changes
    # smoothly; a surprise needs twice its size.
    smooth = (offsets * rests.diff(dim=0).abs()).sum(0) / 20
    # Where the companions are of lower order than the result, all but the surprise overstate the error, and the more
    # the finer the grid: on grids of steps below 3 in log s they count less (`Scheme.fine`).
    share = scheme.fine + (scheme.coarse - scheme.fine) * min(1.0, float(steps.max()) / 3)
    foreseeable = prior_error + dimensions * (quadrature.abs() + smooth)
    return share * foreseeable + 2 * dimensions * (offsets * surprise).sum(0)


def make_output(problem: OdeProblem, scheme: str, **tensors: torch.Tensor) -> LikelihoodOutput:
    """Makes the output of an integration, with its tensors on the CPU.

    Args:
        scheme: name of the way in which the problem was integrated.
        **tensors: the tensors of `LikelihoodOutput` by name, without `log_prob` and `standard_error`.
    """
    options, count = problem.integration, problem.integration.num_probes
    error = torch.zeros_like(tensors["trace_log_prob"])
    if count is not None:
        # A single probe has no spread to tell its error from.
        error = error + torch.inf if count == 1 else tensors["trace_by_probe"].std(0) / count**0.5
    tensors |= {"log_prob": tensors["prior_log_prob"] + tensors["trace_log_prob"], "standard_error": error}
    return LikelihoodOutput(
        **{name: tensor.cpu() for name, tensor in tensors.items()}, dims=problem.start[0].numel(),
        num_denoiser_calls=problem.denoiser.num_calls - problem.calls_before, space=options.space,
        prior="standard" if options.prior_mean is None else "moment-matched",
        density="noised" if options.noised else "smoothed", halved=options.step_halving, scheme=scheme,
        trace=f"{problem.estimator.description}, {'no' if count is None else count} probes",
        offset_bits=offset_bits(options.bins), status=None,
    )  # fmt: skip


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)


def standard_noise(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Draws standard normal noise in the shape and dtype of `like`, and returns it in float64."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype).double()


def check_samples(samples: torch.Tensor) -> torch.Tensor:
    """Returns `samples` (B, ...) in float32 or wider, detached. Raises `InputError` unless they are finite floats."""
    if samples.ndim < 2 or samples.numel() == 0:
        raise InputError(f"Samples have shape {tuple(samples.shape)}; allowed: (B, ...), a batch of at least one.")
    if not samples.is_floating_point() or not torch.isfinite(samples).all():
        raise InputError(
            f"Samples of shape {tuple(samples.shape)} and dtype {samples.dtype} must be finite floating-point "
            "numbers; NaN usually comes from images outside [0, 1] or a half-precision autoencoder."
        )
    return samples.detach().to(torch.promote_types(samples.dtype, torch.float32))


def check_prior(samples: torch.Tensor, mean: Moment, variance: Moment) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and variance of the data in float64, 0 and 1 where both are None.

    Raises:
        InputError: only one of them, values that do not broadcast to a sample, or that are not finite or negative.
    """
    if (mean is None) != (variance is None):
        raise InputError("Give both `prior_mean` and `prior_variance` (of the data), or neither for 0 and 1.")
    moments = (0.0, 1.0) if mean is None or variance is None else (mean, variance)
    mean, variance = (torch.as_tensor(value, dtype=torch.float64, device=samples.device) for value in moments)
    shape = tuple(samples.shape[1:])
    for name, value in (("prior_mean", mean), ("prior_variance", variance)):
        try:
            value.expand(shape)
        except RuntimeError:
            raise InputError(
                f"`{name}` has shape {tuple(value.shape)}; allowed: a number, or what broadcasts to {shape}."
            ) from None
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all() and (variance >= 0).all()):
        raise InputError("`prior_mean` must be finite, and `prior_variance` finite and not negative.")
    return mean, variance
