"""Rewards by name, for the command line, and weighted sums of rewards."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ...arguments import check_kinds, fit
from ...checkpoints import embedded_checkpoint
from ...errors import FisherError, InputError
from ..checks import Reward, check_callable, name_of
from .models import AestheticReward, BlipReward, ClassifierReward, TextImageReward

FORMS = (
    "classifier:PATH:CLASS (PATH 'embedded' for the embedded checkpoint), clip[:PATH], siglip[:PATH], "
    "pick_score[:PATH], blip[:PATH], aesthetic:HEAD_FILE[:CLIP_PATH], python:MODULE:FUNCTION"
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

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'({weight:g}, {reward!r})' for weight, reward in self.terms)})"

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
    except (FisherError, MemoryError, torch.OutOfMemoryError):
        raise
    # Damaged files of a model make transformers and tokenizers raise errors of every kind, bare ones too.
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise InputError(f"The reward '{name}' can't be loaded: {kind}{error}") from error


def _load(name: str) -> Reward:
    kind, _, parts_text = name.partition(":")
    parts = parts_text.split(":") if parts_text else []
    if kind == "classifier" and len(parts) == 2:
        path = Path(embedded_checkpoint(), "classifier") if parts[0] == "embedded" else parts[0]
        return ClassifierReward.from_pretrained(path, target=parts[1])
    if kind in ("clip", "siglip", "pick_score") and len(parts) <= 1:
        make = getattr(TextImageReward, kind)
        return make(path=parts[0]) if parts else make()
    if kind == "blip" and len(parts) <= 1:
        return BlipReward.from_pretrained(*parts)
    if kind == "aesthetic" and 1 <= len(parts) <= 2:
        return AestheticReward.from_pretrained(*parts)
    if kind == "python" and len(parts) == 2:
        return _import_function(*parts)
    raise InputError(f"The reward is '{name}'; allowed: {FORMS}.")


def _import_function(module: str, name: str) -> Reward:
    """Returns a variable of a module of the current folder, of PYTHONPATH or of an installed package."""
    try:
        with _current_folder_first():
            function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is a user's code, which may raise anything
        place = traceback.extract_tb(error.__traceback__)[-1]
        line = (
            "" if isinstance(error, ImportError) else f" ({type(error).__name__} in {place.filename}:{place.lineno})"
        )
        raise InputError(
            f"The reward python:{module}:{name} can't be imported: {error}{line}. Run in the module's folder, or set "
            "PYTHONPATH."
        ) from error
    if not callable(function):
        raise InputError(f"The reward python:{module}:{name} is a {type(function).__name__}; it must be a function.")
    return function


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    """Within the block, Python looks for modules in the current folder first, as for `python -m`."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()  # the module's file may be a moment old
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the module has removed it
            sys.path.remove(folder)
