"""Differences of log-likelihoods with their paired error: between prompts, between images, between checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from diffusers.utils import BaseOutput

from ..errors import InputError
from .output import LikelihoodOutput, SquaredErrorOutput
from .squared_error import stratified_error
from .traces import level_error, scatter_error

METHODS = ("squared error", "ode")
MAX_IMAGES = 10  # in print


def check_shared_probes(options: Mapping[str, object]) -> None:
    """Refuses options of `log_likelihood` with which candidates would not share their probes. Raises `InputError`."""
    if options.get("dealt_probes"):
        raise InputError(
            "`dealt_probes` deals each candidate its own random directions, but a comparison needs shared ones. Leave "
            "it out; `num_probes` gives more directions to all."
        )


@dataclasses.dataclass
class PairedLikelihoods(BaseOutput):
    """Holds log-likelihoods of B images under C candidates by the same noise, levels and probes. Float64 on the CPU.

    This is the base class of `LikelihoodComparison`, whose candidates are prompts, and of `CheckpointComparison`.

    Args:
        log_prob: (C, B) nats.
        contributions: nats by each random draw, paired over candidates. "squared error": (n, C, B), `log_prob` by each
            level with its noise, paired over images too. "ode": (levels, k, C, B), parts of `log_prob` by each level
            and probe; k = 0 where nothing was random.
        discretisation_error: (C, B) nats, error of the ODE, mostly equal for all candidates; zero with "squared
            error".
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoisers for the whole table.
        space: "latent" or "pixel".
        method: "squared error" or "ode".
        trace_weights: (levels,) nats of "ode", see `LikelihoodOutput`; None for "squared error".
        fixed_probes: whether "ode" took the same probes at all levels.
        latents: what stands for an image, see `LikelihoodOutput`.
        guidance_scale: as in `LikelihoodOutput`.
    """

    log_prob: torch.Tensor
    contributions: torch.Tensor
    discretisation_error: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str
    method: str
    trace_weights: torch.Tensor | None = None
    fixed_probes: bool = False
    latents: str = "given"
    guidance_scale: float | None = None

    @classmethod
    def of_ode(cls, rows: Sequence[LikelihoodOutput]) -> Self:
        """Makes the table of one output of the ODE per candidate."""
        first = rows[0]
        return cls(
            torch.stack([row.log_prob for row in rows]), torch.stack([row.trace_by_level for row in rows], dim=-2),
            torch.stack([row.discretisation_error for row in rows]), first.dims,
            sum(row.num_denoiser_calls for row in rows), first.space, "ode", first.trace_weights, first.fixed_probes,
            guidance_scale=first.guidance_scale,
        )  # fmt: skip

    @classmethod
    def of_squared_errors(cls, rows: Sequence[SquaredErrorOutput]) -> Self:
        """Makes the table of one output of the method "squared error" per candidate."""
        first, log_prob = rows[0], torch.stack([row.log_prob for row in rows])
        return cls(
            log_prob, torch.stack([row.contributions for row in rows], dim=-2), torch.zeros_like(log_prob), first.dims,
            sum(row.num_denoiser_calls for row in rows), first.space, "squared error",
            guidance_scale=first.guidance_scale,
        )  # fmt: skip

    def _difference_from(self, index: torch.Tensor, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the differences (C, B) from the entries of `index` along `axis`, nats, and their standard errors."""
        difference = self.log_prob - self.log_prob.gather(axis, index)
        draws = self.contributions
        index = index.expand(*draws.shape[:-2], *index.shape)
        return difference, self._error(draws - draws.gather(axis - 2, index))

    def _error(self, differences: torch.Tensor) -> torch.Tensor:
        """Returns the standard error of differences (C, B); zero for an entry against itself."""
        if self.trace_weights is None:
            return stratified_error(differences)
        if differences.shape[1] == 0:
            return torch.zeros_like(self.log_prob)
        return scatter_error(differences.sum(0)) if self.fixed_probes else level_error(differences, self.trace_weights)


