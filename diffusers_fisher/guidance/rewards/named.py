"""Rewards by name, for the command line, and weighted sums of rewards."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ...arguments import check_kinds, fit
from ...checkpoints import embedded_checkpoint
from ...errors import FisherError, InputError
from ..checks import Reward, check_callable, name_of
from .models import AestheticReward, ClassifierReward, TextImageReward

FORMS = (
    "classifier:PATH:CLASS (PATH 'embedded' for the embedded checkpoint), clip[:PATH], siglip[:PATH], "
    "pick_score[:PATH], aesthetic:HEAD_FILE[:CLIP_PATH], python:MODULE:FUNCTION"
)


class WeightedReward:
    """Computes a weighted sum of rewards.

    Args:
        *terms: (weight, reward) pairs. Rewards have different units: choose weights that make the terms comparable.
    """

    def __init__(self, *terms: tuple[float, Reward]):
        if not terms or not all(isinstance(term, tuple) and len(term) == 2 and callable(term[1]) for term in terms):
            raise InputError(
                f"The terms of the weighted reward are {terms!r}; allowed: (weight, reward) pairs, at least one."
            )
        for _, reward in terms:
            check_callable(reward)
        self.terms = tuple((fit("weight", weight, {"weight": float}), reward) for weight, reward in terms)
        self.__name__ = " + ".join(f"{weight:g} {name_of(reward)}" for weight, reward in self.terms)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([weight * reward(images, prompts) for weight, reward in self.terms]).sum(0)


@check_kinds
def named_reward(name: str) -> Reward:
    """Returns the reward of a name such as "classifier:embedded:ankle boot", "clip" or "python:my_rewards:redness".

    Raises:
        InputError: the name has another form, the module or function does not exist, or the classifier has no such
            class.
    """
    try:
        return _load(name)
    except FisherError:
        raise
    except (OSError, ValueError) as error:  # transformers raises these if the model is missing or out of reach
        raise InputError(f"The reward '{name}' can't be loaded: {error}") from error


def _load(name: str) -> Reward:
    kind, _, rest = name.partition(":")
    parts = rest.split(":") if rest else []
    if kind == "classifier" and len(parts) == 2:
        path = Path(embedded_checkpoint(), "classifier") if parts[0] == "embedded" else parts[0]
        return ClassifierReward.from_pretrained(path, target=parts[1])
    if kind in ("clip", "siglip", "pick_score") and len(parts) <= 1:
        make = getattr(TextImageReward, kind)
        return make(path=parts[0]) if parts else make()
    if kind == "aesthetic" and 1 <= len(parts) <= 2:
        return AestheticReward.from_pretrained(*parts)
    if kind == "python" and len(parts) == 2:
        return _import_function(*parts)
    raise InputError(f"The reward is '{name}'; allowed: {FORMS}.")


def _import_function(module: str, name: str) -> Reward:
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The reward python:{module}:{name} can't be imported: {error}. Run in the module's folder, or set "
            "PYTHONPATH."
        ) from error
    if not callable(function):
        raise InputError(f"The reward python:{module}:{name} is a {type(function).__name__}; it must be a function.")
    return function
