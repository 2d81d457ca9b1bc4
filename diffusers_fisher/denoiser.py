"""A denoising network as a function of its own input."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch

from .arguments import check_kinds
from .noise import DenoisingState, NoiseLevel, Timestep, input_scale, noise_level, prediction_of

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class Denoiser(abc.ABC):
    """Evaluates a denoising network at its own input (variance preserving for k-diffusion style schedulers).

    Args:
        scheduler: diffusers scheduler whose timesteps, noise levels and prediction type the network uses.

    Attributes:
        num_calls: evaluations so far.
        guidance_scale: scale of the outputs' classifier-free guidance; None where the denoiser has no such guidance.
        embedded_guidance_scale: guidance scale that the network takes as an input; None if it takes none.
    """

    guidance_scale: float | None = None
    embedded_guidance_scale: float | None = None

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = scheduler
        self.prediction = prediction_of(scheduler)
        self.num_calls = 0
        self._features: torch.Tensor | None = None  # of the last evaluation

    def __repr__(self) -> str:
        scale = "unguided" if self.guidance_scale is None else f"guidance scale {self.guidance_scale:g}"
        scheduler = type(self.scheduler).__name__
        name = f"{type(self).__name__}: {self.prediction.kind}, {scheduler}, {scale}"
        return f"<{name}, {self.num_calls} evaluations so far>"

    @abc.abstractmethod
    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Returns the raw model output at model input `x`, (B, ...). Builds a graph only where `x` asks for one.

        Args:
            x: (B, ...) model input.
            timestep: one timestep, or one per sample, (B,).
        """

    @check_kinds
    def __call__(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Returns the predicted noise at `x`, (B, ...). Cost: one evaluation."""
        return self.state(x, timestep).epsilon

    @check_kinds
    def state(self, x: torch.Tensor, timestep: Timestep) -> DenoisingState:
        """Returns the denoising state at `x` and a (possibly fractional) timestep. Cost: one evaluation."""
        output = self.model_output(x, timestep)
        return DenoisingState(
            x, output.to(x.dtype), self.level(timestep), self.prediction, timestep, features=self._features
        )

    @property
    def network(self) -> torch.nn.Module | None:
        """The network behind the denoiser; None where there is none, as for closed forms."""
        return None

    @property
    def input_dtype(self) -> torch.dtype | None:
        """dtype to which the network's inputs are rounded; None if they are not rounded."""
        return None

    def select_samples(self, rows: torch.Tensor) -> Denoiser:
        """Returns the denoiser of some of the samples; `rows` (n,) int64 are their places in the batch.

        The base class returns itself. A denoiser that holds something per sample, such as prompts, must return one for
        these samples alone.
        """
        return self

    def pooled_condition(self) -> torch.Tensor | None:
        """Returns one vector per sample, (B, width), that stands for the sample's condition; None without one."""
        return None

    @check_kinds
    def level(self, timestep: Timestep) -> NoiseLevel:
        """Returns the noise level of the model's input at `timestep`."""
        sample_level = noise_level(self.scheduler, timestep)
        return sample_level.scaled(input_scale(self.scheduler, sample_level))