@dataclasses.dataclass
class LikelihoodComparison(PairedLikelihoods):
    """Holds log-likelihoods of B images under P prompts by the same noise, levels and probes. Float64 on the CPU.

    The fields are those of `PairedLikelihoods`; its candidates, the first axis of `log_prob`, are the prompts.
    """

    def __str__(self) -> str:
        prompts, images = self.log_prob.shape
        lines = [
            f"Log-likelihoods of {images} {self.space} sample{'s' * (images > 1)} under {prompts} "
            f"prompt{'s' * (prompts > 1)}, by method '{self.method}' with {self.num_denoiser_calls} denoiser calls"
        ]
        if prompts > 1:
            differences, errors = (each.gather(0, self.prompt_order[1:2])[0] for each in self.behind_best_prompt())
            lines += [
                f"  image {index}: prompt {best} is likeliest, the next by {-difference:.4g} +- {error:.2g} nats less"
                for index, (best, difference, error) in enumerate(
                    zip(self.best_prompt.tolist()[:MAX_IMAGES], differences.tolist(), errors.tolist(), strict=False)
                )
            ]
            lines += ["  ..."] * (images > MAX_IMAGES)
        return "\n".join(lines)

    @property
    def best_prompt(self) -> torch.Tensor:
        """(B,) index of each image's likeliest prompt."""
        return self.log_prob.argmax(0)

    @property
    def prompt_order(self) -> torch.Tensor:
        """(P, B) indices of the prompts, the likeliest first, for each image."""
        return self.log_prob.argsort(0, descending=True)

    @property
    def image_order(self) -> torch.Tensor:
        """(P, B) indices of the images, the likeliest first, under each prompt."""
        return self.log_prob.argsort(1, descending=True)

    def behind_best_prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each prompt's difference from the image's best prompt, (P, B) nats, at most 0, and its error."""
        return self._differences_from_best(0)

    def behind_best_image(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each image's difference from the likeliest under the prompt, (P, B) nats, and its standard error.

        Between images, the log-likelihood also depends on how much texture the images have, whatever the prompt is.
        """
        return self._differences_from_best(1)

    def _differences_from_best(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self._difference_from(self.log_prob.argmax(axis, keepdim=True), axis)


@dataclasses.dataclass
class CheckpointComparison(PairedLikelihoods):
    """Holds log-likelihoods of B images under C checkpoints, on the same latents and directions. Float64 on the CPU.

    The fields are those of `PairedLikelihoods`; its candidates, the first axis of `log_prob`, are the checkpoints.
    """

    @property
    def bits_per_dim(self) -> torch.Tensor:
        """-log_prob/(d ln 2), (C, B): lower is likelier. Bits of bins, which are the same for all, are left out."""
        return -self.log_prob / (self.dims * math.log(2))

    def differences(self, reference: int = 0) -> CheckpointDifferences:
        """Returns each checkpoint's difference from checkpoint `reference`, with its errors.

        Raises:
            InputError: there is no such checkpoint.
        """
        checkpoints, images = self.log_prob.shape
        if not 0 <= reference < checkpoints:
            raise InputError(f"`reference` is {reference}; allowed: 0 to {checkpoints - 1}, a checkpoint's place.")
        index = torch.full((1, images), reference)
        return CheckpointDifferences(*self._difference_from(index, 0), self.dims)

    def __str__(self) -> str:
        checkpoints, images = self.log_prob.shape
        means, difference = self.bits_per_dim.mean(1).tolist(), self.differences()
        lines = [
            f"Log-likelihoods of {images} {self.space} sample{'s' * (images > 1)} under {checkpoints} checkpoints, "
            f"with {self.num_denoiser_calls} denoiser calls",
            f"  checkpoint 0: {means[0]:.4f} bits/dim on average",
        ]
        for number in range(1, checkpoints):
            change, error, probes = (
                difference.to_bits(nats[number]).item()
                for nats in (difference.mean, difference.mean_standard_error, difference.mean_probe_error)
            )
            likelier = int((difference.log_prob[number] > 0).sum())
            lines.append(
                f"  checkpoint {number}: {means[number]:.4f} bits/dim, {-change:+.4f} +- {error:.4f} against "
                f"checkpoint 0 ({probes:.4f} by the probes); likelier for {likelier} of {images}"
            )
        return "\n".join(lines)


@dataclasses.dataclass
class CheckpointDifferences(BaseOutput):
    """Holds differences of log-likelihoods between checkpoints, positive where the checkpoint is likelier.

    Args:
        log_prob: (C, B) nats, each checkpoint's log-likelihood minus the reference's.
        standard_error: (C, B) nats, of `log_prob` by the probes, which are the same for all checkpoints.
        dims: dimensions of one sample.
    """

    log_prob: torch.Tensor
    standard_error: torch.Tensor
    dims: int

    @property
    def mean(self) -> torch.Tensor:
        """Mean over the images, (C,) nats."""
        return self.log_prob.mean(1)

    @property
    def mean_standard_error(self) -> torch.Tensor:
        """Standard error of `mean` by the scatter over the images, (C,) nats; infinite for a single image.

        It is the error for other images of the same kind, and contains the probes' error.
        """
        return scatter_error(self.log_prob.T)

    @property
    def mean_probe_error(self) -> torch.Tensor:
        """Standard error of `mean` by the probes alone, (C,) nats: the error for these very images."""
        return self.standard_error.square().sum(1).sqrt() / self.standard_error.shape[1]

    def to_bits(self, nats: torch.Tensor) -> torch.Tensor:
        """Converts nats to bits/dim, with the sign as it is: a likelier checkpoint has fewer bits/dim."""
        return nats / (self.dims * math.log(2))
