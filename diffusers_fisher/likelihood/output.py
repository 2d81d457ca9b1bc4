"""Outputs of likelihoods."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import BaseOutput

from ..arguments import check_kinds
from ..outputs import OutputTable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGREES, DISAGREES, REPLACED = "agrees", "disagrees", "replaced by probes"

BY_SAMPLE = (
    "log_prob", "prior_log_prob", "trace_log_prob", "standard_error", "trace_error", "prior_error",
    "discretisation_error", "final_latents", "trace_difference", "trace_difference_error",
)  # fmt: skip
"""Fields of a `LikelihoodOutput` whose first axis are the samples."""


class BitsPerDim:
    """Converts a log-likelihood to other units; needs `log_prob`, `dims` and `offset_bits`."""

    log_prob: torch.Tensor
    dims: int
    offset_bits: float

    @property
    def nll(self) -> torch.Tensor:
        """Negative log-likelihood, (B,) nats."""
        return -self.log_prob

    @property
    def bits_per_dim(self) -> torch.Tensor:
        """-log_prob/(d ln 2) + offset_bits, (B,) bits per dimension of `space`: lower is likelier."""
        return self.to_bits(self.nll) + self.offset_bits

    def to_bits(self, nats: torch.Tensor) -> torch.Tensor:
        """Converts errors or differences in nats to bits per dimension, with the sign as it is."""
        return nats / (self.dims * math.log(2))


@dataclasses.dataclass
class LikelihoodOutput(OutputTable, BitsPerDim, BaseOutput):
    """Holds log-likelihoods of a batch, and their parts and errors. All tensors are float64 on the CPU.

    Args:
        log_prob: (B,) nats. The density is that of the model's data smoothed with noise of `noise_to_signal[0]`, in
            the coordinates of `space`, at the sample (or, where `density` is "noised", at the noised sample).
        prior_log_prob: (B,) nats, the part of the noise end.
        trace_log_prob: (B,) nats, the part of the integrated trace; the two parts add up to `log_prob`.
        standard_error: (B,) nats, from the trace's random probes; zero without probes, infinite for a single one that
            is the same at all levels. It does not include the error of a trace model.
        trace_error: (B,) nats, half-width of a 95% interval of the error of a trace model: that of its calibration, or
            where the image's checks disagree with the model, what they leave possible. Zero without a trace model,
            infinite for one without calibration and checks.
        prior_error: (B,) nats, size of the error by the Gaussian that stands for the data at the noise end, estimated
            from the model's output there.
        discretisation_error: (B,) nats, size of the error by the finite number of steps: an estimate from the same
            evaluations, or where `halved` is true the difference from half as many steps.
        unexplained_noise_fraction: (levels, B) mean posterior variance of the noise, tr Cov[eps|x]/d; "r" in formulas.
        unexplained_noise_error: (levels, B) standard error of these by the random probes; 0 without probes.
        noise_to_signal: (levels,) sigma/alpha of the nodes, increasing.
        final_latents: (B, ...) x~ at the noise end, in units of the data.
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole batch, those of `step_halving` included.
        space: "latent" or "pixel".
        prior: the Gaussian that stands for the data at the noise end: "standard" (mean 0, variance 1),
            "moment-matched" (mean and variance of the data's elements) or "spectral" (their mean, and the variances of
            the coefficients of the discrete cosine transform).
        density: "smoothed" or "noised".
        trace: description of the trace's estimator, and its number of probes.
        halved: whether `discretisation_error` was measured with half as many steps.
        scheme: name of the integration scheme, of `diffusers_fisher.likelihood.SCHEMES`.
        offset_bits: bits that `bits_per_dim` adds for data in bins: log2 of the bins in a unit of the model's
            coordinates.
        fixed_probes: whether the probes are the same at all levels.
        trace_by_level: (levels, k, B) nats, contributions to `trace_log_prob` by each level and each of its k probes,
            for paired comparisons; k = 0 without.
        trace_weights: (levels,) nats, weights of 1 - r in the trace's integral.
        latents: what stands for an image: "mean" of the encoder's posterior, a draw of it ("sampled"), what an encoder
            without a posterior returns ("encoded"), the image itself ("pixels"), or latents of the caller ("given").
        denoiser_calls_per_image: (B,) int64, evaluations for each sample along its path (those of the trace's
            directions are not among them), with a tolerance; else None, and every sample takes `num_denoiser_calls`.
        trace_check: one per sample, "agrees", "disagrees", or "replaced by probes" where differences
            took the model's place; None without checks of a trace model.
        trace_difference: (B,) nats, by how much the checks estimate the trace model's part to be too low; None
            without checks.
        trace_difference_error: (B,) nats, standard error of `trace_difference`.
        status: one per sample, "converged" where `discretisation_error` is at most `tolerance`, else "not converged";
            None without a tolerance.
        guidance_scale: guidance scale of which the density is, where it is an input of the network (distilled
            guidance, such as Flux-dev's); None for other networks, whose density is unguided.
    """

    SAMPLE_COLUMNS = (
        "bits_per_dim", "total_error_bits", "log_prob", "total_error", "prior_log_prob", "trace_log_prob",
        "standard_error", "trace_error", "prior_error", "discretisation_error", "trace_check", "trace_difference",
        "trace_difference_error", "status", "denoiser_calls_per_image",
    )  # fmt: skip

    log_prob: torch.Tensor
    prior_log_prob: torch.Tensor
    trace_log_prob: torch.Tensor
    standard_error: torch.Tensor
    trace_error: torch.Tensor
    prior_error: torch.Tensor
    discretisation_error: torch.Tensor
    unexplained_noise_fraction: torch.Tensor
    unexplained_noise_error: torch.Tensor
    noise_to_signal: torch.Tensor
    final_latents: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str
    prior: str
    density: str
    trace: str
    halved: bool
    scheme: str
    offset_bits: float
    fixed_probes: bool
    trace_by_level: torch.Tensor
    trace_weights: torch.Tensor
    latents: str = "given"
    denoiser_calls_per_image: torch.Tensor | None = None
    status: list[str] | None = None
    trace_check: list[str] | None = None
    trace_difference: torch.Tensor | None = None
    trace_difference_error: torch.Tensor | None = None
    guidance_scale: float | None = None

    @property
    def trace_by_probe(self) -> torch.Tensor:
        """`trace_log_prob` by each probe alone, (k, B) nats; k = 0 without probes."""
        return self.trace_by_level.sum(0)

    @property
    def total_error(self) -> torch.Tensor:
        """Half-width of a 95% interval of `log_prob`, (B,) nats.

        Half-widths of the probes (1.96 standard errors) and of the trace model are independent; the errors of the
        steps and of the prior are systematic and may add up with them.
        """
        return torch.hypot(1.96 * self.standard_error, self.trace_error) + self.discretisation_error + self.prior_error

    @property
    def total_error_bits(self) -> torch.Tensor:
        """`total_error` in bits/dim, (B,)."""
        return self.to_bits(self.total_error)

    def plot(self, index: int = 0) -> Figure:
        """Draws r of the image at `index` of the batch by noise level, see `likelihood_plot`."""
        return likelihood_plot({self.trace: self}, index)

    def __str__(self) -> str:
        bits, count = self.bits_per_dim, len(self.log_prob)
        total, steps, probes, model, prior = (
            float(self.to_bits(nats).mean())
            for nats in (
                self.total_error, self.discretisation_error, self.standard_error, self.trace_error, self.prior_error,
            )
        )  # fmt: skip
        offset = f", {self.offset_bits:.4f} of them for the bins" if self.offset_bits else ""
        how = "against half as many" if self.halved else "estimated"
        if self.status is not None:
            how = f"by several grids; converged: {self.status.count('converged')} of {count}"
        by_probes = f"{probes:.4f} by the probes" if self.trace_by_level.shape[1] else "no probes"
        by_model = f", {model:.4f} by the trace model" if model else ""
        if self.trace_check is not None:
            by_model += f" (checks disagree for {len(self.trace_check) - self.trace_check.count(AGREES)})"
        name = "standard, N(0, 1)" if self.prior == "standard" else self.prior
        scale = "" if self.guidance_scale is None else f"; at guidance scale {self.guidance_scale:g}"
        lines = [
            f"Log-likelihood of {count} {self.space} sample{'s' * (count > 1)} of {self.dims} dimensions"
            + {"mean": " (mean of the encoder)", "sampled": " (drawn from the encoder)"}.get(self.latents, ""),
            f"  bits/dim  {float(bits.mean()):.4f} on average, {float(bits.min()):.4f} to {float(bits.max()):.4f}"
            f"{offset}",
            f"  errors    {steps:.4f} bits/dim by the steps ({how}), {by_probes}{by_model}, {prior:.4f} by the prior; "
            f"within {total:.4f} with 95%, on average",
            f"  density   {self.density} with noise {float(self.noise_to_signal[0]):.4g}; prior {name}{scale}",
            f"  trace     {self.trace}",
            f"  path      {self.scheme}, {len(self.noise_to_signal)} levels to noise-to-signal "
            f"{float(self.noise_to_signal[-1]):.4g}; {self.num_denoiser_calls} denoiser calls in all",
        ]
        return "\n".join(lines)


def with_samples(
    output: LikelihoodOutput, rows: torch.Tensor, part: LikelihoodOutput, stride: int = 1
) -> LikelihoodOutput:
    """Returns `output` with the samples at `rows` from `part`.

    Args:
        rows: (n,) int64, places of the part's samples.
        stride: the levels of `output` are every so many of the part's.
    """

    def put(old: torch.Tensor, new: torch.Tensor, axis: int = 0) -> torch.Tensor:
        return old.index_copy(axis, rows, new)

    r = part.unexplained_noise_fraction[::stride]
    # Every level of the part counts to the nearest level of the output.
    nearest = (torch.arange(len(part.trace_by_level)) + stride // 2) // stride
    by_level = torch.zeros(len(r), *part.trace_by_level.shape[1:], dtype=torch.float64)
    by_level.index_add_(0, nearest, part.trace_by_level)
    old_by_level = output.trace_by_level
    if by_level.shape[1] != old_by_level.shape[1]:  # their means stand for the probes; a trace model's value for one
        if not old_by_level.shape[1]:
            old_by_level = (output.trace_weights[:, None] * (1 - output.unexplained_noise_fraction))[:, None]
        old_by_level, by_level = (each.mean(1, keepdim=True) for each in (old_by_level, by_level))
    words = None if output.trace_check is None else list(output.trace_check)
    if words is not None and part.trace_check is not None:
        for row, word in zip(rows.tolist(), part.trace_check, strict=True):
            words[row] = word
    tensors: dict[str, Any] = {
        name: put(vars(output)[name], vars(part)[name]) for name in BY_SAMPLE if vars(part)[name] is not None
    }
    return dataclasses.replace(
        output, **tensors, trace_check=words, trace_by_level=put(old_by_level, by_level, 2),
        unexplained_noise_fraction=put(output.unexplained_noise_fraction, r, 1),
        unexplained_noise_error=put(output.unexplained_noise_error, part.unexplained_noise_error[::stride], 1),
    )  # fmt: skip


@dataclasses.dataclass
class SquaredErrorOutput(BitsPerDim, BaseOutput):
    """Holds log-likelihoods of a batch by squared errors of the denoiser, without an ODE. All float64 on the CPU.

    Args:
        log_prob: (B,) nats, the mean over the noise of log p~ at `sample + s_0 * noise`, s_0 = `smoothing`.
        standard_error: (B,) nats, from the random levels and noises.
        contributions: (n, B) nats; `log_prob` is their mean. Draws of one generator are paired between calls.
        noise_to_signal: (n,) sigma/alpha of the draws, increasing.
        smoothing: s_0.
        dims, num_denoiser_calls, space, prior, density, offset_bits, guidance_scale: as in `LikelihoodOutput`;
            `density` is "noised, mean".
    """

    log_prob: torch.Tensor
    standard_error: torch.Tensor
    contributions: torch.Tensor
    noise_to_signal: torch.Tensor
    smoothing: float
    dims: int
    num_denoiser_calls: int
    space: str
    prior: str
    density: str
    offset_bits: float
    guidance_scale: float | None = None


@check_kinds
def likelihood_plot(outputs: Mapping[str, LikelihoodOutput], index: int = 0) -> Figure:
    """Draws r = tr Cov[eps|x]/d of one image by noise level, whose integral is a log-likelihood.

    A band of two standard errors shows what the random directions of a level leave. Traces without directions have no
    band.

    Args:
        outputs: likelihoods of the same images, by a name for the legend.
        index: the image's place in the batch.

    Returns:
        A matplotlib figure. The legend has the image's bits/dim and half of its 95% interval.

    Raises:
        InputError: there are no outputs, or one has no such image.
    """
    from ..figures import check_index, draw_curve, finish_curves, make_figure

    check_index(index, {name: len(output.log_prob) for name, output in outputs.items()}, "log_likelihood")
    figure, (axes,) = make_figure(6.5, 4)
    curves, labels = [], []
    for name, output in outputs.items():
        r, error = output.unexplained_noise_fraction[:, index], output.unexplained_noise_error[:, index]
        curves.append(draw_curve(axes, output.noise_to_signal, r, error))
        bits = float(output.bits_per_dim[index])
        labels.append(f"{name}: {bits:.3f} +- {float(output.total_error_bits[index]):.3f} bits/dim")
    finish_curves(axes, r"$r = (d - \sigma^2\,\mathrm{tr}\,F)/d$", curves, labels)
    return figure
