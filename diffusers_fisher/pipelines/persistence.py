"""Saving and loading of the Fisher parts of a pipeline folder.

The folder's index is that of the stock pipeline with the stock scheduler, so that any diffusers reads it; our parts
lie beside it: `fisher.json` (the scheduler's class), `latent_statistics.safetensors` (mean and variance) and the
folder `trace_model`.
"""

import contextlib
import inspect
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..errors import CheckpointError
from ..files import check_safetensors, load_tensors, read_json, save_tensors, write_json
from ..models import FisherTraceModel
from ..schedulers.mixin import FisherSchedulerMixin

MARK = "fisher.json"
STATISTICS = "latent_statistics.safetensors"
TRACE_MODEL = "trace_model"
NEEDED_FILES = (
    ("Scheduler", ["scheduler_config.json"]),
    # Without these a tokenizer loads all the same, and maps every word to the unknown one or knows no length.
    ("Tokenizer", ["tokenizer.json", "vocab.json", "vocab.txt", "*.model"]),
    ("Tokenizer", ["tokenizer_config.json"]),
    ("", ["config.json"]),  # whatever has weights
)
"""Files (any one of each list) of components whose class name has the word in it."""

Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and variance, each of one sample's shape


def stock_class(cls: type) -> Any:
    """The first class of diffusers itself in the MRO of `cls`."""
    own = (parent for parent in cls.__mro__ if parent.__module__.split(".")[0] == "diffusers")
    return next(parent for parent in own if not issubclass(parent, FisherSchedulerMixin))  # made ones bear its module


def stock_pipeline(pipe: Any) -> Any:
    """The stock pipeline over the same components, with the stock scheduler."""
    cls = stock_class(type(pipe))
    components = dict(pipe.components)
    scheduler: Any = components["scheduler"]
    if issubclass(type(scheduler), FisherSchedulerMixin):
        components["scheduler"] = stock_class(type(scheduler)).from_config(scheduler.config)
    parameters = inspect.signature(cls.__init__).parameters
    settings = {key: pipe.config[key] for key in parameters if key not in components and key in pipe.config}
    return cls(**components, **settings)


def save_parts(pipe: Any, folder: str | os.PathLike) -> None:
    """Writes the Fisher parts of `pipe` beside the stock index in `folder`."""
    folder = Path(folder)
    scheduler = pipe.scheduler if isinstance(pipe.scheduler, FisherSchedulerMixin) else None
    write_json(folder / MARK, {"scheduler": type(scheduler).__name__ if scheduler is not None else None})
    _save_trace_model(pipe.trace_model, folder / TRACE_MODEL)
    if pipe.latent_statistics is None:
        (folder / STATISTICS).unlink(missing_ok=True)  # of another pipeline that was saved there
        return
    mean, variance = pipe.latent_statistics
    description = {"description": "mean and variance of the scaled latents of the training data"}
    save_tensors(folder / STATISTICS, {"mean": mean, "variance": variance}, description)


def _save_trace_model(model: FisherTraceModel | None, folder: Path) -> None:
    if model is not None:
        model.save_pretrained(folder)
        return
    for name in (FisherTraceModel.config_name, SAFETENSORS_WEIGHTS_NAME):
        (folder / name).unlink(missing_ok=True)  # of another pipeline that was saved there
    with contextlib.suppress(OSError):  # not there, or with files that are not ours
        folder.rmdir()


def load_trace_model(source: str | os.PathLike, **hub_arguments: Any) -> FisherTraceModel | None:
    """The trace model kept with checkpoint `source`, None where there is none.

    Raises:
        CheckpointError: one of its files is damaged.
    """
    if _find(source, f"{TRACE_MODEL}/{FisherTraceModel.config_name}", hub_arguments) is None:
        return None
    return FisherTraceModel.from_pretrained(source, subfolder=TRACE_MODEL, **hub_arguments)


def load_parts(
    source: str | os.PathLike, **hub_arguments: Any
) -> tuple[str | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """The scheduler class and the latents' (mean, variance) kept with checkpoint `source`, each None where absent.

    Raises:
        CheckpointError: one of the two files is damaged.
    """
    mark = _find(source, MARK, hub_arguments)
    statistics = _find(source, STATISTICS, hub_arguments)
    scheduler = _read_table(mark).get("scheduler") if mark else None
    if statistics is None:
        return scheduler, None
    tensors, _ = load_tensors(statistics)
    if not {"mean", "variance"} <= tensors.keys():
        raise CheckpointError(
            f"'{statistics}' holds {sorted(tensors)}; it must hold mean and variance. Save it again."
        )
    return scheduler, (tensors["mean"], tensors["variance"])


def check_folder(source: str | os.PathLike, given: Collection[str] = ()) -> None:
    """Refuses a local checkpoint folder with a missing or damaged file, before anything is loaded.

    Args:
        given: names of components that the caller brings, whose folders are not read.

    Raises:
        CheckpointError: names the file at fault.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"'{folder}' has no model_index.json; pass a folder saved by a diffusers pipeline, or install the package "
            "again if it is the embedded checkpoint."
        )
    for name, value in _read_table(folder / "model_index.json").items():
        if name in given or not isinstance(value, list) or not value or value[0] is None:
            continue
        if not (folder / name).is_dir():
            raise CheckpointError(f"'{folder}' lacks the folder '{name}' that its model_index.json names.")
        _check_component(folder / name, str(value[-1]))
    if (folder / TRACE_MODEL).is_dir():
        _check_component(folder / TRACE_MODEL, FisherTraceModel.__name__)


def _check_component(folder: Path, class_name: str) -> None:
    again = "save or download the checkpoint again."
    for file in sorted(folder.glob("*.json")):
        read_json(file)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if (folder / "config.json").is_file() and not weights:
        raise CheckpointError(f"'{folder}' has no weight file; {again}")
    for word, names in NEEDED_FILES:
        concerned = word in class_name if word else bool(weights)
        if concerned and not any(any(folder.glob(name)) for name in names):
            raise CheckpointError(f"'{folder}' has no {' or '.join(names)}; {again}")
    for file in sorted(folder.glob("*.safetensors")):
        check_safetensors(file)


def _read_table(file: Path) -> dict[str, Any]:
    table = read_json(file)
    if not isinstance(table, dict):
        raise CheckpointError(f"Checkpoint file '{file}' holds a {type(table).__name__}; it must hold a JSON object.")
    return table


def _find(source: str | os.PathLike, name: str, hub_arguments: dict[str, Any]) -> Path | None:
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, **hub_arguments))
    except (EntryNotFoundError, LocalEntryNotFoundError):  # a checkpoint without our parts, or never fetched
        return None
