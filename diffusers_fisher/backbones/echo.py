"""A scheduler that stands for a pipeline's own in a call, and keeps what the call hands it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils import BaseOutput

from ..noise import Timestep, combine, input_scale, log_noise_to_signal_at, noise_level, noise_schedule, split_variance


class EchoScheduler:
    """Stands for a scheduler whose steps all are at one timestep, and keeps the samples and model outputs it is given.

    `step` and `set_timesteps` take what the scheduler's own take. `step` returns the model output, or with
    `holds_sample` the sample as it was, in the scheduler's own kind of result.

    Args:
        scheduler: scheduler of the pipeline.
        timestep: one timestep, or one per sample, (B,).
        num_steps: number of steps.
        holds_sample: whether a step returns the sample that it was given, rather than the model output.

    Attributes:
        samples: samples that the steps were given.
        outputs: model outputs that the steps were given.
        copies: deep copies that the call has made, as pipelines make for a second kind of samples.
        level_error: largest difference between the noise level at a timestep and that of its sigma, where the call
            gives the scheduler both.
    """

    order = 1
    init_noise_sigma = 1.0

    # `Any`, because the base class of diffusers' schedulers has no `config`, which all of them have.
    def __init__(self, scheduler: Any, timestep: Timestep, num_steps: int = 1, holds_sample: bool = False):
        self._scheduler, self._timestep, self._holds_sample = scheduler, timestep, holds_sample
        self.config = scheduler.config
        timestep = torch.as_tensor(timestep)
        # Pipelines iterate over timesteps: there is one entry per step, which may hold one timestep per sample.
        entry = timestep.reshape(1) if timestep.numel() == 1 else timestep.reshape(1, -1)
        self.timesteps = torch.cat([entry] * num_steps)
        self.samples: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        self.copies: list[EchoScheduler] = []
        self.level_error = 0.0

    @property
    def sigmas(self) -> torch.Tensor:
        """The run's sigmas, (steps + 1,) or (steps + 1, B) float32: the timestep's own, and that of a clean sample."""
        schedule = noise_schedule(self._scheduler)
        log_s = log_noise_to_signal_at(self._scheduler, self._timestep)
        sigma, end = (schedule.sigma_of(each) for each in (log_s, torch.full_like(log_s, -torch.inf)))
        steps = len(self.timesteps)
        return torch.stack([*[sigma] * steps, end]).reshape(steps + 1, *self.timesteps.shape[1:]).float()

    def set_timesteps(self, *args: Any, device: torch.device | str | None = None, **kwargs: Any) -> None:
        self.timesteps = self.timesteps.to(device)
        if kwargs.get("timesteps") is not None and kwargs.get("sigmas") is not None:
            scheduler = copy.copy(self._scheduler)
            scheduler.set_timesteps(*args, **kwargs)
            schedule = noise_schedule(scheduler)
            levels = zip(schedule.level_at(scheduler.timesteps).sigma, scheduler.sigmas.double(), strict=False)
            self.level_error = max(
                float((level - schedule.level_of_sigma(sigma).sigma).abs()) for level, sigma in levels
            )

    def set_begin_index(self, begin_index: int = 0) -> None:
        pass

    def scale_model_input(self, sample: torch.Tensor, timestep: Timestep | None = None) -> torch.Tensor:
        return sample

    def add_noise(self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: Timestep) -> torch.Tensor:
        timesteps = torch.as_tensor(timesteps)
        level = noise_level(self._scheduler, timesteps.reshape(()) if timesteps.numel() == 1 else timesteps)
        level = level.scaled(input_scale(self._scheduler, level))
        return combine((level.alpha, level.sigma), original_samples, noise, original_samples)

    def scale_noise(self, sample: torch.Tensor, timestep: Timestep, noise: torch.Tensor) -> torch.Tensor:
        return self.add_noise(sample, noise, timestep)

    def step(
        self, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, return_dict: bool = True, **_: Any
    ) -> BaseOutput | tuple[torch.Tensor, torch.Tensor]:
        model_output = split_variance(self.config, model_output, sample)[0]
        self.samples.append(sample)
        self.outputs.append(model_output)
        result = sample if self._holds_sample else model_output
        if not return_dict:
            return result, result
        scheduler_class: Any = type(self._scheduler)
        kind = _result_class(scheduler_class)
        return kind(**{field.name: result for field in dataclasses.fields(kind)})

    def __deepcopy__(self, memo: dict[int, object]) -> EchoScheduler:
        duplicate = copy.copy(self)
        duplicate.samples, duplicate.outputs = [], []
        self.copies.append(duplicate)
        return duplicate


def echo_scheduler(
    scheduler: Any, timestep: Timestep, num_steps: int = 1, holds_sample: bool = False
) -> EchoScheduler:
    """Makes an `EchoScheduler` whose methods have the signatures of the scheduler's own, which pipelines inspect."""
    scheduler_class: Any = type(scheduler)
    return _echo_class(scheduler_class)(scheduler, timestep, num_steps, holds_sample)


@functools.cache
def _echo_class(scheduler: type[Any]) -> type[EchoScheduler]:
    methods = {
        name: _with_signature(getattr(EchoScheduler, name), inspect.signature(getattr(scheduler, name)))
        for name in ("step", "set_timesteps")
    }
    return type("EchoScheduler", (EchoScheduler,), methods)


def _with_signature(method: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    """Returns `method` with another signature, by whose names it gets its arguments."""

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs).arguments
        extra = bound.pop("kwargs", {})
        return method(bound.pop("self"), **bound, **extra)

    vars(call)["__signature__"] = signature
    return call


@functools.cache
def _result_class(scheduler: type[Any]) -> type[Any]:
    """Returns the class of the results of a scheduler's `step`, by its annotation; without one `SchedulerOutput`."""
    step = inspect.unwrap(scheduler.step)
    try:
        annotation = inspect.get_annotations(step, eval_str=True).get("return")
    except NameError:  # a name that exists for type checkers alone
        annotation = None
    kinds = getattr(annotation, "__args__", (annotation,))
    results = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseOutput)]
    return results[0] if results else SchedulerOutput
