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
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import CoarseGridWarning, InputError, NumericalError
from ..fisher.estimate import Generators, Probes, rademacher
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.numerics import per_sample
from ..noise import expand, log_noise_to_signal_range, timestep_at
from .bins import dequantised, offset_bits
from .output import LikelihoodOutput
from .schemes import DEFAULT_SCHEME, Scheme, Track, noise_grid, quadrature_weights, scheme_of

COARSE = 0.05
"""Discretisation error, in bits/dim, above which a likelihood warns."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a likelihood is asked of.

    Args:
        denoiser: at guidance scale 1; a guided output is the score of no density.
        start: (B, ...) float64, the point.
        dtype: of the denoiser's inputs.
        estimator: gives the trace at every node, with its denoiser.
        probes: of the trace; None where exact.
        low, high: log(sigma/alpha) at the ends.
        mean, variance: of the data, for the prior.
    """

    denoiser: Denoiser
    start: torch.Tensor
    dtype: torch.dtype
    estimator: FisherEstimator
    probes: Probes | None
    low: float
    high: float
    mean: torch.Tensor | float
    variance: torch.Tensor | float

    def evaluate(self, x: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """eps (B, ...), 1 - r (B,) and its value by each probe (k, B) at x~ = `x`, all float64."""
        level = self.denoiser.level(timestep)
        needs_graph = self.estimator.needs_graph
        with torch.set_grad_enabled(needs_graph):
            model_input = (expand(level.alpha, x) * x).to(self.dtype).requires_grad_(needs_graph)
            state = self.denoiser.state(model_input, timestep.to(torch.float32))
            estimate = self.estimator(state).trace(self.probes)
        factor = (level.sigma**2 / x[0].numel()).to(x.device)
        return state.epsilon.detach().double(), factor * estimate.value, factor * estimate.values

    def prior(self, x: torch.Tensor) -> torch.Tensor:
        """log N(x; mean, variance + s^2) at the noise end, (B,) nats."""
        return prior_log_prob(x, self.mean, self.variance, math.exp(self.high))


@dataclasses.dataclass(frozen=True)
class Path:
    """One integration from the data to the noise end. The errors are by part, (B,) nats, not negative."""

    end: torch.Tensor
    prior: torch.Tensor
    trace: torch.Tensor
    per_probe: torch.Tensor
    r: torch.Tensor
    grid: torch.Tensor
    error: torch.Tensor

    @property
    def log_prob(self) -> torch.Tensor:
        return self.prior + self.trace


@dataclasses.dataclass(frozen=True)
class Integration:
    """How a log-likelihood is integrated, and what density it is of.

    Args:
        num_steps: steps of the grid in log(sigma/alpha), see `noise_grid`; at least 2.
        num_probes: Rademacher probes for Hutchinson's trace; None: the exact trace of the operator (d products).
        prior_mean, prior_variance: of the data, broadcastable to one sample; None for both: 0 and 1 ("standard").
        noised: evaluate at `samples + s_0 * noise` instead of at `samples`.
        step_halving: measure the discretisation error by half as many steps, for half as many evaluations again.
        generator: draws the probes, the place in the bins, and the noise of `noised`, in this order.
        scheme: "euler", "trapezoid", "adams3" or "adams4", of order 1 to 4.
        bins: the samples lie on so many equally spaced values from -1 to 1: each is moved to a random point of its
            bin, and `bits_per_dim` is that of the bins.
        space: "latent" or "pixel", for the output.
        on_step: called after every evaluation.
    """

    num_steps: int = 20
    num_probes: int | None = 2
    prior_mean: torch.Tensor | float | None = None
    prior_variance: torch.Tensor | float | None = None
    noised: bool = False
    step_halving: bool = False
    generator: Generators = None
    scheme: str = DEFAULT_SCHEME
    bins: int | None = None
    space: str = "latent"
    on_step: Callable[[], object] = lambda: None


def integrate_log_likelihood(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration | None = None
) -> LikelihoodOutput:
    """Integrates the log-likelihood of clean `samples` (B, ...) under the model behind `denoiser`.

    The probes are the same at every node. Cost: `num_steps + 1` evaluations with the estimator's trace at each; the
    error estimate needs no more. Where the estimate exceeds 0.05 bits/dim, a `CoarseGridWarning` says so.

    Args:
        denoiser: at guidance scale 1; a guided output is the score of no density.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every node, such as `AutodiffFisher()`; one without a denoiser gets this one.
        integration: how; None: `Integration()`.

    Raises:
        InputError: too few steps or probes, samples that are not finite or not on their bins, half a prior or one that
            does not fit, an unknown scheme, an estimator that needs a graph under `torch.inference_mode`, a trace
            model of another denoiser.
        NumericalError: a result that is not finite.
    """
    chosen = integration or Integration()
    scheme, steps = scheme_of(chosen.scheme), chosen.num_steps
    problem = _problem(denoiser, samples, estimator, chosen)
    before = denoiser.num_calls
    path = integrate(problem, steps, scheme, chosen.on_step)
    error = path.error
    if chosen.step_halving:
        half = integrate(problem, steps // 2, scheme, chosen.on_step)
        error = (_finite(path) - _finite(half, halved=True)).abs()
    probes = "no probes" if chosen.num_probes is None else f"{chosen.num_probes} probes"
    output = LikelihoodOutput(
        **_figures(path, error, chosen.num_probes), dims=samples[0].numel(), space=chosen.space,
        num_denoiser_calls=denoiser.num_calls - before, density="noised" if chosen.noised else "smoothed",
        prior="standard" if chosen.prior_mean is None else "moment-matched", halved=chosen.step_halving,
        trace=f"{problem.estimator.description}, {probes}", scheme=chosen.scheme, offset_bits=offset_bits(chosen.bins),
    )  # fmt: skip
    _warn_if_coarse(output)
    return output


def _problem(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration
) -> Problem:
    """What is to be integrated, checked, with all random draws made."""
    generator, bins = integration.generator, integration.bins
    _check(samples, integration.num_steps, integration.num_probes)
    moments = checked_prior(samples, integration.prior_mean, integration.prior_variance)
    estimator = bind_estimator(estimator, denoiser)
    samples = samples.detach().to(torch.promote_types(samples.dtype, torch.float32))
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    count = integration.num_probes
    probes = None if count is None else rademacher(count, samples, generator)
    start = samples.double() if bins is None else dequantised(samples, bins, generator)
    if integration.noised:
        start = start + math.exp(low) * _noise(samples, generator)
    return Problem(denoiser, start, samples.dtype, estimator, probes, low, high, *moments)


def integrate(problem: Problem, num_steps: int, scheme: Scheme, on_step: Callable[[], object] = lambda: None) -> Path:
    """Carries x~ over the `num_steps` steps of `noise_grid` and integrates 1 - r.

    The evaluations lie on a path that knows nothing of the trace. Two more solutions follow it by the same
    evaluations, moved to their own points by (1 - r)/s: one of the scheme's order, whose end is the result's, and its
    companion of another. See `_error`.
    """
    grid = noise_grid(problem.low, problem.high, num_steps)
    timesteps, nodes = timestep_at(problem.denoiser.scheduler, grid), grid.tolist()
    x = problem.start
    epsilon, rest, by_probe = problem.evaluate(x, timesteps[0])
    on_step()
    path = Track(x, epsilon, scheme.order)
    refined, companion = (Track(x, epsilon, order, linearised=True) for order in (scheme.order, scheme.companion))
    best = refined if scheme.order > scheme.companion else companion
    rests, all_by_probe, shifts = [rest], [by_probe], []
    for index in range(1, len(nodes)):
        at, previous = path.predict(nodes, index), path.x
        epsilon, rest, by_probe = problem.evaluate(at, timesteps[index])
        on_step()
        slope = per_sample(rest.clamp(0, 1) / math.exp(nodes[index]), x)
        for track in (path, refined, companion):
            track.correct(nodes, index, at, epsilon, slope)
        shifts.append(_norm(best.x - at) / _norm(at - previous).clamp_min(torch.finfo(torch.float64).tiny))
        rests.append(rest)
        all_by_probe.append(by_probe)
    values, dimensions = torch.stack(rests), x[0].numel()
    weights = quadrature_weights(grid, scheme.quadrature).to(x.device)
    prior = problem.prior(refined.x)
    return Path(
        refined.x, prior, dimensions * torch.einsum("n,nb->b", weights, values),
        dimensions * torch.einsum("n,nkb->kb", weights, torch.stack(all_by_probe)), 1 - values, grid,
        _error(
            prior, problem.prior(companion.x), values, torch.stack(shifts), grid.to(x.device), scheme, dimensions
        ),
    )  # fmt: skip


def _error(
    prior: torch.Tensor,
    companion: torch.Tensor,
    rests: torch.Tensor,
    shifts: torch.Tensor,
    grid: torch.Tensor,
    scheme: Scheme,
    dimensions: int,
) -> torch.Tensor:
    """Size of the discretisation error, (B,) nats, from one run.

    Its parts: the prior at the companion's end; the trace's integral by another quadrature; and for the trace, which
    was taken at points a `shifts` of a step beside the solution, twice that part of what r changed over the step
    beyond what the step before foretold (local variances v = s^2 r/(1 - r) that keep growing or falling as they did),
    and a twentieth of that part of its whole change. Where all but the surprise are of lower order than the error
    they overstate it more the finer the grid: of steps below 3 in log s they count less (`Scheme.fine`). The fractions
    were set on Gaussians and mixtures: docs/likelihood.md tells the cases that the sum then covers, and its size.
    """
    others = [quadrature_weights(grid.cpu(), points) for points in (scheme.quadrature, scheme.companion_quadrature)]
    quadrature = torch.einsum("n,nb->b", (others[0] - others[1]).to(rests.device), rests)
    r = (1 - rests).clamp(1e-9, 1 - 1e-9)
    growth = (r.logit() + 2 * grid[:, None]).diff(dim=0)
    before = torch.nn.functional.pad(growth[:-1], (0, 0, 1, 0))
    steps = grid.diff()[:, None]
    surprise = (r[1:] - torch.sigmoid(r[:-1].logit() - 2 * steps + before)).abs()
    aside = shifts * steps
    share = scheme.fine + (scheme.coarse - scheme.fine) * min(1.0, float(steps.max()) / 3)
    lower = (companion - prior).abs() + dimensions * (quadrature.abs() + (aside * rests.diff(dim=0).abs()).sum(0) / 20)
    return share * lower + 2 * dimensions * (aside * surprise).sum(0)


def _figures(path: Path, error: torch.Tensor, num_probes: int | None) -> dict[str, Any]:
    """The output's tensors, on the CPU. Raises `NumericalError` where a likelihood or its error is not finite."""
    total = _finite(path)
    if not torch.isfinite(error).all():
        raise NumericalError(
            f"The discretisation error's estimates are not finite: {error.tolist()}. Take more steps."
        )
    tensors = {
        "log_prob": total, "prior_log_prob": path.prior, "trace_log_prob": path.trace, "r": path.r,
        "standard_error": _standard_error(path, num_probes), "discretisation_error": error,
        "noise_to_signal": path.grid.exp(), "final_latents": path.end, "trace_by_probe": path.per_probe,
    }  # fmt: skip
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _finite(path: Path, halved: bool = False) -> torch.Tensor:
    total = path.log_prob
    if torch.isfinite(total).all():
        return total
    if halved:
        raise NumericalError(
            "Log-likelihoods with half as many steps are not finite, so the discretisation error can't be measured. "
            "Take more steps, or pass `step_halving=False`."
        )
    raise NumericalError(f"Log-likelihoods are not finite: {total.tolist()}; r by noise level: {path.r.tolist()}.")


def _warn_if_coarse(output: LikelihoodOutput) -> None:
    worst = float(output.discretisation_error.max()) / (output.dims * math.log(2))
    if worst > COARSE:
        warnings.warn(
            f"The grid of {len(output.noise_to_signal) - 1} steps is coarse: its error is estimated at up to "
            f"{worst:.3f} bits/dim. Take more steps.",
            CoarseGridWarning,
            stacklevel=3,
        )


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)


def _noise(samples: torch.Tensor, generator: Generators) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype).double()


