"""Saving and loading of our pipelines.

A folder's index is that of the stock pipeline with the stock scheduler, so that any diffusers reads it; our parts lie
beside it: `fisher.json` (the scheduler's class), `latent_statistics.safetensors` (mean,
variance, spectrum) and the folder
`trace_model`.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from diffusers.pipelines.pipeline_loading_utils import _fetch_class_library_tuple
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME

from ..backbones.parts import MARK, STATISTICS, TRACE_MODEL, CheckpointParts, find_file
from ..errors import CheckpointError, UnsupportedError
from ..files import check_safetensors, read_table, save_tensors, write_json
from ..models import FisherTraceModel
from ..schedulers import FisherSchedulerMixin, fisher_scheduler

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)

NEEDED_FILES = (
    ("Scheduler", ["scheduler_config.json"]),
    # Without these a tokenizer loads all the same, and maps every word to the unknown one or knows no length.
    ("Tokenizer", ["tokenizer.json", "vocab.json", "vocab.txt", "*.model"]),
    ("Tokenizer", ["tokenizer_config.json"]),
    ("", ["config.json", "adapter_config.json"]),  # whatever has weights; adapters name the model that they are for
)
"""Files (any one of each list) of components whose class name has the word in it."""


def stock_class(cls: type) -> type[Any]:
    """Returns the first class of diffusers itself in the MRO of `cls`."""
    # Classes that `fisher_scheduler` makes have the module of the stock class.
    parents = (parent for parent in cls.__mro__ if not issubclass(parent, FisherSchedulerMixin))
    return next(parent for parent in parents if parent.__module__.split(".")[0] == "diffusers")


def make_pipeline(pipe: DiffusionPipeline, cls: type[Pipeline], **components: Any) -> Pipeline:
    """Makes a pipeline of class `cls` with the components and settings of `pipe`, except for other `components`."""
    parts = {**pipe.components, **components}
    parameters = inspect.signature(cls.__init__).parameters
    settings = {key: pipe.config[key] for key in parameters if key not in parts and key in pipe.config}
    return cls(**parts, **settings)


def stock_pipeline(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Makes the stock pipeline over the same components, with the stock scheduler."""
    scheduler = pipe.scheduler
    if isinstance(scheduler, FisherSchedulerMixin):
        scheduler = stock_class(type(scheduler)).from_config(pipe.scheduler.config)
    return make_pipeline(pipe, stock_class(type(pipe)), scheduler=scheduler)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuses a scheduler that a saved folder could not restore as itself.

    Raises:
        UnsupportedError: says what to save instead.
    """
    cls = type(scheduler)
    if isinstance(scheduler, FisherSchedulerMixin):
        # The folder names the class of diffusers itself, from which the Fisher class is made again.
        restorable = fisher_scheduler(stock_class(cls)) is cls
    else:
        library, name = _fetch_class_library_tuple(scheduler)
        module = sys.modules.get(library)
        restorable = getattr(module, name, None) is cls and hasattr(module, SchedulerMixin.__name__)
    if not restorable:
        raise UnsupportedError(
            f"A saved folder can't restore the scheduler {cls.__name__} of '{cls.__module__}', and would load as "
            "another; allowed are schedulers of diffusers and their Fisher versions. Save the pipeline with such a "
            "scheduler, and pass yours when you load it: from_pretrained(folder, scheduler=...)."
        )


def save_parts(folder: Path, scheduler: SchedulerMixin, parts: CheckpointParts) -> None:
    """Saves the scheduler's class, the latent statistics and the trace model beside the stock index.

    Files of parts that the pipeline lacks are removed, because they belong to another pipeline that was saved there.
    """
    scheduler_name = type(scheduler).__name__ if isinstance(scheduler, FisherSchedulerMixin) else None
    write_json(folder / MARK, {"scheduler": scheduler_name})
    if parts.trace_model is not None:
        parts.trace_model.save_pretrained(folder / TRACE_MODEL)
    else:
        for name in (FisherTraceModel.config_name, SAFETENSORS_WEIGHTS_NAME):
            (folder / TRACE_MODEL / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there is no such folder, or it has files that are not ours
            (folder / TRACE_MODEL).rmdir()
    if parts.latent_statistics is None:
        (folder / STATISTICS).unlink(missing_ok=True)
        return
    mean, variance = parts.latent_statistics
    description = {"description": "mean and variance of the scaled latents of the training data"}
    tensors = {"mean": mean, "variance": variance}
    if parts.latent_spectrum is not None:
        tensors["spectrum"] = parts.latent_spectrum
    save_tensors(folder / STATISTICS, tensors, description)


def check_folder(source: str | os.PathLike, arguments: Mapping[str, Any]) -> None:
    """Refuses a local checkpoint folder with a missing or damaged file, before anything is loaded.

    Args:
        arguments: arguments of `from_pretrained`. The folders of components that are passed are not read, and neither
            are weights of another variant.

    Raises:
        CheckpointError: names the file at fault.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for name, value in read_index(source, {}).items():
        if name in arguments or not isinstance(value, list) or not value or value[0] is None:
            continue
        if not (folder / name).is_dir():
            raise CheckpointError(f"'{folder}' lacks the folder '{name}' that its model_index.json names.")
        _check_component(folder / name, str(value[-1]), arguments)
    if (folder / TRACE_MODEL).is_dir():
        _check_component(folder / TRACE_MODEL, FisherTraceModel.__name__, {})


def read_index(source: str | os.PathLike, hub_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the model_index.json of a folder or of a repository on the Hub says.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    file = find_file(source, "model_index.json", hub_arguments)
    if file is None:
        raise CheckpointError(
            f"'{source}' has no model_index.json; pass a folder saved by a diffusers pipeline, or install the package "
            "again if it is the embedded checkpoint."
        )
    return read_table(file)


def _check_component(folder: Path, class_name: str, arguments: Mapping[str, Any]) -> None:
    advice = "save or download the checkpoint again."
    for file in sorted(folder.glob("*.json")):
        read_table(file)
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    if (folder / "config.json").is_file() and not weights:
        raise CheckpointError(f"'{folder}' has no weight file; {advice}")
    for word, names in NEEDED_FILES:
        applies = word in class_name if word else bool(weights)
        if applies and not any(any(folder.glob(name)) for name in names):
            raise CheckpointError(f"'{folder}' has no {' or '.join(names)}; {advice}")
    if arguments.get("use_safetensors") is not False:
        for file in _weights_of_variant(folder, arguments.get("variant")):
            check_safetensors(file)


def _weights_of_variant(folder: Path, variant: str | None) -> list[Path]:
    """Returns the safetensors files that diffusers reads: those of the variant, where a component has it."""
    files = sorted(folder.glob("*.safetensors"))
    return [file for file in files if variant and f".{variant}" in file.name] or [
        file for file in files if file.name.count(".") == 1
    ]
