"""The output of a likelihood bound."""

from __future__ import annotations

import dataclasses
import math

import torch

from ..outputs import OutputTable
from .maps import repeat_by_pixel


@dataclasses.dataclass(frozen=True)
class LikelihoodBound(OutputTable):
    """Holds upper bounds on the negative log-likelihoods of a batch. All tensors are float64 on the CPU.

    Args:
        value: (B,) nats, an estimate of the bound, whose expectation is at least -log p, whatever the variance is.
        standard_error: (B,) nats, from the random draws. With one or two draws per level it comes from the scatter of
            neighbouring levels, and errs upwards.
        prior_terms: (B,) nats, part of `value` by the noise end.
        terms: (steps, draws, B) nats, part of `value` by each step of the chain, from the step next to the data. The
            mean over the draws, summed over the steps, and `prior_terms` add up to `value`.
        noise_to_signal: (steps + 1,) sigma/alpha of the chain's states, increasing. The first is that of the data.
        clamped: (B,) share of the trace's values (with a diagonal: of its entries) whose unexplained noise fraction
            was outside of 0 to 1, and was moved to the nearer of the two. The bound stays a bound.
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole batch.
        space: "latent" or "pixel".
        density: "smoothed" (of the data with noise of `noise_to_signal[0]`), "data" (of the chain's own last state),
            or "bins" (the probability of the image's bins).
        prior: "standard" or "moment-matched", as in `LikelihoodOutput`.
        variance: description of the reverse chain's variance.
        offset_bits: bits that `bits_per_dim` adds for data in bins, see `LikelihoodOutput`.
        maps: (B, ...) nats, part of `value` by each element of a sample; they add up to `value`. None: not asked for.
    """

    SAMPLE_COLUMNS = ("bits_per_dim", "value", "standard_error", "prior_terms", "clamped")

    value: torch.Tensor
    standard_error: torch.Tensor
    prior_terms: torch.Tensor
    terms: torch.Tensor
    noise_to_signal: torch.Tensor
    clamped: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str
    density: str
    prior: str
    variance: str
    offset_bits: float = 0.0
    maps: torch.Tensor | None = None

    @property
    def bits_per_dim(self) -> torch.Tensor:
        """value/(d ln 2) + offset_bits, (B,) bits per dimension of `space`."""
        return self.value / (self.dims * math.log(2)) + self.offset_bits

    def image_maps(self, height: int, width: int) -> torch.Tensor:
        """Returns the bound's parts by pixel, (B, height, width) nats, which add up to `value`.

        The part of a latent is shared equally by its pixels.

        Args:
            height, width: size of the images, multiples of that of the samples.

        Raises:
            InputError: there are no maps (B, C, h, w), or a size that is no multiple of theirs.
        """
        return repeat_by_pixel(self.maps, height, width, "likelihood_bound", shared=True).sum(1)

    def __str__(self) -> str:
        bits, count = self.bits_per_dim, len(self.value)
        error = float(self.standard_error.mean()) / (self.dims * math.log(2))
        steps, draws = self.terms.shape[:2]
        density = {
            "smoothed": f"of the data with noise {float(self.noise_to_signal[0]):.4g}", "data": "of the data",
            "bins": "of the bins",
        }[self.density]  # fmt: skip
        lines = [
            f"Upper bound on -log p of {count} {self.space} sample{'s' * (count > 1)} of {self.dims} dimensions",
            f"  bits/dim  {float(bits.mean()):.4f} on average, {float(bits.min()):.4f} to {float(bits.max()):.4f}",
            f"  error     {error:.4f} bits/dim by the draws, on average",
            f"  density   {density}; prior {self.prior}",
            f"  variance  {self.variance}",
            f"  chain     {steps} steps, {draws} draw{'s' * (draws > 1)} each; {self.num_denoiser_calls} denoiser "
            "calls in all",
        ]
        if bool((self.clamped > 0).any()):
            lines.append(
                f"  clamped   {100 * float(self.clamped.mean()):.1f}% of the trace's values lay outside of 0 to 1; "
                "the bound holds, but it is looser there"
            )
        return "\n".join(lines)
