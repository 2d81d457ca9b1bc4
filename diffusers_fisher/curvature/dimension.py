"""The local intrinsic dimension of a model's law at samples, by noise level, and the plateau of its curve.

Notation: x~ = x/alpha, s = sigma/alpha, r = tr Cov[eps|x]/d. With the law p~_s of x~ the dimension at scale s is
LID(s) = d + d/dlog s log p~_s(x~) = d r + |eps_theta|^2 = E[|eps|^2 | x_t = alpha x], at the clean sample itself, to
which no noise is added (FLIPD: Kamkari et al., 2406.03537). For data on a manifold of dimension k it tends to k where
s is small beside the manifold's own scales.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.estimator import FisherEstimator
from ..likelihood.problem import Integration, OdeProblem, prepare_problem
from ..likelihood.traces import TraceRecord
from ..noise import log_noise_to_signal_range, timestep_at
from ..outputs import OutputTable
from .plateau import WIDE, find_plateau

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from matplotlib.figure import Figure

NUM_LEVELS = 16
"""Number of noise levels by default."""

NoiseLevels = float | Sequence[float] | torch.Tensor | None
"""Noise-to-signal ratios: one, several, or None for the default ones."""


@dataclasses.dataclass(frozen=True)
class IntrinsicDimension(OutputTable):
    """Holds local intrinsic dimensions of a batch. All tensors are float64 on the CPU.

    Args:
        value: (B,) dimension: mean of `curve` over the plateau of the sample.
        standard_error: (B,) standard error of `value` by the trace: from the random directions; 0 for exact traces;
            for a trace model from its calibration, and infinite where it has none.
        curve: (levels, B) dimension at each noise level: the number of directions in which the data extend further
            than the noise.
        curve_error: (levels, B) standard error of `curve`, likewise.
        noise_to_signal: (levels,) sigma/alpha of the levels, increasing.
        plateau: (B, 2) lowest and highest sigma/alpha of each sample's plateau: the widest range at which its curve
            stays within 5% and two standard errors of its mean (`diffusers_fisher.curvature.plateau` has the rule).
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole batch.
        space: "latent" or "pixel".
        trace: description of the trace's estimator, and its number of probes.
    """

    SAMPLE_COLUMNS = ("value", "standard_error", "has_plateau")

    value: torch.Tensor
    standard_error: torch.Tensor
    curve: torch.Tensor
    curve_error: torch.Tensor
    noise_to_signal: torch.Tensor
    plateau: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str
    trace: str

    @property
    def has_plateau(self) -> torch.Tensor:
        """Whether the noise grows by a factor of e or more on the plateau, (B,) bool. Where it does not, the curve is
        flat nowhere, and `value` depends on the choice of the levels: compare samples by `curve` at one level."""
        return (self.plateau[:, 1] / self.plateau[:, 0]).log() > WIDE - 1e-9

    def plot(self, index: int = 0) -> Figure:
        """Draws the dimension of the image at `index` of the batch by noise level, see `dimension_plot`."""
        return dimension_plot({self.trace: self}, index)

    def __str__(self) -> str:
        count, found, (low, high) = (
            len(self.value),
            int(self.has_plateau.sum()),
            self.plateau.median(0).values.tolist(),
        )
        return "\n".join([
            f"Local intrinsic dimension of {count} {self.space} sample{'s' * (count > 1)} of {self.dims} dimensions",
            f"  dimension  {float(self.value.mean()):.1f} on average, {float(self.value.min()):.1f} to "
            f"{float(self.value.max()):.1f}",
            f"  error      {float(self.standard_error.mean()):.2g} by the trace, on average",
            f"  plateau    found for {found} of {count}; noise-to-signal {low:.3g} to {high:.3g} at the median",
            f"  trace      {self.trace}",
            f"  levels     {len(self.noise_to_signal)}; {self.num_denoiser_calls} denoiser calls in all",
        ])  # fmt: skip


@check_kinds
def denoiser_intrinsic_dimension(
    denoiser: Denoiser,
    samples: torch.Tensor,
    estimator: FisherEstimator,
    noise_to_signal: NoiseLevels = None,
    num_probes: int | None = 1,
    generator: Generators = None,
    keys: Sequence[str] | None = None,
    space: str = "latent",
    on_step: Callable[[], object] = lambda: None,
) -> IntrinsicDimension:
    """Returns the local intrinsic dimension of the model behind `denoiser` at clean `samples` (B, ...).

    Args:
        denoiser: denoiser at guidance scale 1.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every level; one without a denoiser gets this one.
        noise_to_signal: sigma/alpha of the levels, increasing; None: 16 levels at equal distances in the logarithm,
            from the schedule's lowest to 1.
        num_probes: number of random directions of the trace per level; None: the exact trace.
        generator, keys, space, on_step: as in `Integration`.

    Returns:
        `IntrinsicDimension`. Cost: one evaluation per level with the estimator's trace, and no graph unless the
        estimator needs one.

    Raises:
        InputError: levels outside the schedule or in another order; else as `integrate_log_likelihood`.
        NumericalError: a dimension that is not finite.
    """
    integration = Integration(
        num_probes=num_probes, generator=generator, keys=keys, space=space, on_step=on_step, trace_checks=0
    )
    problem = prepare_problem(denoiser, samples, estimator, integration)
    log_noise = log_levels(denoiser.scheduler, noise_to_signal)
    trace, squares = TraceRecord(), []
    for timestep, level in zip(timestep_at(denoiser.scheduler, log_noise), log_noise.tolist(), strict=True):
        node = problem.evaluate(problem.start, timestep, level)
        trace.add(node.trace)
        squares.append(node.epsilon.flatten(1).square().sum(1))
    dims = problem.start[0].numel()
    curve = dims * (1 - trace.rests) + torch.stack(squares)
    if not torch.isfinite(curve).all():
        raise NumericalError(
            f"Intrinsic dimensions by level are not finite: {curve.tolist()}. Check the network's output and the "
            "estimator's trace."
        )
    probe_error = trace.level_errors()
    plateau = find_plateau(log_noise, curve, dims * probe_error, dims)
    error, plateau_error = _errors(problem, probe_error, log_noise, plateau.member)
    probes = "no probes" if num_probes is None else f"probes per level: {num_probes}"
    return IntrinsicDimension(
        plateau.value, dims * plateau_error, curve, dims * error, log_noise.exp(), plateau.ends.exp(), dims,
        denoiser.num_calls - problem.calls_before, space, f"{problem.estimator.description}, {probes}",
    )  # fmt: skip


def default_levels(low: float, high: float) -> torch.Tensor:
    """Returns log(sigma/alpha) of the default levels of a schedule from `low` to `high`, float64."""
    return torch.linspace(low, min(high, max(low + 1, 0.0)), NUM_LEVELS, dtype=torch.float64)


def log_levels(scheduler: SchedulerMixin, noise_to_signal: NoiseLevels) -> torch.Tensor:
    """Returns log(sigma/alpha) of the levels, (levels,) float64.

    Raises:
        InputError: levels outside the schedule or in another order.
    """
    low, high = log_noise_to_signal_range(scheduler)
    if noise_to_signal is None:
        return default_levels(low, high)
    levels = torch.as_tensor(noise_to_signal, dtype=torch.float64).cpu()
    levels = levels[None] if levels.ndim == 0 else levels
    if levels.ndim != 1 or not len(levels) or not (levels > 0).all() or not (levels.diff() > 0).all():
        raise InputError(
            f"`noise_to_signal` is {levels.tolist()}; allowed: one positive sigma/alpha, or several that increase."
        )
    log_noise = levels.log()
    # The ends, as an output states them, may be rounded to the other side.
    clamped = log_noise.clamp(low, high)
    if not torch.allclose(clamped, log_noise, rtol=0, atol=1e-9):
        raise InputError(
            f"`noise_to_signal` goes from {float(levels[0]):.4g} to {float(levels[-1]):.4g}; the schedule of "
            f"{type(scheduler).__name__} has {math.exp(low):.4g} to {math.exp(high):.4g}. Take "
            "levels between these."
        )
    return clamped


def _errors(
    problem: OdeProblem, probe_error: torch.Tensor, log_noise: torch.Tensor, member: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the standard error of r at each level, (levels, B), and that of its mean over the plateau, (B,).

    Args:
        probe_error: (levels, B) standard error of r by random directions.
        member: (levels, B) bool, whether a level belongs to the sample's plateau.
    """
    count, estimator = member.sum(0), problem.estimator
    if problem.integration.num_probes is None and estimator.models_trace:
        known = torch.full_like(log_noise, torch.inf)
        if estimator.calibration is not None:
            known = estimator.calibration.error_at(log_noise)
        error = known[:, None].expand(member.shape).clone()
        # A model is wrong at neighbouring levels alike, so its error does not fall by the mean over them.
        return error, torch.where(member, error, 0).sum(0) / count
    return probe_error, torch.where(member, probe_error, 0).square().sum(0).sqrt() / count