def _check(samples: torch.Tensor, num_steps: int, num_probes: int | None) -> None:
    if num_steps < 2:
        raise InputError(f"`num_steps` is {num_steps}; allowed: at least 2, sensibly 20 or more.")
    if num_probes is not None and num_probes < 1:
        raise InputError(f"`num_probes` is {num_probes}; allowed: at least 1, or None for the exact trace.")
    check_samples(samples)


def check_samples(samples: torch.Tensor) -> None:
    """Raises `InputError` unless `samples` are a batch of finite floats."""
    if samples.ndim < 2 or samples.numel() == 0:
        raise InputError(f"Samples have shape {tuple(samples.shape)}; allowed: (B, ...), a batch of at least one.")
    if not samples.is_floating_point() or not torch.isfinite(samples).all():
        raise InputError(
            f"Samples of shape {tuple(samples.shape)} and dtype {samples.dtype} must be finite floating-point "
            "numbers; NaN usually comes from images outside [0, 1] or a half-precision autoencoder."
        )


def checked_prior(samples: torch.Tensor, mean: Any, variance: Any) -> tuple[Any, Any]:
    """Mean and variance of the data, 0 and 1 where neither is given. Raises `InputError` where they do not fit."""
    if (mean is None) != (variance is None):
        raise InputError("Give both `prior_mean` and `prior_variance` (of the data), or neither for 0 and 1.")
    if mean is None:
        return 0.0, 1.0
    shape = tuple(samples.shape[1:])
    mean, variance = torch.as_tensor(mean), torch.as_tensor(variance)
    for name, value in (("prior_mean", mean), ("prior_variance", variance)):
        sizes = tuple(value.shape)
        fits = len(sizes) <= len(shape) and all(
            size in (1, full) for size, full in zip(reversed(sizes), reversed(shape), strict=False)
        )
        if not fits:
            raise InputError(f"`{name}` has shape {sizes}; allowed: a number, or what broadcasts to {shape}.")
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all() and (variance >= 0).all()):
        raise InputError("`prior_mean` must be finite, and `prior_variance` finite and not negative.")
    return mean, variance


