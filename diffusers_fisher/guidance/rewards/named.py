"""Rewards by name, for the command line; and their weighted sums."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

import torch

from ...errors import FisherError, InputError
from ..checks import Reward, name_of
from .models import AestheticReward, ClassifierReward, TextImageReward

FORMS = (
    "classifier:PATH:CLASS (PATH 'embedded' for the embedded checkpoint's), clip[:PATH], siglip[:PATH], "
    "pick_score[:PATH], aesthetic:HEAD_FILE[:CLIP_PATH], python:MODULE:FUNCTION"
)


class WeightedReward:
    """A weighted sum of rewards.

    Args:
        *terms: (weight, reward), in the units of each reward: scale them to comparable size first.
    """

    def __init__(self, *terms: tuple[float, Reward]):
        if not terms or not all(isinstance(term, tuple) and len(term) == 2 and callable(term[1]) for term in terms):
            raise InputError(
                f"A weighted reward was made of {terms!r}; allowed: (weight, reward) pairs, at least one."
            )
        self.terms = terms
        self.__name__ = " + ".join(f"{weight:g} {name_of(reward)}" for weight, reward in terms)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.stack([weight * reward(images, prompts) for weight, reward in self.terms]).sum(0)


def named_reward(name: str) -> Reward:
    """The reward that a line of text names: "classifier:embedded:ankle boot", "clip", "python:my_rewards:redness".

    Raises:
        InputError: another form, a module or function that is not there, a class the classifier has not.
    """
    try:
        return _named(name)
    except FisherError:
        raise
    except (OSError, ValueError) as error:  # of transformers: not there, not reachable, not a model
        raise InputError(f"The reward '{name}' can't be loaded: {error}") from error


def _named(name: str) -> Reward:
    kind, _, rest = name.partition(":")
    parts = rest.split(":") if rest else []
    if kind == "classifier" and len(parts) == 2:
        return ClassifierReward.from_pretrained(_classifier(parts[0]), target=parts[1])
    if kind in ("clip", "siglip", "pick_score") and len(parts) <= 1:
        make = getattr(TextImageReward, kind)
        return make(path=parts[0]) if parts else make()
    if kind == "aesthetic" and 1 <= len(parts) <= 2:
        return AestheticReward.from_pretrained(*parts)
    if kind == "python" and len(parts) == 2:
        return _imported(*parts)
    raise InputError(f"The reward is '{name}'; allowed: {FORMS}.")


def _classifier(path: str) -> str:
    from ...checkpoints import embedded_checkpoint

    return str(Path(embedded_checkpoint()) / "classifier") if path == "embedded" else path


def _imported(module: str, function: str) -> Reward:
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The reward python:{module}:{function} can't be imported: {error}. Run where the module is found, or set "
            "PYTHONPATH."
        ) from error
    if not callable(found):
        raise InputError(f"The reward python:{module}:{function} is a {type(found).__name__}; it must be a function.")
    return found
