"""The noise schedule of each diffusers scheduler class, and functions that look a scheduler's levels up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from ..arguments import check_kinds
from ..errors import UnsupportedError
from .level import NoiseLevel, Timestep
from .prediction import Prediction
from .schedule import NoiseSchedule, SchedulerParts
from .scheduler_families import (
    AncestralKDPM2Schedule,
    ContinuousSchedule,
    EDMSchedule,
    FlowSchedule,
    FlowSigmaSchedule,
    InverseTableSchedule,
    KDiffusionSchedule,
    KDPM2Schedule,
    ReversedFlowSchedule,
    ShiftedFlowSchedule,
    SigmaSchedule,
    TableSchedule,
)

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


def _sigma_or_flow(scheduler: SchedulerMixin) -> NoiseSchedule:
    """Returns the schedule of solvers for both kinds of networks; the config says which kind it is."""
    flow = cast(SchedulerParts, scheduler).config.get("use_flow_sigmas", False)
    return FlowSigmaSchedule(scheduler) if flow else SigmaSchedule(scheduler)


def _flow_match(scheduler: SchedulerMixin) -> NoiseSchedule:
    if "network_log_shift" in vars(scheduler):
        return ShiftedFlowSchedule(scheduler)
    is_reversed = cast(SchedulerParts, scheduler).config.get("invert_sigmas", False)
    return ReversedFlowSchedule(scheduler) if is_reversed else FlowSchedule(scheduler)


def _euler(scheduler: SchedulerMixin) -> NoiseSchedule:
    config = cast(SchedulerParts, scheduler).config
    # For other prediction types the scheduler keeps whole timesteps, whatever its `timestep_type` is.
    is_continuous = (config.get("timestep_type"), config.get("prediction_type")) == ("continuous", "v_prediction")
    return ContinuousSchedule(scheduler) if is_continuous else KDiffusionSchedule(scheduler)


# The keys are class names, so that no scheduler is imported before it is used.
_SCHEDULES: dict[str, Callable[[SchedulerMixin], NoiseSchedule]] = {
    "DDIMScheduler": TableSchedule, "DDPMScheduler": TableSchedule,
    "DDIMParallelScheduler": TableSchedule, "DDPMParallelScheduler": TableSchedule,
    "PNDMScheduler": TableSchedule, "LCMScheduler": TableSchedule,
    "CogVideoXDDIMScheduler": TableSchedule,
    "TCDScheduler": TableSchedule, "DDIMInverseScheduler": InverseTableSchedule,
    "DPMSolverMultistepScheduler": _sigma_or_flow, "DPMSolverMultistepInverseScheduler": _sigma_or_flow,
    "DPMSolverSinglestepScheduler": _sigma_or_flow, "UniPCMultistepScheduler": _sigma_or_flow,
    "DEISMultistepScheduler": _sigma_or_flow, "SASolverScheduler": _sigma_or_flow,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": KDiffusionSchedule,
    "HeunDiscreteScheduler": KDiffusionSchedule, "LMSDiscreteScheduler": KDiffusionSchedule,
    "KDPM2DiscreteScheduler": KDPM2Schedule,
    "KDPM2AncestralDiscreteScheduler": AncestralKDPM2Schedule,
    "EDMEulerScheduler": EDMSchedule, "EDMDPMSolverMultistepScheduler": EDMSchedule,
    "FlowMatchEulerDiscreteScheduler": _flow_match, "FlowMatchHeunDiscreteScheduler": FlowSchedule,
    "FlowMatchLCMScheduler": _flow_match,
}  # fmt: skip


@check_kinds
def register_noise_schedule(class_name: str, schedule: Callable[[SchedulerMixin], NoiseSchedule]) -> None:
    """Sets the noise schedule of a scheduler class and of its subclasses. A later call for the same name replaces it.

        register_noise_schedule("MyScheduler", MyNoiseSchedule)

    Args:
        class_name: name of the scheduler's class, `type(scheduler).__name__`.
        schedule: a subclass of `NoiseSchedule`, or a function that makes one for a scheduler.
    """
    _SCHEDULES[class_name] = schedule


def noise_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    """Returns the noise schedule of `scheduler`, that of its nearest parent class with a schedule.

    Raises:
        UnsupportedError: no parent class has a schedule.
    """
    for parent in type(scheduler).__mro__:
        if parent.__name__ in _SCHEDULES:
            return _SCHEDULES[parent.__name__](scheduler)
    raise UnsupportedError(
        f"Noise levels of {type(scheduler).__name__} are not known; supported schedulers: {', '.join(_SCHEDULES)}, "
        "and subclasses of these. Use one of them, such as FisherDDIMScheduler.from_config(scheduler.config)."
    )


def prediction_of(scheduler: SchedulerMixin) -> Prediction:
    """Returns the prediction type that `scheduler` expects of the model.

    Raises:
        UnsupportedError: the scheduler or its prediction type is not known.
    """
    return noise_schedule(scheduler).prediction


@check_kinds
def noise_level(scheduler: SchedulerMixin, timestep: Timestep, step_index: int | None = None) -> NoiseLevel:
    """Returns the noise level of the sample that `scheduler` carries.

    Args:
        timestep: number or tensor, shape () or (B,), in the model's own unit; fractions are interpolated linearly in
            log(sigma/alpha).
        step_index: index of the run's step. With it the level comes from the run's state (Karras sigmas differ from
            their rounded timesteps by up to 4%, and second-order schedulers repeat timesteps). None: the level comes
            from float64 tables, which are computed from the config.

    Raises:
        UnsupportedError: the scheduler is not known.
        InputError: the timestep is outside the schedule.
    """
    schedule = noise_schedule(scheduler)
    return schedule.level_at(timestep) if step_index is None else schedule.level_in_run(timestep, step_index)


def input_scale(scheduler: SchedulerMixin, level: NoiseLevel) -> torch.Tensor:
    """Returns the factor from the carried sample to the model's input (`scale_model_input`), float64."""
    return noise_schedule(scheduler).input_scale(level)


def log_noise_to_signal_at(scheduler: SchedulerMixin, timestep: Timestep) -> torch.Tensor:
    """Returns log(sigma/alpha), float64, at (possibly fractional) timesteps of the model, from the config alone."""
    return noise_schedule(scheduler).log_noise_to_signal_at(timestep)


def log_noise_to_signal_range(scheduler: SchedulerMixin) -> tuple[float, float]:
    """Returns log(sigma/alpha) at the clean end and at the noisy end of the model's training range, both finite.

    Flow matching and zero terminal SNR end in pure noise, where the ratio is infinite. For them the range ends at
    sigma = 0.999.
    """
    return noise_schedule(scheduler).log_noise_to_signal_range()


def timestep_at(scheduler: SchedulerMixin, log_s: torch.Tensor) -> torch.Tensor:
    """Returns the (fractional) timestep, float64, of log(sigma/alpha); the inverse of `log_noise_to_signal_at`.

    Raises:
        InputError: a level is outside the schedule.
    """
    return noise_schedule(scheduler).timestep_at(log_s)
