"""The abstract noise schedule: what the library asks of a diffusers scheduler.

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

    def _init_step_index(self, timestep: Timestep) -> None: ...

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep) -> torch.Tensor: ...


class NoiseSchedule(abc.ABC):
    """The noise levels of one diffusers scheduler: from its config alone, and inside a run from the run's state.

    A family of schedulers is a subclass that answers three questions:

    - What does a timestep mean? `log_noise_to_signal_at`, `timestep_at` and `log_noise_to_signal_range`, which every
      family must give.
    - In which coordinates does the scheduler carry its sample? `level_of` and `level_of_sigma`, here those of
      variance-preserving samples; `VarianceExplodingSchedule` carries x/alpha.
    - Where does a run keep its level? `level_in_run` and `level_after_step`, here the run's timesteps;
      `RunSigmaSchedule` reads the run's sigmas.

    Args:
        scheduler: a diffusers scheduler; nothing of it is changed but its step index, by `start_step`.

    Attributes:
        is_flow: whether samples are (1 - sigma) x_0 + sigma eps, as networks of flow matching are trained.
        scales_samples: whether a pipeline must multiply its initial noise by the scheduler's `init_noise_sigma` and
            the network's input by `scale_model_input`.
        prediction_types: what the scheduler's config may say of the model's output.
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
        """log(sigma/alpha), float64, at (possibly fractional) timesteps of the model, from the config alone.

        Raises:
            InputError: a timestep outside the schedule.
        """

    @abc.abstractmethod
    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        """The (fractional) timestep, float64, of log(sigma/alpha) = `log_s`; the inverse of `log_noise_to_signal_at`.

        Raises:
            InputError: a level outside the schedule.
        """

    @abc.abstractmethod
    def log_noise_to_signal_range(self) -> tuple[float, float]:
        """log(sigma/alpha) at the clean and at the noisy end of what the model was trained on, both finite."""

    def level_of(self, log_s: torch.Tensor) -> NoiseLevel:
        """The level in carried coordinates with log(sigma/alpha) = `log_s`."""
        return NoiseLevel.from_log_noise_to_signal(log_s)

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        """The level in carried coordinates of one of the run's `sigmas`, float64; DPM-Solver's are sigma/alpha."""
        return NoiseLevel.from_log_noise_to_signal(sigma.log())

    def level_at(self, timestep: Timestep) -> NoiseLevel:
        """The level of the carried sample at `timestep`, from the config alone."""
        return self.level_of(self.log_noise_to_signal_at(timestep))

    def start_step(self, timestep: Timestep) -> int:
        """The index of the run's step at `timestep`, which is about to begin; 0 where levels go by timesteps."""
        return 0

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        """The level of the sample that the run's step `step_index` at `timestep` takes."""
        return self.level_at(timestep)

    def level_after_step(self, timestep: Timestep) -> NoiseLevel:
        """The level of the sample that the run's step at `timestep` has just returned."""
        timesteps = self.scheduler.timesteps
        places = (timesteps == torch.as_tensor(timestep).to(timesteps)).nonzero()
        following = int(places[-1]) + 1 if len(places) else len(timesteps)  # PNDM repeats a timestep: its last place
        return self.level_at(timesteps[following]) if following < len(timesteps) else self.final_level()

    def final_level(self) -> NoiseLevel:
        """The level of the sample that a run ends with."""
        return NoiseLevel.from_alpha_bar(1.0)

    @property
    def awaits_second_stage(self) -> bool:
        """Whether the run is inside a step of two evaluations, which began from a sample before the last one."""
        return False

    def input_scale(self, level: NoiseLevel) -> torch.Tensor:
        """Factor from the carried sample to the model's input, float64, at a level in carried coordinates."""
        return torch.ones_like(level.alpha)

    def input_scale_in_run(self, level: NoiseLevel, timestep: Timestep) -> torch.Tensor:
        """The factor that the run's step at `timestep` itself multiplies the model's input by, float64."""
        return self.input_scale(level)

    @property
    def prediction(self) -> Prediction:
        """What the scheduler expects of the model's output.

        Raises:
            UnsupportedError: a prediction type that the family does not have.
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
        """`count` timesteps from the first to the last, float64, which tell this schedule from others."""
        low, high = self.log_noise_to_signal_range()
        return self.timestep_at(low + torch.linspace(0, 1, count, dtype=torch.float64) * (high - low))


class RunSigmaSchedule(NoiseSchedule):
    """A schedule whose runs keep their levels in `scheduler.sigmas`, one per step.

    The run's sigma is exact where its timestep is not: Karras sigmas differ from their rounded timesteps by up to 4%,
    second-order schedulers repeat timesteps, and the shift of flow matching is known only in the run.
    """

    def start_step(self, timestep: Timestep) -> int:
        """The scheduler's own step index, which schedulers find from the run's first timestep."""
        if self.scheduler.step_index is None:
            self.scheduler._init_step_index(timestep)
        return int(cast(int, self.scheduler.step_index))

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        return self._level_of_entry(self.scheduler.sigmas, step_index)

    def level_after_step(self, timestep: Timestep) -> NoiseLevel:
        # The scheduler has moved its index on to the sample that it has returned.
        return self._level_of_entry(self.scheduler.sigmas, cast(int, self.scheduler.step_index))

    @property
    def awaits_second_stage(self) -> bool:
        # The last step of such schedulers has one stage: it leaves them between two stages, and the run at its end.
        return self._between_stages and cast(int, self.scheduler.step_index) < len(self.scheduler.timesteps)

    @property
    def _between_stages(self) -> bool:
        return not getattr(self.scheduler, "state_in_first_order", True)  # Heun's and KDPM2's alone have it

    def _level_of_entry(self, sigmas: torch.Tensor, index: int) -> NoiseLevel:
        return self.level_of_sigma(sigmas[index].detach().double().cpu())


class VarianceExplodingSchedule(NoiseSchedule):
    """A schedule whose scheduler carries x/alpha, the data plus noise of deviation s: alpha is 1 and sigma is s.

    The network still takes the variance-preserving x = (x/alpha)/sqrt(1 + s^2), so the scheduler has a
    `scale_model_input`, and its initial noise has the deviation `init_noise_sigma`.
    """

    scales_samples = True

    def level_of(self, log_s: torch.Tensor) -> NoiseLevel:
        return self.level_of_sigma(log_s.exp())

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(torch.ones_like(sigma), sigma)

    def input_scale(self, level: NoiseLevel) -> torch.Tensor:
        return 1 / level.norm

    def input_scale_in_run(self, level: NoiseLevel, timestep: Timestep) -> torch.Tensor:
        # The run's own factor, rounded as it was: float32 sigmas would cost a float64 run eight digits.
        return self.scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep).double().cpu()


def as_float64(timestep: Timestep) -> torch.Tensor:
    """A timestep as a float64 tensor on the CPU; a Python number does not pass through float32."""
    return torch.as_tensor(timestep, dtype=torch.float64).detach().cpu()


def check_timestep(timestep: torch.Tensor, last: float) -> None:
    """Raises `InputError` where a timestep lies outside 0 to `last`, or is not a number."""
    if not bool(((timestep >= 0) & (timestep <= last)).all()):
        raise InputError(f"Timestep {timestep.tolist()} lies outside the schedule; allowed: 0 to {last}.")
