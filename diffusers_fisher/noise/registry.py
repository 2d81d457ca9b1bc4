"""Which noise schedule belongs to which diffusers scheduler, and functions of a scheduler over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch

from ..errors import UnsupportedError
from . import families
from .level import NoiseLevel, Timestep
from .prediction import Prediction
from .schedule import NoiseSchedule, SchedulerParts

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


def _sigma_or_flow(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The schedule of solvers that serve both kinds of networks, which their config tells apart."""
    flow = cast(SchedulerParts, scheduler).config.get("use_flow_sigmas", False)
    return families.FlowSigmaSchedule(scheduler) if flow else families.SigmaSchedule(scheduler)


# By class name, so that no scheduler is imported before it is used.
_SCHEDULES: dict[str, Callable[[SchedulerMixin], NoiseSchedule]] = {
    "DDIMScheduler": families.TableSchedule, "DDPMScheduler": families.TableSchedule,
    "DDIMParallelScheduler": families.TableSchedule, "DDPMParallelScheduler": families.TableSchedule,
    "PNDMScheduler": families.TableSchedule, "LCMScheduler": families.TableSchedule,
    "TCDScheduler": families.TableSchedule, "DDIMInverseScheduler": families.InverseTableSchedule,
    "DPMSolverMultistepScheduler": _sigma_or_flow, "DPMSolverMultistepInverseScheduler": _sigma_or_flow,
    "DPMSolverSinglestepScheduler": _sigma_or_flow, "UniPCMultistepScheduler": _sigma_or_flow,
    "DEISMultistepScheduler": _sigma_or_flow, "SASolverScheduler": _sigma_or_flow,
    "EulerDiscreteScheduler": families.KDiffusionSchedule,
    "EulerAncestralDiscreteScheduler": families.KDiffusionSchedule,
    "HeunDiscreteScheduler": families.KDiffusionSchedule, "LMSDiscreteScheduler": families.KDiffusionSchedule,
    "KDPM2DiscreteScheduler": families.KDPM2Schedule,
    "KDPM2AncestralDiscreteScheduler": families.AncestralKDPM2Schedule,
    "EDMEulerScheduler": families.EDMSchedule, "EDMDPMSolverMultistepScheduler": families.EDMSchedule,
    "FlowMatchEulerDiscreteScheduler": families.FlowSchedule, "FlowMatchHeunDiscreteScheduler": families.FlowSchedule,
    "FlowMatchLCMScheduler": families.FlowSchedule,
}  # fmt: skip


def register_noise_schedule(class_name: str, schedule: Callable[[SchedulerMixin], NoiseSchedule]) -> None:
    """Names the noise schedule of a scheduler class and of its subclasses; a later line for one name replaces it.

        register_noise_schedule("MyScheduler", MyNoiseSchedule)

    Args:
        class_name: name of the scheduler's class, `type(scheduler).__name__`.
        schedule: a subclass of `NoiseSchedule`, or a function that picks one for a scheduler.
    """
    _SCHEDULES[class_name] = schedule


def noise_schedule(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule of `scheduler`, by the nearest of its parent classes that is registered.

    Raises:
        UnsupportedError: no class that it derives from is registered.
    """
    for parent in type(scheduler).__mro__:
        if parent.__name__ in _SCHEDULES:
            return _SCHEDULES[parent.__name__](scheduler)
    raise UnsupportedError(
        f"Noise levels of {type(scheduler).__name__} are not known; supported schedulers: {', '.join(_SCHEDULES)}, "
        "and subclasses of these. Use one of them, such as FisherDDIMScheduler.from_config(scheduler.config)."
    )


def prediction_of(scheduler: SchedulerMixin) -> Prediction:
    """The prediction type that `scheduler` expects of the model.

    Raises:
        UnsupportedError: unknown scheduler or prediction type.
    """
    return noise_schedule(scheduler).prediction


def noise_level(scheduler: SchedulerMixin, timestep: Timestep, step_index: int | None = None) -> NoiseLevel:
    """Noise level of the sample that `scheduler` carries.

    Args:
        timestep: number or tensor, shape () or (B,), in the model's own unit; fractions are interpolated linearly in
            log(sigma/alpha).
        step_index: the run's own step. Inside a run the level comes from the run's state (Karras sigmas differ from
            their rounded timesteps by up to 4%, second-order schedulers repeat timesteps); None: float64 tables
            recomputed from the config.

    Raises:
        UnsupportedError: unknown scheduler.
        InputError: a timestep outside the schedule.
    """
    schedule = noise_schedule(scheduler)
    return schedule.level_at(timestep) if step_index is None else schedule.level_in_run(timestep, step_index)


def input_scale(scheduler: SchedulerMixin, level: NoiseLevel) -> torch.Tensor:
    """Factor between the carried sample and what the model is fed (`scale_model_input`), float64."""
    return noise_schedule(scheduler).input_scale(level)


def log_noise_to_signal_at(scheduler: SchedulerMixin, timestep: Timestep) -> torch.Tensor:
    """log(sigma/alpha), float64, at (possibly fractional) timesteps of the model, from the config alone."""
    return noise_schedule(scheduler).log_noise_to_signal_at(timestep)


def log_noise_to_signal_range(scheduler: SchedulerMixin) -> tuple[float, float]:
    """log(sigma/alpha) at the clean and at the noisy end of what the model was trained on, both finite.

    Flow matching and zero terminal SNR end in pure noise, where the ratio is infinite: there the range stops at
    sigma = 0.999 of the whole.
    """
    return noise_schedule(scheduler).log_noise_to_signal_range()


def timestep_at(scheduler: SchedulerMixin, log_s: torch.Tensor) -> torch.Tensor:
    """The (fractional) timestep, float64, of noise levels log(sigma/alpha); inverse of `log_noise_to_signal_at`.

    Raises:
        InputError: a level outside the schedule.
    """
    return noise_schedule(scheduler).timestep_at(log_s)
