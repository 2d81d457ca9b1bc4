"""Check of a pipeline's scheduler."""

from __future__ import annotations

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..errors import UnsupportedError
from ..noise import noise_schedule


def check_scheduler_kind(pipeline: str, scheduler: SchedulerMixin, predicts_flow: bool, scales_samples: bool) -> None:
    """Refuses schedulers of another kind than the network's, or whose scaling the stock call leaves out.

    Args:
        pipeline: class of the pipeline.
        predicts_flow, scales_samples: those of its `Backbone`.

    Raises:
        UnsupportedError: says which scheduler to use.
    """
    schedule = noise_schedule(scheduler)
    name = f"{pipeline} was given {type(scheduler).__name__}"
    if schedule.is_flow != predicts_flow:
        kinds = ("flow matching", "variance-preserving noise")
        expected, other = kinds if predicts_flow else kinds[::-1]
        hint = "FlowMatchEulerDiscreteScheduler" if predicts_flow else "DDIMScheduler"
        raise UnsupportedError(
            f"{name}, a scheduler of {other}, but its network was trained with {expected}. Use {hint} or another "
            "of that family, with the checkpoint's own scheduler config."
        )
    if not scales_samples and schedule.scales_samples:
        raise UnsupportedError(
            f"{name}, whose noise and model input must be scaled, which the stock call does not do. Use "
            "DDIMScheduler, DDPMScheduler or another whose init_noise_sigma is 1."
        )