@check_kinds
def dimension_plot(outputs: Mapping[str, IntrinsicDimension], index: int = 0) -> Figure:
    """Draws the intrinsic dimension of one image by noise level, with a horizontal line on its plateau.

    A band of two standard errors shows what the trace leaves. Exact traces, and models without calibration, have no
    band.

    Args:
        outputs: intrinsic dimensions, by a name for the legend.
        index: the image's place in the batch.

    Returns:
        A matplotlib figure. The legend has the dimension and its standard error.

    Raises:
        InputError: there are no outputs, or one has no such image.
    """
    from ..figures import check_index, draw_curve, finish_curves, make_figure

    check_index(index, {name: len(output.value) for name, output in outputs.items()}, "intrinsic_dimension")
    figure, (axes,) = make_figure(6.5, 4)
    curves, labels = [], []
    for name, output in outputs.items():
        curves.append(draw_curve(axes, output.noise_to_signal, output.curve[:, index], output.curve_error[:, index]))
        value = float(output.value[index])
        axes.hlines(value, *output.plateau[index].tolist(), color=curves[-1].get_color(), linestyle="dashed")
        labels.append(f"{name}: {value:.1f} +- {float(output.standard_error[index]):.1f}")
    finish_curves(axes, "intrinsic dimension", curves, labels)
    return figure
