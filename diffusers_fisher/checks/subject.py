"""The checkpoint under check, with the samples that all lines share."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from ..backbones import Backbone, PipelineDenoiser
from ..backbones.conditions import Condition
from ..backbones.unguided import default_guidance
from ..errors import InputError
from ..images import ImageLike, image_tensor
from ..likelihood.pipeline import unguided_denoiser
from ..noise import DenoisingState, expand, log_noise_to_signal_range, timestep_at
from ..seeds import step_generator
from .lines import CheckLine

NUM_FEW = 4
"""Number of samples of the lines that take many evaluations per sample."""

LEVELS = (0.1, 0.5, 2.0)
"""sigma/alpha of the three levels at which Jacobians are examined: of detail, of shapes and of the layout."""


@dataclasses.dataclass
class Subject:
    """Holds a checkpoint, its samples and what earlier lines have found.

    Args:
        backbone: the pipeline's backbone.
        samples: (N, C, h, w) float32 scaled latents (images in [-1, 1] for pipelines in pixels).
        prompts: one condition per sample; None where the pipeline takes none.
        images: (N, C, H, W) float32 in [0, 1]; None where the samples come from the model itself.
        origin: what the samples are, in words.
        batch_size: number of samples that are evaluated at once.
        seed: seed of all draws.
        reference: folder of `diffusers-fisher likelihood`, or None.
        found: the lines so far by name.
    """

    backbone: Backbone
    samples: torch.Tensor
    prompts: Sequence[str] | Sequence[int] | None
    images: torch.Tensor | None = None
    origin: str = "given"
    batch_size: int = 16
    seed: int = 0
    reference: str | None = None
    found: dict[str, CheckLine] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"`batch_size` is {self.batch_size}; allowed: at least 1.")

    def generator(self, *purpose: str | int) -> torch.Generator:
        """Returns a generator on the CPU for the draws of one purpose."""
        return step_generator(self.seed, *purpose)

    def noise(self, samples: torch.Tensor, *purpose: str | int) -> torch.Tensor:
        """Returns standard normal noise like `samples`, the same on every device."""
        return torch.randn(samples.shape, generator=self.generator(*purpose)).to(samples)

    def some_prompts(self, start: int, stop: int) -> list[str] | list[int] | None:
        """Returns the conditions of the samples from `start` to `stop`."""
        return None if self.prompts is None else list(self.prompts[start:stop])  # type: ignore[return-value]

    def denoiser(self, start: int, stop: int, backbone: Backbone | None = None) -> PipelineDenoiser:
        """Makes the denoiser of the samples from `start` to `stop`, without guidance.

        Args:
            backbone: another backbone than the subject's own.
        """
        chosen = backbone or self.backbone
        samples = self.samples[start:stop]
        return unguided_denoiser(chosen, samples, chosen.unguided_scale({}), self.some_prompts(start, stop), {})

    def found_line(self, name: str) -> CheckLine:
        """Returns an earlier line; one that was not asked for has the status "not run"."""
        return self.found.get(name, CheckLine("not run", ""))

    @property
    def few(self) -> int:
        """Number of samples of the lines that take many evaluations per sample."""
        return min(NUM_FEW, len(self.samples))

    @functools.cached_property
    def states(self) -> list[tuple[DenoisingState, PipelineDenoiser, torch.Tensor]]:
        """The states of two noised samples at `LEVELS`, each with its denoiser and the clean samples."""
        count = min(2, len(self.samples))
        denoiser = self.denoiser(0, count)
        clean = self.backbone.pack(self.samples[:count])
        return [
            (noised_state(denoiser, clean, self.noise(clean, "state", index), log_s), denoiser, clean)
            for index, log_s in enumerate(levels_in_range(denoiser, [math.log(level) for level in LEVELS]))
        ]


@torch.no_grad()
def noised_state(denoiser: PipelineDenoiser, clean: torch.Tensor, noise: torch.Tensor, log_s: float) -> DenoisingState:
    """Returns the state of clean samples with noise at log(sigma/alpha). Cost: one evaluation."""
    timestep = timestep_at(denoiser.scheduler, torch.tensor(log_s, dtype=torch.float64))
    level = denoiser.level(timestep)
    sample = expand(level.alpha, clean) * clean + expand(level.sigma, clean) * noise
    return denoiser.state(sample, timestep.to(torch.float32))


def levels_in_range(denoiser: PipelineDenoiser, log_levels: Sequence[float]) -> list[float]:
    """Returns the levels, moved into the range of the denoiser's schedule."""
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    return [min(max(level, low), high) for level in log_levels]


@torch.no_grad()
def encoded_samples(
    backbone: Backbone, images: ImageLike, data_range: tuple[float, float], batch_size: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Returns checked images (N, C, H, W) in [0, 1], their latents (N, C, h, w), and in words what the latents are.

    Latents are drawn from the encoder's posterior, as in training: with its mean, squared errors of the denoiser come
    out too small.
    """
    pixels = image_tensor(images, backbone.size_multiple, backbone.image_channels, data_range)
    parts: list[torch.Tensor] = []
    origin = "images" if backbone.space == "pixel" else "latents of images, encoded without a posterior"
    for batch in pixels.split(batch_size):
        mean, deviation = backbone.posterior_of(batch)
        if deviation is not None:
            mean = mean + deviation * torch.randn(mean.shape, generator=generator).to(mean)
            origin = "latents of images, drawn from the encoder's posterior"
        parts.append(mean)
    return pixels, torch.cat(parts).float(), origin


def run_arguments(backbone: Backbone, prompts: Condition, count: int, pixels: tuple[int, int]) -> dict[str, Any]:
    """Returns the arguments of a sampling run of the pipeline's call at the call's own guidance."""
    conditions = backbone.conditions(prompts, {}, count)[1]
    guidance = {name: value for name, value in default_guidance(backbone.parameters).items() if value is not None}
    return {**guidance, **backbone.size_arguments(pixels), **conditions}
