"""What one sampler step knows: the noisy sample, its noise level and the model's output."""

import dataclasses
from typing import Any

import torch

from ..errors import InputError
from .level import NoiseLevel, expand
from .prediction import Prediction
from .schedules import input_scale, noise_level, prediction_of


@dataclasses.dataclass(frozen=True)
class DenoisingState:
    """A noisy sample with the model's output at it.

    Args:
        sample: (B, ...) float32 or wider, in the scheduler's carried coordinates.
        model_output: raw model output, same shape as `sample`.
        level: noise level of `sample`.
        prediction: what `model_output` means.
        timestep: what the model was conditioned on.
        input_scale: the model was fed `input_scale * sample`; float64 tensor, shape () or (B,).
        features: (B, channels) float32, detached: mean and deviation of the network's last hidden layer
            (`diffusers_fisher.features`), which some trace models take; None where they were not recorded.
    """

    sample: torch.Tensor
    model_output: torch.Tensor
    level: NoiseLevel
    prediction: Prediction
    timestep: Any = None
    input_scale: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    features: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.model_output.shape != self.sample.shape:
            raise InputError(
                f"Model output has shape {tuple(self.model_output.shape)}, the sample {tuple(self.sample.shape)}; "
                "they must agree. Models with learned variance give two halves: pass the mean half alone."
            )

    @property
    def epsilon(self) -> torch.Tensor:
        """Predicted noise, (B, ...), directly from the raw output."""
        return self._combine(*self.prediction.epsilon_coefficients(self.level))

    @property
    def pred_original_sample(self) -> torch.Tensor:
        """Predicted clean sample E[x_0|x_t] (Tweedie), (B, ...), directly from the raw output."""
        return self._combine(*self.prediction.original_coefficients(self.level))

    @property
    def score(self) -> torch.Tensor:
        """Gradient of the log density of the noised data, -epsilon/sigma, (B, ...)."""
        return -self.epsilon / expand(self.level.sigma, self.sample)

    def _combine(self, sample_factor: torch.Tensor, output_factor: torch.Tensor) -> torch.Tensor:
        return expand(sample_factor, self.sample) * self.sample + expand(
            output_factor, self.sample
        ) * self.model_output.to(self.sample.dtype)


def state_of(
    scheduler: Any, sample: torch.Tensor, model_output: torch.Tensor, timestep: Any, step_index: int | None = None
) -> DenoisingState:
    """The state of `sample` in the scheduler's carried coordinates. Raises as `noise_level` and `prediction_of` do."""
    level = noise_level(scheduler, timestep, step_index)
    scale = input_scale(scheduler, level)
    if step_index is not None and hasattr(scheduler, "scale_model_input"):
        # The run's own factor, rounded as it was: float32 sigmas would cost a float64 run eight digits.
        scale = scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep).double().cpu()
    return DenoisingState(sample, model_output, level, prediction_of(scheduler), timestep, scale)
