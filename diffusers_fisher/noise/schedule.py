"""The base classes of noise schedules, which read the noise levels of diffusers' schedulers.

Notation: x_t = alpha_t x_0 + sigma_t eps, eps ~ N(0, I); s = sigma/alpha is the noise-to-signal ratio.

"Carried" coordinates are those of the sample that the scheduler's `step` takes and returns: x_t itself for
variance-preserving and flow-matching schedulers, x_t/alpha_t for k-diffusion style and EDM ones.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch

from ..errors import InputError, UnsupportedError
from .level import NoiseLevel, Timestep
from .prediction import PREDICTION_TYPES, Prediction

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin


class SchedulerParts(Protocol):
    """The parts of diffusers' schedulers that noise schedules read; a family reads only what its schedulers have."""

    config: Mapping[str, Any]
    alphas_cumprod: torch.Tensor  # (T,) float32
    timesteps: torch.Tensor  # of the run
    num_inference_steps: int
    sigmas: torch.Tensor  # of the run, in the scheduler's own unit
    sigmas_interpol: torch.Tensor
    step_index: int | None
    initial_alpha_cumprod: torch.Tensor
    network_log_shift: float  # of log(sigma/alpha), between the network's timestep and the sample's level

    def _init_step_index(self, timestep: Timestep) -> None: ...

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep) -> torch.Tensor: ...


class NoiseSchedule(abc.ABC):
    """Base class that computes the noise levels of one diffusers scheduler, from its config or from a run's state.

    A family of schedulers is a subclass that answers three questions:

    - What does a timestep mean? Every family must implement `log_noise_to_signal_at`, `timestep_at` and
      `log_noise_to_signal_range`.
    - In which coordinates does the scheduler carry its sample? `level_of` and `level_of_sigma` answer it. Here they
      are those of variance-preserving samples; `VarianceExplodingSchedule` carries x/alpha.
    - Where does a run keep its level? `level_in_run` and `level_after_step` answer it. Here they read the run's
      timesteps; `RunSigmaSchedule` reads the run's sigmas.

    Args:
        scheduler: a diffusers scheduler. Only `start_step` changes it, by setting its step index.

    Attributes:
        is_flow: whether samples are (1 - sigma) x_0 + sigma eps, as in the training of flow matching.
        scales_samples: whether a pipeline must multiply its initial noise by the scheduler's `init_noise_sigma` and
            the network's input by `scale_model_input`.
        prediction_types: values that `prediction_type` in the scheduler's config may have.
    """

    is_flow = False
    scales_samples = False
    prediction_types: tuple[str, ...] = ("epsilon", "sample", "v_prediction")

    def __init__(self, scheduler: SchedulerMixin):
        self.scheduler = cast(SchedulerParts, scheduler)

    @property
    def config(self) -> Mapping[str, Any]:
        """The scheduler's config."""
        return self.scheduler.config

    @abc.abstractmethod
    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        """Returns log(sigma/alpha), float64, at (possibly fractional) timesteps of the model, from the config alone.

        Raises:
            InputError: a timestep is outside the schedule.
        """

    @abc.abstractmethod
    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        """Returns the (fractional) timestep, float64, of log(sigma/alpha) = `log_s`.

        It is the inverse of `log_noise_to_signal_at`.

        Raises:
            InputError: a level is outside the schedule.
        """

    @abc.abstractmethod
    def log_noise_to_signal_range(self) -> tuple[float, float]:
        """Returns log(sigma/alpha) at both ends of the model's training range, the clean end first, both finite."""

    def level_of(self, log_s: torch.Tensor) -> NoiseLevel:
        """Returns the level in carried coordinates with log(sigma/alpha) = `log_s`."""
        return NoiseLevel.from_log_noise_to_signal(log_s)

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        """Returns the level in carried coordinates of one of the run's `sigmas`, float64; here it is sigma/alpha."""
        return NoiseLevel.from_log_noise_to_signal(sigma.log())

    def sigma_of(self, log_s: torch.Tensor) -> torch.Tensor:
        """Returns the entry, float64, that a run's `sigmas` have at log(sigma/alpha) = `log_s`."""
        return log_s.exp()

    def level_at(self, timestep: Timestep) -> NoiseLevel:
        """Returns the level of the carried sample at `timestep`, from the config alone."""
        return self.level_of(self.log_noise_to_signal_at(timestep))

    def start_step(self, timestep: Timestep) -> int:
        """Returns the index of the run's step at `timestep`, before it begins; 0 if levels depend on timesteps."""
        return 0

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        """Returns the level of the sample that the run's step `step_index` at `timestep` takes."""
        return self.level_at(timestep)

    def level_after_step(self, timestep: Timestep) -> NoiseLevel:
        """Returns the level of the sample that the run's step at `timestep` has just returned."""
        timesteps = self.scheduler.timesteps
        places = (timesteps == torch.as_tensor(timestep).to(timesteps)).nonzero()
        following = int(places[-1]) + 1 if len(places) else len(timesteps)  # PNDM repeats a timestep
        return self.level_at(timesteps[following]) if following < len(timesteps) else self.final_level()

    def final_level(self) -> NoiseLevel:
        """Returns the level of the sample at the end of a run."""
        return NoiseLevel.from_alpha_bar(1.0)

    @property
    def awaits_second_stage(self) -> bool:
        """Whether the run is inside a step of two evaluations, which began at a sample before the last one."""
        return False

    def input_scale(self, level: NoiseLevel) -> torch.Tensor:
        """Returns the factor from the carried sample to the model's input, float64; `level` is that of the sample."""
        return torch.ones_like(level.alpha)

    def input_scale_in_run(self, level: NoiseLevel, timestep: Timestep) -> torch.Tensor:
        """Returns the factor by which the run itself multiplies the model's input at `timestep`, float64."""
        return self.input_scale(level)

    @property
    def prediction(self) -> Prediction:
        """The meaning of the model's output for the scheduler.

        Raises:
            UnsupportedError: the family does not have the prediction type.
        """
        return Prediction(self._prediction_type())

    def _prediction_type(self) -> str:
        got = self.config.get("prediction_type", "epsilon")
        kind = "sample" if got == "original_sample" else got
        if kind in self.prediction_types:
            return kind
        raise UnsupportedError(
            f"`prediction_type` of {type(self.scheduler).__name__} is '{got}'; supported: "
            f"{', '.join(PREDICTION_TYPES)} (flow_prediction only with use_flow_sigmas=True; EDM: epsilon, "
            "v_prediction). Set it in the scheduler's config to what the model was trained for."
        )

    def spread_timesteps(self, count: int) -> torch.Tensor:
        """Returns `count` timesteps from the first to the last, float64. Their levels identify the schedule."""
        low, high = self.log_noise_to_signal_range()
        return self.timestep_at(low + torch.linspace(0, 1, count, dtype=torch.float64) * (high - low))


