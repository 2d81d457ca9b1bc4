"""Trace matching: what a trace model is trained on, at which noise levels, and with which loss.

Notation: x_t = alpha x_0 + sigma eps, M = Cov[eps|x_t], r = tr M/d, J the Jacobian of the predicted noise, which for a
perfect denoiser is (I - M)/sigma. Three targets y (Wang et al., ICML 2025, arXiv 2505.23264 for "norm"; the residual
of one pixel is NPR of Bao et al., 2206.07309):

- "residual": |eps - eps_theta|^2/d. E[y|x_t] = r + |bias of eps_theta|^2/d: second order in the denoiser's error.
- "jacobian": 1 - sigma v^T J v/d with random signs v. E[y|x_t] = 1 - sigma tr J/d: the denoiser's own divergence, and
  so the likelihood of its own ODE.
- "norm": |x_0|^2/d. E[y|x_t] is turned into r with the denoiser's x_0 by a difference of nearly equal numbers.

Losses are Bregman divergences, so the minimum is at E[y|x_t] whatever the law of y. "residual" and "jacobian" take
the Itakura-Saito divergence (the negative log-likelihood of a Gamma variable, which y nearly is) on both sides,
log r + y/r + log(1-r) + (1-y)/(1-r): relative errors of r at large noise and of 1 - r at small noise count alike.
A likelihood integrates r itself over log(sigma/alpha); (r - y)^2, another such divergence, can be added for it.

Every draw depends on the seed, the step and the sample's place in the global batch alone, so neither the number of
processes nor a resumption changes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..denoiser import Denoiser
from ..distributions.covariance import DCTBasis
from ..errors import InputError, NumericalError
from ..fisher.estimator import FisherEstimator
from ..fisher.numerics import dot
from ..fisher.operator import FisherOperator
from ..jobs.seeds import step_generator
from ..models import FisherTraceOutput, trace_inputs
from ..noise import DenoisingState, expand, log_noise_to_signal_at, log_noise_to_signal_range, timestep_at

FLOORS = {"residual": 1e-3, "jacobian": 1e-2}
"""Added to both sides of the scale-free loss: smaller r and 1 - r count by their absolute error. Probes of a learned
Jacobian may give y below 0 or above 1, by less than this on average."""


@dataclasses.dataclass(frozen=True)
class TraceDraw:
    """Random numbers of some samples of a global batch; with `mirrored` two rows a sample, the second half's rows the
    mirror images of the first half's.

    Args:
        log_noise: (n,) float64, log(sigma/alpha).
        noise: (n, ...) standard normal.
        copies: rows a sample, 1 or 2.
        probes: (n, ...) random signs, or None.
    """

    log_noise: torch.Tensor
    noise: torch.Tensor
    copies: int = 1
    probes: torch.Tensor | None = None

    def repeat(self, samples: torch.Tensor) -> torch.Tensor:
        """What belongs to the samples, one entry each, for every row of the draw."""
        return torch.cat([samples] * self.copies)


def draw_trace_batch(
    scheduler: Any,
    shape: tuple[int, ...],
    batch_size: int,
    step: int,
    seed: int,
    mine: slice = slice(None),
    mirrored: bool = True,
    with_probes: bool = False,
) -> TraceDraw:
    """Random numbers for the samples `mine` of the global batch of `step`, on the CPU.

    Args:
        scheduler: whose noise levels are drawn.
        shape: of one sample.
        batch_size: samples of the global batch, over all processes and accumulated pieces.
        mine: this process's (or piece's) part of the global batch.
        mirrored: two rows a sample, with noise and `mirrored_noise`. Use it for "residual": at small noise 1 - r is
            small, and the fluctuation of |eps|^2/d, which is not, cancels in the mean of the two.
        with_probes: draw probes too, for "jacobian".

    Raises:
        InputError: an empty batch.
    """
    positions = range(batch_size)[mine]
    if batch_size < 1 or not len(positions):
        raise InputError(f"The batch has {batch_size} samples, {len(positions)} of them here; allowed: 1 or more.")
    copies = 2 if mirrored else 1
    levels = draw_log_noise(scheduler, batch_size, step_generator(seed, "levels", step))[mine]
    noise, probes = [], []
    for position in positions:
        generator = step_generator(seed, "noise", step * batch_size + position)
        noise.append(torch.randn(shape, generator=generator))
        if with_probes:
            signs = torch.randint(0, 2, (copies, *shape), generator=generator, dtype=torch.uint8)
            probes.append(2.0 * signs - 1)
    first = torch.stack(noise)
    rows = torch.cat([first, mirrored_noise(first)]) if mirrored else first
    return TraceDraw(
        levels.repeat(copies), rows, copies, torch.stack(probes, dim=1).flatten(0, 1) if with_probes else None
    )


def draw_log_noise(scheduler: Any, count: int, generator: torch.Generator, log_fraction: float = 0.5) -> torch.Tensor:
    """`count` noise levels log(sigma/alpha), float64: `log_fraction` of them uniform in themselves, the rest in t.

    Stratified: one of every `count`-th part of the range, in random order. Half and half serves both the small noise
    at which the trace is hard and the levels that samplers visit.
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
    """Standard normal noise of the opposite direction and the opposite quantile of the norm, (n, ...).

    Its law is exactly that of `noise`. The squared norms of the two add up to 2 d but for the skewness of chi-square
    (relative standard deviation 1/d instead of 1/sqrt(d)), and what is linear in the noise cancels.
    """
    import numpy
    from scipy.special import chdtr, chdtri

    dimensions = noise[0].numel()
    squared = dot(noise, noise)
    quantile = numpy.clip(chdtr(dimensions, squared.cpu().numpy()), 1e-15, 1 - 1e-15)
    factor = torch.from_numpy(numpy.sqrt(chdtri(dimensions, quantile))).to(squared) / squared.sqrt()
    return -expand(factor, noise) * noise


