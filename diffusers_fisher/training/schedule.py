"""What is done at which step, as functions of the step alone: a resumed run does what an unbroken one would."""

import dataclasses
import math

import torch

from ..errors import InputError
from ..jobs.seeds import step_generator


@dataclasses.dataclass
class Optimisation:
    """AdamW with warm-up and a cosine to zero.

    Args:
        steps: optimiser steps.
        batch_size: samples a step, over all processes and accumulated pieces.
        learning_rate, weight_decay: of AdamW; the learning rate is the highest.
        warmup_steps: linear from zero.
        ema_decay: of the moving average of the parameters, which is what is kept; 0: none.
        save_every: steps between checkpoints.
    """

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    ema_decay: float
    save_every: int


def learning_rate(settings: Optimisation, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batch_indices(count: int, settings: Optimisation, step: int, seed: int) -> torch.Tensor:
    """Indices of the global batch of `step`: consecutive pieces of one permutation an epoch."""
    per_epoch = count // settings.batch_size
    if not per_epoch:
        raise InputError(
            f"`batch_size` is {settings.batch_size}, but there are {count} images; allowed: at most as many."
        )
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=step_generator(seed, "order", epoch))
    return order[position * settings.batch_size : (position + 1) * settings.batch_size]
