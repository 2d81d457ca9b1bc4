"""The state of one sampler step: the noisy sample, its noise level and the model's output."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import check_kinds
from ..errors import InputError, check_shape
from .level import NoiseLevel, Timestep, combine, expand
from .prediction import Prediction
from .registry import noise_level, noise_schedule

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

LEARNED_VARIANCES = ("learned", "learned_range")  # the variance types of diffusers' schedulers


@check_kinds
@dataclasses.dataclass(frozen=True)
class DenoisingState:
    """Holds a noisy sample and the model's output at it.

    Args:
        sample: (B, ...) float32 or wider, in the scheduler's carried coordinates.
        model_output: raw model output, same shape as `sample`.
        level: noise level of `sample`.
        prediction: meaning of `model_output`.
        timestep: timestep of the model's evaluation; None is enough for estimators that don't evaluate it again.
        input_scale: factor from `sample` to the model's input; float64 tensor, shape () or (B,).
        features: (B, channels) float32, without a graph: mean and deviation of the network's last hidden layer
            (`diffusers_fisher.features`), which some trace models take; None if they were not recorded.
    """

    sample: torch.Tensor
    model_output: torch.Tensor
    level: NoiseLevel
    prediction: Prediction
    timestep: Timestep | None = None
    input_scale: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones((), dtype=torch.float64))
    features: torch.Tensor | None = None

    def __post_init__(self) -> None:
        sample, output = self.sample.shape, self.model_output.shape
        advice = "Pass sample and output in one layout."
        if len(sample) > 1 and len(output) > 1 and output[1] == 2 * sample[1]:
            advice = "Models with learned variance give two halves: pass the mean half alone."
        check_shape("The model output", output, sample, advice)

    @property
    def known_timestep(self) -> Timestep:
        """Timestep of the model's evaluation, for another evaluation. Raises `InputError` if it is not known."""
        if self.timestep is None:
            raise InputError("The state has no `timestep`, so no denoiser can be evaluated at it; make it with one.")
        return self.timestep

    @property
    def epsilon(self) -> torch.Tensor:
        """Predicted noise, (B, ...), computed directly from the raw output."""
        return self._combine(self.prediction.epsilon_coefficients(self.level))

    @property
    def pred_original_sample(self) -> torch.Tensor:
        """Predicted clean sample E[x_0|x_t] (Tweedie), (B, ...), computed directly from the raw output."""
        return self._combine(self.prediction.original_coefficients(self.level))

    @property
    def score(self) -> torch.Tensor:
        """Gradient of the log density of the noised data, -epsilon/sigma, (B, ...)."""
        return -self.epsilon / expand(self.level.sigma, self.sample)

    def detached(self) -> DenoisingState:
        """Returns the state without a graph."""
        return dataclasses.replace(self, sample=self.sample.detach(), model_output=self.model_output.detach())

    def select_samples(self, rows: torch.Tensor) -> DenoisingState:
        """Returns the state of some of the samples, at a level that all of them share.

        Args:
            rows: (n,) int64, the samples' places in the batch.
        """
        places = rows.to(self.sample.device)
        features = None if self.features is None else self.features[places]
        return dataclasses.replace(
            self, sample=self.sample[places], model_output=self.model_output[places], features=features
        )

    def _combine(self, factors: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return combine(factors, self.sample, self.model_output.to(self.sample.dtype), self.sample)


def split_variance(
    config: Mapping[str, Any], model_output: torch.Tensor, sample: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Splits a model output of twice the sample's channels, where the scheduler takes the variance from it.

    Args:
        config: configuration of the scheduler.

    Returns:
        The half that predicts, (B, C, ...), and the half from which the scheduler takes the variance; None if there is
        no such half.
    """
    is_learned = config.get("variance_type") in LEARNED_VARIANCES
    if is_learned and model_output.ndim > 1 and model_output.shape[1] == 2 * sample.shape[1]:
        prediction, variance = model_output.chunk(2, dim=1)
        return prediction, variance
    return model_output, None


def state_of(
    scheduler: SchedulerMixin, sample: torch.Tensor, model_output: torch.Tensor, timestep: Timestep,
    step_index: int | None = None,
) -> DenoisingState:  # fmt: skip
    """Returns the state of `sample` in the scheduler's carried coordinates.

    Args:
        step_index: argument of `noise_level`.

    Raises:
        UnsupportedError: the scheduler or its prediction type is not known.
        InputError: the timestep is outside the schedule.
    """
    schedule, level = noise_schedule(scheduler), noise_level(scheduler, timestep, step_index)
    scale = schedule.input_scale(level) if step_index is None else schedule.input_scale_in_run(level, timestep)
    return DenoisingState(sample, model_output, level, schedule.prediction, timestep, scale)
