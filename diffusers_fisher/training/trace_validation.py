"""Compares a trace model with Hutchinson's estimate and with the squared errors of its denoiser on held-out data."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from ..figures import make_figure
from ..files import save_figure
from ..fisher import AutodiffFisher, rademacher
from ..models import FisherTraceModel
from ..noise import log_noise_to_signal_range
from ..seeds import step_generator
from .pieces import Piece
from .samples import SampleSpace
from .trace_config import TraceMatchingConfig
from .trace_losses import TraceDraw, noised_state, residual_target


@dataclasses.dataclass(frozen=True)
class Validation:
    """r in three ways at every noise level and held-out sample, each (levels, n) float64.

    Args:
        log_noise: log(sigma/alpha) of the levels (levels,).
        model: r of the trace model.
        jacobian: r by Hutchinson probes of the denoiser.
        squared_error: |eps - eps_theta|^2/d of one draw of the noise.
    """

    log_noise: torch.Tensor
    model: torch.Tensor
    jacobian: torch.Tensor
    squared_error: torch.Tensor

    def summary(self) -> dict[str, float]:
        """Returns mean absolute differences of the mean r per level, and the biases of an integrated trace that follow
        from the means, in bits/dim (minus: the model's likelihoods are too high)."""
        summary: dict[str, float] = {}
        for name, other in (("jacobian", self.jacobian), ("squared_error", self.squared_error)):
            difference = (self.model - other).mean(1)
            bias = torch.trapezoid(difference, self.log_noise) / math.log(2)
            summary |= {f"{name}_difference": float(difference.abs().mean()), f"{name}_bits_per_dim": float(bias)}
        return summary

    def report(self) -> dict[str, Any]:
        """Returns the summary, and the means with their standard errors per level."""
        names = ("model", "jacobian", "squared_error")
        count = self.model.shape[1]
        means = {name: getattr(self, name).mean(1).tolist() for name in names}
        errors = {name: (getattr(self, name).std(1, correction=0) / count**0.5).tolist() for name in names}
        return {
            **self.summary(), "samples": count, "log_noise": self.log_noise.tolist(), "mean": means,
            "standard_error": errors,
        }  # fmt: skip


def validate(model: FisherTraceModel, space: SampleSpace, held_out: Piece, config: TraceMatchingConfig) -> Validation:
    """Evaluates the trace model and the denoiser at the same points: the same at every call and for any piece size.

    Cost: one evaluation of the denoiser and `probes` backward passes per level and held-out sample. The samples are
    evaluated in pieces of the space's size; only one piece has a graph at a time.

    Raises:
        NumericalError: the denoiser's output is not finite.
    """
    low, high = log_noise_to_signal_range(space.pipe.scheduler)
    levels = torch.linspace(low, high, config.validation.levels, dtype=torch.float64)
    count = len(held_out.captions)
    parts = [slice(start, start + space.piece_size) for start in range(0, count, space.piece_size)]

    def compare(number: int, level: torch.Tensor, part: slice) -> torch.Tensor:
        """Returns r of some samples at one level in the three ways, (3, n) float64 on the CPU."""
        generators = [step_generator(config.seed, "validation", number, index) for index in range(count)[part]]
        samples = held_out.samples[part]
        clean, denoiser = space.draw(samples, generators), space.denoiser(held_out.captions[part], samples)
        noise = randn_tensor(clean.shape, generators)
        state = noised_state(denoiser, clean, TraceDraw(level.expand(len(clean)), noise), with_graph=True)
        trace = AutodiffFisher(denoiser)(state).trace(rademacher(config.validation.probes, clean, generators)).value
        jacobian = 1 - (state.level.sigma**2).to(trace.device) * trace / clean[0].numel()
        pooled = denoiser.pooled_condition() if model.config["pooled_channels"] else None
        fraction = model.unexplained_noise_fraction(state, pooled)
        fractions = (fraction, jacobian, residual_target(state, noise.to(clean.device)))
        return torch.stack([values.detach().double().cpu() for values in fractions])

    rows = [torch.cat([compare(number, level, part) for part in parts], dim=1) for number, level in enumerate(levels)]
    return Validation(levels, *torch.stack(rows, dim=1))


def plot_validation(validation: Validation, path: Path) -> None:
    """Draws r against log(sigma/alpha) in the three ways, and the differences of the model from the other two.

    Args:
        validation: r by level and sample.
        path: file of the picture, written atomically.
    """
    figure, (left, right) = make_figure(10, 4, columns=2)
    report, x = validation.report(), validation.log_noise
    for name, label in (("model", "trace model"), ("jacobian", "Hutchinson"), ("squared_error", "squared errors")):
        left.errorbar(x, report["mean"][name], report["standard_error"][name], label=label, capsize=2)
    for name, label in (("jacobian", "Hutchinson"), ("squared_error", "squared errors")):
        difference = validation.model - getattr(validation, name)
        error = difference.std(1, correction=0) / difference.shape[1] ** 0.5
        right.errorbar(x, difference.mean(1), error, label=f"trace model - {label}", capsize=2)
    right.axhline(0, color="grey", linewidth=0.5)
    left.set(xlabel="log(sigma/alpha)", ylabel="r", title=f"mean over {report['samples']} held-out samples")
    right.set(xlabel="log(sigma/alpha)", ylabel="difference of r")
    for axes in (left, right):
        axes.legend()
    save_figure(figure, path)