def noised_state(denoiser: Denoiser, clean: torch.Tensor, draw: TraceDraw, with_graph: bool = False) -> DenoisingState:
    """The denoiser at alpha x_0 + sigma eps for every row of `draw`. Cost: one evaluation of the batch.

    Args:
        denoiser: one that takes a batch of timesteps, at guidance scale 1.
        clean: x_0 of every row (see `TraceDraw.repeat`), on the denoiser's device.
        with_graph: let the output depend on the sample for autograd (estimators with `needs_graph`).

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
    """|x_0|^2/d of clean samples (B, ...), (B,) float32."""
    return clean.float().square().flatten(1).mean(1)


def residual_target(state: DenoisingState, noise: torch.Tensor, basis: str | None = None) -> torch.Tensor:
    """|eps - eps_theta|^2/d, (B,) float32; with a `basis` ("pixel", "dct") the square a coordinate, (B, ...)."""
    error = noise.to(state.sample) - state.epsilon.detach()
    return _averaged(_in_basis(error, basis).square(), basis)


def jacobian_target(operator: FisherOperator, probes: torch.Tensor, basis: str | None = None) -> torch.Tensor:
    """1 - sigma v^T J v/d with random signs v (B, ...), (B,) float32; with a `basis` one value a coordinate, (B, ...).

    Probes are signs of coordinates of the basis. Cost: one product of `operator`, which decides how it is done:
    `AutodiffFisher(denoiser)` backward, `AutodiffFisher(denoiser, forward_mode=True)` forward, or
    `FiniteDifferenceFisher(denoiser)`. Unbiased for the first two; may lie outside [0, 1].
    """
    v = _out_of_basis(probes.to(operator.state.sample), basis)
    variance = operator.state.level.sigma**2
    with torch.no_grad():
        product = operator.matvec(v)
        forms = _in_basis(v, basis).double() * _in_basis(product, basis).double()
    return _averaged(1 - expand(variance, forms) * forms, basis)


# Losses


def scale_free_loss(logits: torch.Tensor, target: torch.Tensor, floor: float = 0.0) -> torch.Tensor:
    """log r + y/r + log(1-r) + (1-y)/(1-r) of every entry, from the logits of r, with `floor` added to r, y, 1 - r and
    1 - y. In expectation its only stationary point is r = E[y], a minimum, whatever signs y takes."""
    return _one_sided(torch.sigmoid(logits), target, floor) + _one_sided(torch.sigmoid(-logits), 1 - target, floor)


def trace_loss(
    output: FisherTraceOutput, target: torch.Tensor, floor: float = 0.0, squared_weight: float = 0.0
) -> torch.Tensor:
    """The loss of every sample, (B,): squared error for second moments, `scale_free_loss` for r.

    For a diagonal it is that of the mean, so that the trace is right, plus the mean over coordinates of
    log r_i + y_i/r_i.

    Args:
        target: (B,), or (B, ...) for a diagonal.
        squared_weight: of (r - y)^2 of the trace, which is added to the loss of r.

    Raises:
        InputError: a target of another shape than the model's output.
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
    means = _one_sided(r.mean(1), y.mean(1), floor) + _one_sided(rest.mean(1), 1 - y.mean(1), floor)
    return means + _one_sided(r, y, floor).mean(1) + squared_weight * (r.mean(1) - y.mean(1)).square()


