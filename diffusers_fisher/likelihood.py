"""Likelihood by the probability-flow ODE, integrated in log(sigma/alpha).

Notation: x~ = x/alpha, s = sigma/alpha; the ODE is dx~/d(log s) = x~ - E[x_0|x~, s], the same for every schedule
(Song et al., 2011.13456; Karras et al., 2206.00364). r = tr Cov[eps|x]/d, so tr F = d (1 - r)/sigma^2 and
log p~_{s_0}(x~_0) = log p~_{s_T}(x~_T) + d * integral of (1 - r) d(log s).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from diffusers.utils import BaseOutput

from .denoiser import Denoiser
from .errors import InputError, NumericalError
from .fisher.estimate import Probes, rademacher
from .fisher.operator import FisherEstimator
from .noise import expand, log_noise_to_signal_range, timestep_at


@dataclasses.dataclass
class LikelihoodOutput(BaseOutput):
    """Log-likelihoods of a batch, with what they are made of. All tensors float64 on the CPU.

    Args:
        log_prob: (B,) nats. The density is that of the model's data smoothed with noise of `noise_to_signal[0]`, in
            the coordinates of `space`, at the given point (or, where `density` is "noised", at a noised one).
        prior_log_prob: (B,) nats, the part of the noise end.
        trace_log_prob: (B,) nats, the part of the integrated trace; the two add up to `log_prob`.
        standard_error: (B,) nats, from the trace's probes; zero for exact traces, infinite for one probe.
        discretisation_error: (B,) nats, `log_prob` minus that of half as many steps; zero when not asked for.
        r: (levels, B) mean posterior variance of the noise, tr Cov[eps|x]/d.
        noise_to_signal: (levels,) sigma/alpha of the nodes, increasing.
        final_latents: (B, ...) x~ at the noise end, in units of the data.
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole batch, the halved run included.
        space: "latent" or "pixel".
        prior: "standard" (mean 0, variance 1 for the data at the noise end) or "moment-matched".
        density: "smoothed" or "noised".
        trace: how the trace was obtained.
        halved: whether `discretisation_error` was measured.
    """

    log_prob: torch.Tensor
    prior_log_prob: torch.Tensor
    trace_log_prob: torch.Tensor
    standard_error: torch.Tensor
    discretisation_error: torch.Tensor
    r: torch.Tensor
    noise_to_signal: torch.Tensor
    final_latents: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str
    prior: str
    density: str
    trace: str
    halved: bool

    @property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihood, (B,) nats."""
        return -self.log_prob

    @property
    def bits_per_dim(self) -> torch.Tensor:
        """-log_prob/(d ln 2), (B,) bits a dimension of `space`: lower is likelier. No offset is added."""
        return -self.log_prob / (self.dims * math.log(2))


@dataclasses.dataclass(frozen=True)
class _Path:
    """One integration from the data to the noise end."""

    end: torch.Tensor
    r: torch.Tensor
    trace: torch.Tensor
    per_probe: torch.Tensor
    noise_to_signal: torch.Tensor


