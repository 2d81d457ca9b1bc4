"""A denoising network as a function of its own input."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

import torch

from .noise import DenoisingState, NoiseLevel, Timestep, input_scale, noise_level, prediction_of

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class Denoiser(abc.ABC):
    """A denoising network as a function of its own input (variance preserving for k-diffusion style schedulers).

    Args:
        scheduler: the diffusers scheduler whose timesteps, noise levels and prediction type the network uses.

    Attributes:
        num_calls: evaluations so far.
    """

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = scheduler
        self.prediction = prediction_of(scheduler)
        self.num_calls = 0
        self._features: torch.Tensor | None = None  # of the last evaluation

    @abc.abstractmethod
    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Raw model output at model input `x`, (B, ...), at one timestep, or at one per sample, (B,). Builds a graph
        only where `x` asks for one."""

    def __call__(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Predicted noise at `x`, (B, ...). Cost: one evaluation."""
        return self.state(x, timestep).epsilon

    def state(self, x: torch.Tensor, timestep: Timestep) -> DenoisingState:
        """The denoising state at model input `x` and (possibly fractional) `timestep`. Cost: one evaluation."""
        output = self.model_output(x, timestep)
        return DenoisingState(
            x, output.to(x.dtype), self.level(timestep), self.prediction, timestep, features=self._features
        )

    @property
    def network(self) -> torch.nn.Module | None:
        """The network behind the denoiser; None where there is none, as for closed forms."""
        return None

    def pooled_condition(self) -> torch.Tensor | None:
        """One vector per sample, (B, width), that stands for what the samples are conditioned on; None without."""
        return None

    def level(self, timestep: Timestep) -> NoiseLevel:
        """Noise level of the model's input at `timestep`."""
        carried = noise_level(self.scheduler, timestep)
        return carried.scaled(input_scale(self.scheduler, carried))
