"""Learning rates and batches as functions of the step alone, so that a resumed run equals an unbroken one."""

from typing import Annotated

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from pydantic import Field

from ..errors import InputError
from ..seeds import step_generator
from ..settings import NotNegative, Positive, settings_class


@settings_class
class Optimisation:
    """AdamW with a linear warm-up and a cosine down to zero.

    Args:
        steps: number of optimiser steps.
        batch_size: samples per step, over all processes and accumulated pieces.
        learning_rate: highest learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        warmup_steps: steps before the first one that has the highest learning rate.
        ema_decay: decay of the moving average of the parameters, which is the result of the training; 0 means that
            there is no average.
        save_every: steps between checkpoints.
    """

    steps: Positive
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: float
    warmup_steps: NotNegative
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    save_every: Positive

    def __post_init__(self) -> None:
        if self.warmup_steps >= self.steps:
            allowed = f"from 0 to below `steps` ({self.steps})"
            raise InputError(f"`warmup_steps` is {self.warmup_steps}; allowed: {allowed}.")


def learning_rates(
    optimizer: torch.optim.Optimizer, optimisation: Optimisation, start: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Sets the optimizer's learning rate for step `start`, and returns the schedule of the further steps.

    Call `step()` of the schedule after every step of the optimizer. The first step of a run has a rate above zero: the
    schedule of diffusers, which begins with zero, is taken from its second entry on.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = optimisation.learning_rate
    return get_cosine_schedule_with_warmup(
        optimizer, optimisation.warmup_steps + 1, optimisation.steps + 1, last_epoch=start
    )


def batch_indices(count: int, settings: Optimisation, step: int, seed: int) -> torch.Tensor:
    """Returns the indices of the global batch of `step`: every epoch is one permutation, cut into batches.

    Raises:
        InputError: there are fewer images than a batch takes.
    """
    per_epoch = count // settings.batch_size
    if not per_epoch:
        raise InputError(
            f"`batch_size` is {settings.batch_size}, but there are {count} images; allowed: at most as many."
        )
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=step_generator(seed, "order", epoch))
    return order[position * settings.batch_size : (position + 1) * settings.batch_size]