def log_likelihood(
    denoiser: Denoiser,
    samples: torch.Tensor,
    estimator: FisherEstimator,
    num_steps: int = 20,
    num_probes: int | None = 2,
    prior_mean: torch.Tensor | float | None = None,
    prior_variance: torch.Tensor | float | None = None,
    noised: bool = False,
    step_halving: bool = True,
    generator: torch.Generator | None = None,
    space: str = "latent",
    on_step: Callable[[], None] = lambda: None,
) -> LikelihoodOutput:
    """Log-likelihood of clean `samples` (B, ...) under the model behind `denoiser`.

    Predictor-corrector of order two with one evaluation a node, x_0 linear in log s in the corrector; the probes are
    the same at every node. Cost: `num_steps + 1` evaluations with the estimator's trace at each, and half as many
    again with `step_halving`.

    Args:
        denoiser: at guidance scale 1; a guided output is the score of no density.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every node, such as `AutodiffFisher(denoiser)`.
        num_steps: steps of the grid, equal in log(sigma/alpha); at least 2.
        num_probes: Rademacher probes for Hutchinson's trace; None: the exact trace of the operator (d products).
        prior_mean, prior_variance: of the data, broadcastable to one sample; None for both: 0 and 1 ("standard").
        noised: evaluate at `samples + s_0 * noise` instead of at `samples`.
        step_halving: measure the discretisation error with half as many steps.
        generator: draws the probes, and the noise of `noised`.
        on_step: called after every evaluation.

    Raises:
        InputError: too few steps or probes, samples that are not finite, half a prior or one that does not fit, an
            estimator that needs a graph under `torch.inference_mode`.
        NumericalError: a result that is not finite.
    """
    _check(samples, num_steps, num_probes)
    _check_prior(samples, prior_mean, prior_variance)
    _check_grad_mode(estimator)
    samples = samples.detach().to(torch.promote_types(samples.dtype, torch.float32))
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    probes = None if num_probes is None else rademacher(num_probes, samples, generator)
    start = samples.double()
    if noised:
        from diffusers.utils.torch_utils import randn_tensor

        noise = randn_tensor(samples.shape, generator=generator, device=samples.device, dtype=samples.dtype)
        start = start + math.exp(low) * noise.double()
    before = denoiser.num_calls

    def integrate(steps: int) -> _Path:
        grid = torch.linspace(low, high, steps + 1, dtype=torch.float64)
        return _integrate(denoiser, start, samples.dtype, estimator, probes, grid, on_step)

    path = integrate(num_steps)
    halved = integrate(num_steps // 2) if step_halving else None
    moments = (0.0, 1.0) if prior_mean is None or prior_variance is None else (prior_mean, prior_variance)
    return LikelihoodOutput(
        **_figures(path, halved, moments, num_probes), dims=samples[0].numel(), space=space,
        num_denoiser_calls=denoiser.num_calls - before, density="noised" if noised else "smoothed",
        prior="standard" if prior_mean is None else "moment-matched", halved=step_halving,
        trace=f"{type(estimator).__name__}, " + ("exact" if num_probes is None else f"{num_probes} probes"),
    )  # fmt: skip


def _figures(path: _Path, halved: _Path | None, moments: tuple[Any, Any], num_probes: int | None) -> dict[str, Any]:
    """The output's tensors, on the CPU. Raises `NumericalError` where a likelihood is not finite."""

    def prior_of(run: _Path) -> torch.Tensor:
        return _prior_log_prob(run.end, *moments, float(run.noise_to_signal[-1]))

    prior = prior_of(path)
    total = prior + path.trace
    if not torch.isfinite(total).all():
        raise NumericalError(f"Log-likelihoods are not finite: {total.tolist()}; r by noise level: {path.r.tolist()}.")
    difference = torch.zeros_like(total) if halved is None else total - prior_of(halved) - halved.trace
    if not torch.isfinite(difference).all():
        raise NumericalError(
            "Log-likelihoods with half as many steps are not finite, so the discretisation error can't be measured. "
            "Take more steps, or pass `step_halving=False`."
        )
    tensors = {
        "log_prob": total, "prior_log_prob": prior, "trace_log_prob": path.trace, "r": path.r,
        "standard_error": _standard_error(path, num_probes), "discretisation_error": difference,
        "noise_to_signal": path.noise_to_signal, "final_latents": path.end,
    }  # fmt: skip
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _check(samples: torch.Tensor, num_steps: int, num_probes: int | None) -> None:
    if num_steps < 2:
        raise InputError(f"`num_steps` is {num_steps}; allowed: at least 2, sensibly 20 or more.")
    if num_probes is not None and num_probes < 1:
        raise InputError(f"`num_probes` is {num_probes}; allowed: at least 1, or None for the exact trace.")
    if samples.ndim < 2 or samples.numel() == 0:
        raise InputError(f"Samples have shape {tuple(samples.shape)}; allowed: (B, ...), a batch of at least one.")
    if not samples.is_floating_point() or not torch.isfinite(samples).all():
        raise InputError(
            f"Samples of shape {tuple(samples.shape)} and dtype {samples.dtype} must be finite floating-point "
            "numbers; NaN usually comes from images outside [0, 1] or a half-precision autoencoder."
        )


def _check_prior(samples: torch.Tensor, mean: Any, variance: Any) -> None:
    if (mean is None) != (variance is None):
        raise InputError("Give both `prior_mean` and `prior_variance` (of the data), or neither for 0 and 1.")
    if mean is None:
        return
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


def _check_grad_mode(estimator: FisherEstimator) -> None:
    if getattr(estimator, "needs_graph", False) and torch.is_inference_mode_enabled():
        raise InputError(
            f"{type(estimator).__name__} differentiates the denoiser, which torch.inference_mode forbids even inside "
            "enable_grad; use torch.no_grad instead, or FiniteDifferenceFisher, which needs no graph."
        )


def _integrate(
    denoiser: Denoiser,
    start: torch.Tensor,
    dtype: torch.dtype,
    estimator: FisherEstimator,
    probes: Probes | None,
    grid: torch.Tensor,
    on_step: Callable[[], None],
) -> _Path:
    """Carries x~ from `grid[0]` to `grid[-1]` and integrates 1 - r by the trapezoidal rule."""
    timesteps = timestep_at(denoiser.scheduler, grid)
    x = start
    original, one_minus_r, per_probe = _evaluate(denoiser, x, dtype, estimator, probes, timesteps[0])
    on_step()
    values, trace, trace_per_probe = [one_minus_r], torch.zeros_like(one_minus_r), torch.zeros_like(per_probe)
    for index in range(1, len(grid)):
        step = float(grid[index] - grid[index - 1])
        growth = math.expm1(step)
        predicted = x + growth * (x - original)
        before = original, one_minus_r, per_probe
        original, one_minus_r, per_probe = _evaluate(denoiser, predicted, dtype, estimator, probes, timesteps[index])
        # Exact for x_0 linear in log s: the correction is the slope's part of the integral of e^(h-u) x_0(u).
        x = predicted - (growth - step) / step * (original - before[0])
        trace = trace + 0.5 * step * (one_minus_r + before[1])
        trace_per_probe = trace_per_probe + 0.5 * step * (per_probe + before[2])
        values.append(one_minus_r)
        on_step()
    dimensions = start[0].numel()
    return _Path(x, 1 - torch.stack(values), dimensions * trace, dimensions * trace_per_probe, grid.exp())


def _evaluate(
    denoiser: Denoiser,
    x: torch.Tensor,
    dtype: torch.dtype,
    estimator: FisherEstimator,
    probes: Probes | None,
    timestep: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """E[x_0|x] (B, ...), 1 - r (B,) and its value by each probe (k, B) at x~ = `x`, all float64."""
    level = denoiser.level(timestep)
    needs_graph = getattr(estimator, "needs_graph", False)
    with torch.set_grad_enabled(needs_graph):
        model_input = (expand(level.alpha, x) * x).to(dtype).requires_grad_(needs_graph)
        state = denoiser.state(model_input, timestep.to(torch.float32))
        estimate = estimator(state).trace(probes)
    factor = (level.sigma**2 / x[0].numel()).to(x.device)
    original = state.pred_original_sample.detach().double()
    return original, factor * estimate.value, factor * estimate.values


def _prior_log_prob(
    x: torch.Tensor, mean: torch.Tensor | float, variance: torch.Tensor | float, noise_to_signal: float
) -> torch.Tensor:
    """log N(x; mean, variance + s^2), (B,) nats."""
    mean, variance = (torch.as_tensor(value, dtype=torch.float64, device=x.device) for value in (mean, variance))
    # Without validation: a path that is not finite is reported by `_figures`, in words.
    prior = torch.distributions.Normal(mean, (variance + noise_to_signal**2).sqrt(), validate_args=False)
    return prior.log_prob(x).flatten(1).sum(1)


def _standard_error(path: _Path, num_probes: int | None) -> torch.Tensor:
    if num_probes is None:
        return torch.zeros_like(path.trace)
    if num_probes == 1:
        return torch.full_like(path.trace, float("inf"))
    return path.per_probe.std(0) / num_probes**0.5
