"""Columns of batches, for functions that engines run over a dataset: their checks, and the device of a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy
import pandas
import torch

from ..errors import InputError
from ..jobs.pipelines import named_device

Column = Sequence[Any] | numpy.ndarray  # Any: images and keys of every kind
FAILED = "failed"
"""The `status` of a row that has no result."""


def settings_of(groups: Mapping[type, Sequence[str]], settings: Mapping[str, Any], owner: str) -> dict[type, Any]:
    """Returns the settings of a worker by the class that checks them.

    Args:
        groups: names of the settings, by the class that checks them.
        owner: what has the settings, in the words of the message.

    Raises:
        InputError: there is no setting of this name.
    """
    names = [name for group in groups.values() for name in group]
    unknown = sorted(settings.keys() - set(names))
    if unknown:
        raise InputError(f"`{unknown[0]}` is no setting of {owner}; allowed: {', '.join(sorted(names))}.")
    return {kind: {name: settings[name] for name in group if name in settings} for kind, group in groups.items()}


def check_columns(
    batch: Mapping[str, Column], needed: Sequence[str], optional: Sequence[str], results: Sequence[str], advice: str
) -> None:
    """Checks the names and lengths of a batch's columns.

    Args:
        needed, optional: columns that the batch must have, and may have.
        results: columns that the results have.
        advice: a sentence that says what to do about a missing column.

    Raises:
        InputError: a column is missing, has another length, or would be replaced by the results.
    """
    if not isinstance(batch, Mapping):
        raise InputError(
            f"The batch is a {type(batch).__name__}; allowed: a mapping from names to columns. Use `score_frames` "
            "for pandas frames, and `batched=True` in `datasets`."
        )
    missing = [name for name in needed if name not in batch]
    if missing:
        raise InputError(f"The batch has no column '{missing[0]}'; it has: {', '.join(batch)}. {advice}")
    replaced = [name for name in results if name in batch]
    if replaced:
        raise InputError(
            f"The batch has a column '{replaced[0]}' already, which the results would replace. Rename or remove the "
            "column."
        )
    lengths = {name: len(batch[name]) for name in (*needed, *optional) if name in batch}
    if len(set(lengths.values())) > 1:
        raise InputError(f"The columns of the batch have {lengths} rows; allowed: one number.")


def over_frames(
    function: Callable[[Mapping[str, Column]], dict[str, Column]], frames: Iterable[pandas.DataFrame]
) -> Iterator[pandas.DataFrame]:
    """Yields the results of a function of columns for frames, one frame each, as `mapInPandas` of Spark asks for."""
    for frame in frames:
        yield pandas.DataFrame(function({str(name): frame[name].to_numpy() for name in frame.columns}))


def worker_device(device: str | None) -> torch.device:
    """Returns the device that computes: the accelerator, or the CPU without one, unless `device` names another.

    Raises:
        InputError: this machine has no such device.
    """
    if device is not None:
        return named_device(device)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device("cpu") if accelerator is None else accelerator


def text_column(texts: Iterable[str]) -> numpy.ndarray:
    """Returns an array of texts whose type does not depend on their lengths."""
    return numpy.array(list(texts), dtype=object)
