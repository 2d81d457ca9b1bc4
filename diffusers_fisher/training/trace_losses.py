"""Defines trace matching: the targets of a trace model, its noise levels and its loss.

Notation: x_t = alpha x_0 + sigma eps, M = Cov[eps|x_t], r = tr M/d, J the Jacobian of the predicted noise, which for a
perfect denoiser is (I - M)/sigma. Three targets y (Wang et al., ICML 2025, arXiv 2505.23264 for "norm"; the residual
of one pixel is NPR of Bao et al., 2206.07309):

- "residual": |eps - eps_theta|^2/d. E[y|x_t] = r + |bias of eps_theta|^2/d: second order in the denoiser's error.
- "jacobian": 1 - sigma v^T J v/d with random signs v. E[y|x_t] = 1 - sigma tr J/d is the denoiser's own divergence,
  which gives the likelihood of its own ODE.
- "norm": |x_0|^2/d. E[y|x_t] and the denoiser's x_0 give r by a difference of nearly equal numbers.

The losses are Bregman divergences, so the minimum is at E[y|x_t] for every law of y. "residual" and "jacobian" use
the Itakura-Saito divergence (the negative log-likelihood of a Gamma variable, which y nearly is) on both sides,
log r + y/r + log(1-r) + (1-y)/(1-r). So relative errors of r at large noise and of 1 - r at small noise count alike.
A likelihood integrates r itself over log(sigma/alpha). For its sake (r - y)^2, another Bregman divergence, can be
added.

Every draw depends on the seed, the step and the sample's place in the global batch alone, so neither the number of
processes nor a resumption changes it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..denoiser import Denoiser
from ..distributions.covariance import DCTBasis
from ..errors import InputError, NumericalError
from ..fisher import FisherEstimator, FisherOperator
from ..fisher.numerics import dot
from ..models import FisherTraceOutput, trace_inputs
from ..noise import DenoisingState, expand, log_noise_to_signal_at, log_noise_to_signal_range, timestep_at
from ..seeds import step_generator

FLOORS = {"residual": 1e-3, "jacobian": 1e-2}
"""These numbers are added to both sides of the scale-free loss, so that smaller r and 1 - r count by their absolute
error. Probes of a learned Jacobian may give y below 0 or above 1, by less than this on average."""


@dataclasses.dataclass(frozen=True)
class TraceDraw:
    """Random numbers of some samples of a global batch.

    With two rows per sample, the noise of the second half of the rows is `mirrored_noise` of the first half.

    Args:
        log_noise: (n,) float64, log(sigma/alpha).
        noise: (n, ...) standard normal.
        copies: rows per sample, 1 or 2.
        probes: (n, ...) random signs, or None.
    """

    log_noise: torch.Tensor
    noise: torch.Tensor
    copies: int = 1
    probes: torch.Tensor | None = None

    def repeat(self, samples: torch.Tensor) -> torch.Tensor:
        """Repeats one entry per sample to one entry per row of the draw."""
        return torch.cat([samples] * self.copies)


def draw_trace_batch(
    scheduler: SchedulerMixin,
    shape: tuple[int, ...],
    batch_size: int,
    step: int,
    seed: int,
    part: slice = slice(None),
    mirrored: bool = True,
    with_probes: bool = False,
) -> TraceDraw:
    """Draws random numbers for the samples `part` of the global batch of `step`, on the CPU.

    Args:
        scheduler: the scheduler whose range of noise levels is used.
        shape: shape of one sample.
        batch_size: samples of the global batch, over all processes and accumulated pieces.
        part: this process's (or piece's) part of the global batch.
        mirrored: whether to make two rows per sample, with noise and `mirrored_noise`. Use them for "residual": at
            small noise 1 - r is small, but the fluctuation of |eps|^2/d is not. It cancels in the mean of the two.
        with_probes: whether to draw probes too, for "jacobian".

    Raises:
        InputError: the batch is empty.
    """
    positions = range(batch_size)[part]
    if not positions:
        raise InputError(f"The batch has {batch_size} samples, {len(positions)} of them here; allowed: 1 or more.")
    copies = 2 if mirrored else 1
    levels = draw_log_noise(scheduler, batch_size, step_generator(seed, "levels", step))[part]
    generators = [step_generator(seed, "noise", step * batch_size + position) for position in positions]
    noise = randn_tensor((len(generators), *shape), generators)
    draw = TraceDraw(levels.repeat(copies), torch.cat([noise, mirrored_noise(noise)]) if mirrored else noise, copies)
    if not with_probes:
        return draw
    bits = [torch.randint(0, 2, (copies, *shape), generator=each, dtype=torch.uint8) for each in generators]
    return dataclasses.replace(draw, probes=2.0 * torch.stack(bits, dim=1).flatten(0, 1) - 1)


def draw_log_noise(
    scheduler: SchedulerMixin, count: int, generator: torch.Generator, log_fraction: float = 0.5
) -> torch.Tensor:
    """Draws `count` noise levels log(sigma/alpha), float64.

    A fraction `log_fraction` of them is uniform in log(sigma/alpha), the rest is uniform in t. Every `count`-th part
    of the range has one level, and the order is random. Half of each covers both the small noise, at which the trace
    is hard to learn, and the levels that samplers visit.
    """
    order = torch.randperm(count, generator=generator)
    uniform = (order + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    low, high = log_noise_to_signal_range(scheduler)
    by_log = low + (high - low) * (uniform / max(log_fraction, 1e-12)).clamp(max=1)
    ends = timestep_at(scheduler, torch.tensor([low, high], dtype=torch.float64))
    share = ((uniform - log_fraction) / max(1 - log_fraction, 1e-12)).clamp(0, 1)
    by_time = log_noise_to_signal_at(scheduler, ends[0] + (ends[1] - ends[0]) * share)
    return torch.where(uniform < log_fraction, by_log, by_time.clamp(low, high))


def mirrored_noise(noise: torch.Tensor) -> torch.Tensor:
    """Returns standard normal noise of the opposite direction and the opposite quantile of the norm, (n, ...).

    Its law is exactly that of `noise`. The squared norms of the two nearly add up to 2 d: the relative standard
    deviation of the sum is 1/d instead of 1/sqrt(d), by the skewness of chi-square. Terms linear in the noise cancel.
    """
    import numpy
    from scipy.special import chdtr, chdtri

    dimensions = noise[0].numel()
    squared = dot(noise, noise)
    quantile = numpy.clip(chdtr(dimensions, squared.cpu().numpy()), 1e-15, 1 - 1e-15)
    factor = torch.from_numpy(numpy.sqrt(chdtri(dimensions, quantile))).to(squared) / squared.sqrt()
    return -expand(factor, noise) * noise


def noised_state(denoiser: Denoiser, clean: torch.Tensor, draw: TraceDraw, with_graph: bool = False) -> DenoisingState:
    """Evaluates the denoiser at alpha x_0 + sigma eps for every row of `draw`. Cost: one evaluation of the batch.

    Args:
        denoiser: a denoiser that takes a batch of timesteps, at guidance scale 1.
        clean: x_0 of every row (see `TraceDraw.repeat`), on the denoiser's device.
        with_graph: whether to keep the graph from the sample to the output (for estimators with `needs_graph`).

    Raises:
        NumericalError: the denoiser's output is not finite.
    """
    timesteps = timestep_at(denoiser.scheduler, draw.log_noise)
    level = denoiser.level(timesteps)
    noise = draw.noise.to(clean.device, clean.dtype)
    with torch.set_grad_enabled(with_graph):
        x = (expand(level.alpha, clean) * clean + expand(level.sigma, noise) * noise).to(clean.dtype).detach()
        state = denoiser.state(x.requires_grad_(with_graph), timesteps.to(clean.device, torch.float32))
    if not bool(torch.isfinite(state.model_output).all()):
        raise NumericalError("The denoiser's output is not finite; half-precision weights are the usual cause.")
    return state


# Targets


def norm_target(clean: torch.Tensor) -> torch.Tensor:
    """Returns |x_0|^2/d of clean samples (B, ...), (B,) float32."""
    return clean.float().square().flatten(1).mean(1)


def residual_target(state: DenoisingState, noise: torch.Tensor, basis: str | None = None) -> torch.Tensor:
    """Returns |eps - eps_theta|^2/d, (B,) float32; with a `basis` ("pixel", "dct") one square per coordinate."""
    error = noise.to(state.sample) - state.epsilon.detach()
    return _average(_to_basis(error, basis).square(), basis)


def jacobian_target(operator: FisherOperator, probes: torch.Tensor, basis: str | None = None) -> torch.Tensor:
    """Returns 1 - sigma v^T J v/d with random signs v (B, ...), (B,) float32; with a `basis` one value per coordinate.

    Probes are signs of coordinates of the basis. Cost: one product of `operator`, by the estimator's way:
    `AutodiffFisher(denoiser)` backward, `AutodiffFisher(denoiser, forward_mode=True)` forward, or
    `FiniteDifferenceFisher(denoiser)`. The first two are unbiased. Values may lie outside [0, 1].
    """
    v = _from_basis(probes.to(operator.state.sample), basis)
    variance = operator.state.level.sigma**2
    with torch.no_grad():
        product = operator.matvec(v)
        forms = _to_basis(v, basis).double() * _to_basis(product, basis).double()
    return _average(1 - expand(variance, forms) * forms, basis)


# Losses


def scale_free_loss(logits: torch.Tensor, target: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """Returns log r + y/r + log(1-r) + (1-y)/(1-r) for every entry, from the logits of r.

    `floor` is added to r, y, 1 - r and 1 - y. The only stationary point of the expectation is a minimum at r = E[y],
    also where y is negative.
    """
    return _half_loss(torch.sigmoid(logits), target, floor) + _half_loss(torch.sigmoid(-logits), 1 - target, floor)


def trace_loss(
    output: FisherTraceOutput, target: torch.Tensor, floor: float = 0.0, squared_weight: float = 0.0
) -> torch.Tensor:
    """Returns the loss of every sample, (B,): squared error for second moments, `scale_free_loss` for r.

    For a diagonal it is the loss of the mean, so that the trace is right, plus the mean over coordinates of
    log r_i + y_i/r_i.

    Args:
        target: (B,), or (B, ...) for a diagonal.
        squared_weight: weight of (r - y)^2 of the trace, which is added to the loss of r.

    Raises:
        InputError: the target has another shape than the model's output.
    """
    prediction = output.second_moment if output.logits is None else output.logits
    if prediction is None or prediction.shape != target.shape:
        got = None if prediction is None else tuple(prediction.shape)
        raise InputError(
            f"The model's output has shape {got}, the target {tuple(target.shape)}; they must agree: a diagonal model "
            "takes the target of every coordinate, `basis=model.config.basis`."
        )
    target = target.float()
    if output.logits is None:
        return (prediction - target).square()
    if prediction.ndim == 1:
        squared = (torch.sigmoid(prediction) - target).square()
        return scale_free_loss(prediction, target, floor) + squared_weight * squared
    r, rest, y = (each.flatten(1) for each in (torch.sigmoid(prediction), torch.sigmoid(-prediction), target))
    means = _half_loss(r.mean(1), y.mean(1), floor) + _half_loss(rest.mean(1), 1 - y.mean(1), floor)
    return means + _half_loss(r, y, floor).mean(1) + squared_weight * (r.mean(1) - y.mean(1)).square()


class TraceObjective:
    """The loss of one training step for a trace model of any target.

    Args:
        config: config of the model, which gives its target, and the basis of a diagonal.
        estimator: the estimator that gives v^T J v for "jacobian", such as `AutodiffFisher(denoiser)`.
        squared_weight: see `trace_loss`.

    Raises:
        InputError: "jacobian" has no estimator.
    """

    def __init__(
        self, config: Mapping[str, Any], estimator: FisherEstimator | None = None, squared_weight: float = 0.0
    ):
        self.target: str = config["target"]
        self.basis: str | None = config["basis"] if config["output"] == "diagonal" else None
        self.estimator, self.squared_weight = estimator, squared_weight
        if self.target == "jacobian" and estimator is None:
            raise InputError("Target 'jacobian' needs an estimator, such as AutodiffFisher(denoiser).")

    def __call__(
        self,
        model: torch.nn.Module,
        denoiser: Denoiser,
        samples: torch.Tensor,
        draw: TraceDraw,
        pooled: torch.Tensor | None = None,
        with_features: bool = True,
    ) -> torch.Tensor:
        """Returns the losses (n,) of every row of `draw`, with a graph to the model's parameters.

        Args:
            model: the trace model, or its wrapper for several processes.
            samples: one clean sample per sample of the draw, in the model's coordinates (scaled latents).
            pooled: one vector per sample.
            with_features: whether to give the model the denoiser's features, if the states have them.

        Raises:
            InputError: the draw has no probes for target "jacobian".
            NumericalError: the denoiser's output, or a loss, is not finite.
        """
        clean = draw.repeat(samples)
        with_graph = self.target == "jacobian" and self.estimator is not None and self.estimator.needs_graph
        state = noised_state(denoiser, clean, draw, with_graph)
        target = self.targets(state, clean, draw)
        inputs = trace_inputs(state if with_features else dataclasses.replace(state, features=None))
        output = model(**inputs, pooled=None if pooled is None else draw.repeat(pooled))
        losses = trace_loss(output, target, FLOORS.get(self.target, 0.0), self.squared_weight)
        if not bool(torch.isfinite(losses).all()):
            raise NumericalError(f"The loss is not finite at log(sigma/alpha) {draw.log_noise.tolist()}.")
        return losses

    def targets(self, state: DenoisingState, clean: torch.Tensor, draw: TraceDraw) -> torch.Tensor:
        """Returns the target of every row, (n,), or (n, ...) for a diagonal."""
        if self.target == "norm":
            return norm_target(clean)
        if self.target == "residual" or self.estimator is None:  # target jacobian always has one
            return residual_target(state, draw.noise, self.basis)
        if draw.probes is None:
            raise InputError("Target 'jacobian' needs probes; draw the batch with `with_probes=True`.")
        return jacobian_target(self.estimator(state), draw.probes, self.basis)


def _half_loss(r: torch.Tensor, y: torch.Tensor, floor: float) -> torch.Tensor:
    r = (r + floor).clamp_min(1e-20)
    return r.log() + (y + floor) / r


def _to_basis(v: torch.Tensor, basis: str | None) -> torch.Tensor:
    if basis != "dct":
        return v
    return DCTBasis(tuple(v.shape[1:])).to(v.device).analyse(v.double().flatten(1)).view(v.shape)


def _from_basis(v: torch.Tensor, basis: str | None) -> torch.Tensor:
    if basis != "dct":
        return v
    return DCTBasis(tuple(v.shape[1:])).to(v.device).synthesise(v.double().flatten(1)).to(v.dtype).view(v.shape)


def _average(values: torch.Tensor, basis: str | None) -> torch.Tensor:
    return (values.flatten(1).mean(1) if basis is None else values).float()