class RunSigmaSchedule(NoiseSchedule):
    """Base class of schedules whose runs keep their levels in `scheduler.sigmas`, one per step.

    The run's sigma is exact where its timestep is not: Karras sigmas differ from their rounded timesteps by up to 4%,
    second-order schedulers repeat timesteps, and the shift of flow matching is known only in the run.
    """

    def start_step(self, timestep: Timestep) -> int:
        """Returns the scheduler's own step index, which the scheduler computes from the run's first timestep."""
        if self.scheduler.step_index is None:
            self.scheduler._init_step_index(timestep)
        return int(cast(int, self.scheduler.step_index))

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        return self._level_of_entry(self.scheduler.sigmas, step_index)

    def level_after_step(self, timestep: Timestep) -> NoiseLevel:
        # The scheduler's index already belongs to the sample that it has returned.
        return self._level_of_entry(self.scheduler.sigmas, cast(int, self.scheduler.step_index))

    @property
    def awaits_second_stage(self) -> bool:
        # The last step of such schedulers has one stage: the run ends although they seem to be between two stages.
        return self._between_stages and cast(int, self.scheduler.step_index) < len(self.scheduler.timesteps)

    @property
    def _between_stages(self) -> bool:
        return not getattr(self.scheduler, "state_in_first_order", True)  # only Heun's and KDPM2's have it

    def _level_of_entry(self, sigmas: torch.Tensor, index: int) -> NoiseLevel:
        return self.level_of_sigma(sigmas[index].detach().double().cpu())


class VarianceExplodingSchedule(NoiseSchedule):
    """Base class of schedules whose scheduler carries x/alpha: alpha is 1 and sigma is s.

    The network still takes the variance-preserving x = (x/alpha)/sqrt(1 + s^2). For this reason the scheduler has a
    `scale_model_input`, and its initial noise has the standard deviation `init_noise_sigma`.
    """

    scales_samples = True

    def level_of(self, log_s: torch.Tensor) -> NoiseLevel:
        return self.level_of_sigma(log_s.exp())

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(torch.ones_like(sigma), sigma)

    def input_scale(self, level: NoiseLevel) -> torch.Tensor:
        return 1 / level.norm

    def input_scale_in_run(self, level: NoiseLevel, timestep: Timestep) -> torch.Tensor:
        # This is the run's own factor with its rounding. Another one would differ from the run by float32 roundings.
        return self.scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep).double().cpu()


def as_float64(timestep: Timestep) -> torch.Tensor:
    """Returns a timestep as a float64 tensor on the CPU. A Python number does not pass through float32."""
    return torch.as_tensor(timestep, dtype=torch.float64).detach().cpu()


def check_timestep(timestep: torch.Tensor, last: float) -> None:
    """Raises `InputError` if a timestep lies outside 0 to `last`, or is not a number."""
    if not bool(((timestep >= 0) & (timestep <= last)).all()):
        raise InputError(f"Timestep {timestep.tolist()} lies outside the schedule; allowed: 0 to {last}.")