@dataclasses.dataclass(frozen=True)
class TraceObjective:
    """One training step's loss for a trace model of any target.

    Args:
        target, basis: of the model; `basis` None for models of the trace alone.
        estimator: for "jacobian": gives v^T J v, such as `AutodiffFisher(denoiser)`.
        squared_weight: see `trace_loss`.
    """

    target: str
    basis: str | None
    estimator: FisherEstimator | None = None
    squared_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.target == "jacobian" and self.estimator is None:
            raise InputError("Target 'jacobian' needs an estimator, such as AutodiffFisher(denoiser).")

    @classmethod
    def of(
        cls, config: Mapping[str, Any], estimator: FisherEstimator | None = None, squared_weight: float = 0.0
    ) -> TraceObjective:
        """For a model with this config. Raises `InputError` for target "jacobian" without an estimator."""
        basis = config["basis"] if config["output"] == "diagonal" else None
        return cls(config["target"], basis, estimator, squared_weight)

    def __call__(
        self,
        model: torch.nn.Module,
        denoiser: Denoiser,
        samples: torch.Tensor,
        draw: TraceDraw,
        pooled: torch.Tensor | None = None,
        with_features: bool = True,
    ) -> torch.Tensor:
        """Losses (n,) of every row of `draw`, with a graph to the model's parameters.

        Args:
            model: the trace model, or its wrapper for several processes.
            samples: clean samples, one for each of the draw's, in the model's coordinates (scaled latents).
            pooled: one vector for each sample.
            with_features: give the model the denoiser's features, where the states have them.

        Raises:
            InputError: a draw without probes for target "jacobian".
            NumericalError: the denoiser's output, or a loss, is not finite.
        """
        clean = draw.repeat(samples)
        with_graph = self.target == "jacobian" and self.estimator is not None and self.estimator.needs_graph
        state = noised_state(denoiser, clean, draw, with_graph)
        target = self.targets(state, clean, draw)
        given = trace_inputs(state if with_features else dataclasses.replace(state, features=None))
        output = model(**given, pooled=None if pooled is None else draw.repeat(pooled))
        losses = trace_loss(output, target, FLOORS.get(self.target, 0.0), self.squared_weight)
        if not bool(torch.isfinite(losses).all()):
            raise NumericalError(f"The loss is not finite at log(sigma/alpha) {draw.log_noise.tolist()}.")
        return losses

    def targets(self, state: DenoisingState, clean: torch.Tensor, draw: TraceDraw) -> torch.Tensor:
        """The target of every row, (n,), or (n, ...) for a diagonal."""
        if self.target == "norm":
            return norm_target(clean)
        if self.target == "residual" or self.estimator is None:  # which jacobian always has
            return residual_target(state, draw.noise, self.basis)
        if draw.probes is None:
            raise InputError("Target 'jacobian' needs probes; draw the batch with `with_probes=True`.")
        return jacobian_target(self.estimator(state), draw.probes, self.basis)


def _one_sided(r: torch.Tensor, y: torch.Tensor, floor: float) -> torch.Tensor:
    r = (r + floor).clamp_min(1e-20)
    return r.log() + (y + floor) / r


def _in_basis(v: torch.Tensor, basis: str | None) -> torch.Tensor:
    if basis != "dct":
        return v
    transform = DCTBasis(tuple(v.shape[1:])).to(v.device)
    return transform.analyse(v.double().flatten(1)).view(v.shape)


def _out_of_basis(v: torch.Tensor, basis: str | None) -> torch.Tensor:
    if basis != "dct":
        return v
    transform = DCTBasis(tuple(v.shape[1:])).to(v.device)
    return transform.synthesise(v.double().flatten(1)).to(v.dtype).view(v.shape)


def _averaged(values: torch.Tensor, basis: str | None) -> torch.Tensor:
    return (values.flatten(1).mean(1) if basis is None else values).float()
