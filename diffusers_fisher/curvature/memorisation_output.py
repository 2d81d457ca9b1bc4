"""The output of a search for memorised prompts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

import torch

from ..arguments import check_kinds
from ..errors import InputError
from ..likelihood.traces import scatter_error
from ..outputs import OutputTable
from .maps import repeat_by_pixel

if TYPE_CHECKING:
    import pandas

Score = Literal["score", "trace"]
"""Names of the two scores: the squared difference of the scores, and the difference of the traces."""


@dataclasses.dataclass(frozen=True)
class Memorisation(OutputTable):
    """Holds how far the laws of prompts have collapsed beside the unconditional law, before an image exists.

    Both scores are large for memorised prompts, and 0 where a prompt changes nothing. All tensors but `noise` are
    float64 on the CPU.

    Args:
        score_differences: (levels, draws, B), |eps_c - eps_0|^2/d of the conditional and the unconditional predicted
            noise.
        trace_differences: (levels, draws, B), (tr F_c - tr F_0) sigma^2/d, which is r_0 - r_c for the unexplained
            noise fractions r; None: it was not asked for.
        noise: (draws, B, ...) initial noises, as the pipeline's call takes them as `latents`.
        noise_to_signal: (levels,) sigma/alpha of the states, decreasing.
        dims: dimensions of one sample.
        score_calls: evaluations per prompt that the score differences alone take.
        num_denoiser_calls: evaluations per prompt that were made, by both denoisers together.
        space: "latent" or "pixel".
        trace: description of the estimator of the traces.
        score_maps: (B, ...) coordinate-wise parts of `score_difference`, whose mean it is; None: not asked for.
        trace_maps: (B, ...) coordinate-wise parts of `trace_difference`, sigma^2 times the difference of the diagonals
            of F; None: not asked for.
        trace_maps_error: (B, ...) standard errors of `trace_maps` by the draws; infinite for one draw.
    """

    SAMPLE_COLUMNS = ("score_difference", "score_error")

    score_differences: torch.Tensor
    trace_differences: torch.Tensor | None
    noise: torch.Tensor
    noise_to_signal: torch.Tensor
    dims: int
    score_calls: int
    num_denoiser_calls: int
    space: str = "latent"
    trace: str = "none"
    score_maps: torch.Tensor | None = None
    trace_maps: torch.Tensor | None = None
    trace_maps_error: torch.Tensor | None = None

    @property
    def score_difference(self) -> torch.Tensor:
        """Mean of `score_differences` over levels and draws, (B,)."""
        return self.score_differences.mean((0, 1))

    @property
    def score_error(self) -> torch.Tensor:
        """Standard error of `score_difference` over the draws, (B,); infinite for one draw."""
        return scatter_error(self.score_differences.mean(0))

    @property
    def trace_difference(self) -> torch.Tensor:
        """Mean of `trace_differences` over levels and draws, (B,). Raises `InputError` where there is none."""
        return self._differences("trace").mean((0, 1))

    @property
    def trace_error(self) -> torch.Tensor:
        """Standard error of `trace_difference` over the draws and their random directions, (B,); infinite for one
        draw. Raises `InputError` where there is none."""
        return scatter_error(self._differences("trace").mean(0))

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a table with one row per prompt: both scores with their errors, where they were asked for."""
        table = super().to_pandas()
        if self.trace_differences is None:
            return table
        return table.assign(trace_difference=self.trace_difference.tolist(), trace_error=self.trace_error.tolist())

    @check_kinds
    def least_memorised_noise(self, by: Score = "score") -> torch.Tensor:
        """Returns for each prompt the one of its noises with the smallest score, (B, ...), for `latents` of a call.

        No reward and no gradient is involved. Take many draws for it.

        Args:
            by: "score" or "trace", the score that is smallest on average over the levels.
        """
        best = self._differences(by).mean(0).argmin(0)
        return self.noise[best.to(self.noise.device), torch.arange(self.noise.shape[1], device=self.noise.device)]

    @check_kinds
    def image_maps(self, height: int, width: int, by: Score = "trace") -> torch.Tensor:
        """Returns heat maps by pixel, (B, height, width), whose mean is the score: the channels' mean at each latent.

        Args:
            height, width: size of the images, multiples of that of the samples.
            by: "score" or "trace".

        Raises:
            InputError: there are no maps (B, C, h, w), or a size that is no multiple of theirs.
        """
        maps = self.score_maps if by == "score" else self.trace_maps
        return repeat_by_pixel(maps, height, width, "memorisation").mean(1)

    def _differences(self, by: Score) -> torch.Tensor:
        if by == "score":
            return self.score_differences
        if self.trace_differences is None:
            raise InputError("There are no trace differences, because `num_probes` was 0; pass None, 1 or more.")
        return self.trace_differences

    def __str__(self) -> str:
        _, draws, count = self.score_differences.shape
        places = ", ".join(f"{value:.4g}" for value in self.noise_to_signal.tolist())
        lines = [
            f"Memorisation of {count} prompt{'s' * (count > 1)} by {draws} draw{'s' * (draws > 1)} at noise {places}",
            f"  score difference  {_range(self.score_difference, self.score_error)}; {self.score_calls} evaluations",
        ]
        if self.trace_differences is not None:
            text = _range(self.trace_difference, self.trace_error)
            lines.append(f"  trace difference  {text}; {self.num_denoiser_calls} evaluations, {self.trace}")
        return "\n".join(lines)


def _range(values: torch.Tensor, errors: torch.Tensor) -> str:
    return f"{float(values.min()):.4g} to {float(values.max()):.4g}, error {float(errors.mean()):.2g} on average"
