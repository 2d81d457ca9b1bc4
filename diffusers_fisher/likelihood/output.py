"""Outputs of likelihoods."""

from __future__ import annotations

import dataclasses
import math

import torch
from diffusers.utils import BaseOutput


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
        return -self.log_prob / (self.dims * math.log(2)) + self.offset_bits


@dataclasses.dataclass
class LikelihoodOutput(BitsPerDim, BaseOutput):
    """Holds log-likelihoods of a batch, and their parts and errors. All tensors are float64 on the CPU.

    Args:
        log_prob: (B,) nats. The density is that of the model's data smoothed with noise of `noise_to_signal[0]`, in
            the coordinates of `space`, at the sample (or, where `density` is "noised", at the noised sample).
        prior_log_prob: (B,) nats, the part of the noise end.
        trace_log_prob: (B,) nats, the part of the integrated trace; the two parts add up to `log_prob`.
        standard_error: (B,) nats, from the trace's random probes; zero without probes, infinite for a single one that
            is the same at all levels. It does not include the error of a trace model.
        discretisation_error: (B,) nats, size of the error by the finite number of steps: an estimate from the same
            evaluations, or where `halved` is true the difference from half as many steps.
        unexplained_noise_fraction: (levels, B) mean posterior variance of the noise, tr Cov[eps|x]/d; "r" in formulas.
        noise_to_signal: (levels,) sigma/alpha of the nodes, increasing.
        final_latents: (B, ...) x~ at the noise end, in units of the data.
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole batch, those of `step_halving` included.
        space: "latent" or "pixel".
        prior: "standard" (mean 0, variance 1 for the data at the noise end) or "moment-matched".
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
    """

    log_prob: torch.Tensor
    prior_log_prob: torch.Tensor
    trace_log_prob: torch.Tensor
    standard_error: torch.Tensor
    discretisation_error: torch.Tensor
    unexplained_noise_fraction: torch.Tensor
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

    @property
    def trace_by_probe(self) -> torch.Tensor:
        """`trace_log_prob` by each probe alone, (k, B) nats; k = 0 without probes."""
        return self.trace_by_level.sum(0)

    def __str__(self) -> str:
        bits, count = self.bits_per_dim, len(self.log_prob)
        steps, probes = (
            float(nats.mean()) / (self.dims * math.log(2)) for nats in (self.discretisation_error, self.standard_error)
        )
        offset = f", {self.offset_bits:.4f} of them for the bins" if self.offset_bits else ""
        how = "against half as many" if self.halved else "estimated"
        by_probes = f"{probes:.4f} by the probes" if self.trace_by_level.shape[1] else "no probes"
        lines = [
            f"Log-likelihood of {count} {self.space} sample{'s' * (count > 1)} of {self.dims} dimensions",
            f"  bits/dim  {float(bits.mean()):.4f} on average, {float(bits.min()):.4f} to {float(bits.max()):.4f}"
            f"{offset}",
            f"  errors    {steps:.4f} bits/dim by the steps ({how}), {by_probes}, on average",
            f"  density   {self.density} with noise {float(self.noise_to_signal[0]):.4g}; prior {self.prior}",
            f"  trace     {self.trace}",
            f"  path      {self.scheme}, {len(self.noise_to_signal)} levels to noise-to-signal "
            f"{float(self.noise_to_signal[-1]):.4g}; {self.num_denoiser_calls} denoiser calls in all",
        ]
        return "\n".join(lines)


@dataclasses.dataclass
class SquaredErrorOutput(BitsPerDim, BaseOutput):
    """Holds log-likelihoods of a batch by squared errors of the denoiser, without an ODE. All float64 on the CPU.

    Args:
        log_prob: (B,) nats, the mean over the noise of log p~ at `sample + s_0 * noise`, s_0 = `smoothing`.
        standard_error: (B,) nats, from the random levels and noises.
        contributions: (n, B) nats; `log_prob` is their mean. Draws of one generator are paired between calls.
        noise_to_signal: (n,) sigma/alpha of the draws, increasing.
        smoothing: s_0.
        dims, num_denoiser_calls, space, prior, density, offset_bits: as in `LikelihoodOutput`; `density` is
            "noised, mean".
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