def bind_estimator(estimator: FisherEstimator, denoiser: Denoiser) -> FisherEstimator:
    """Returns the estimator with `denoiser` where it has none.

    Raises:
        InputError: something else than an estimator, one that needs a graph under `torch.inference_mode`, or a trace
            model of another denoiser.
    """
    if check_estimator(estimator).needs_graph and torch.is_inference_mode_enabled():
        raise InputError(
            f"{type(estimator).__name__} differentiates the denoiser, which torch.inference_mode forbids even inside "
            "enable_grad; use torch.no_grad instead, or FiniteDifferenceFisher, which needs no graph."
        )
    return estimator.bind(denoiser)


def prior_log_prob(
    x: torch.Tensor, mean: torch.Tensor | float, variance: torch.Tensor | float, noise_to_signal: float
) -> torch.Tensor:
    """log N(x; mean, variance + s^2), (B,) nats."""
    mean, variance = (torch.as_tensor(value, dtype=torch.float64, device=x.device) for value in (mean, variance))
    # Without validation: a path that is not finite is reported by `_finite`, in words.
    prior = torch.distributions.Normal(mean, (variance + noise_to_signal**2).sqrt(), validate_args=False)
    return prior.log_prob(x).flatten(1).sum(1)


def _standard_error(path: Path, num_probes: int | None) -> torch.Tensor:
    if num_probes is None:
        return torch.zeros_like(path.trace)
    if num_probes == 1:
        return torch.full_like(path.trace, float("inf"))
    return path.per_probe.std(0) / num_probes**0.5
