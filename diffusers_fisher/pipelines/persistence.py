"""Saving and loading of the Fisher parts of a pipeline folder.

The folder's index is that of the stock pipeline with the stock scheduler, so that any diffusers reads it; our parts
lie beside it: `fisher.json` (the scheduler's class) and `latent_statistics.safetensors` (mean and variance).
"""

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..files import check_safetensors, load_tensors, save_tensors, write_json
from ..schedulers.mixin import FisherSchedulerMixin

MARK = "fisher.json"
STATISTICS = "latent_statistics.safetensors"

Statistics = tuple[torch.Tensor, torch.Tensor]  # mean and variance, each of one sample's shape


def stock_class(cls: type) -> Any:
    """The first class of diffusers itself in the MRO of `cls`."""
    return next(parent for parent in cls.__mro__ if parent.__module__.split(".")[0] == "diffusers")


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
    if pipe.latent_statistics is not None:
        mean, variance = pipe.latent_statistics
        description = {"description": "mean and variance of the scaled latents of the training data"}
        save_tensors(folder / STATISTICS, {"mean": mean, "variance": variance}, description)


def load_parts(
    source: str | os.PathLike, **hub_arguments: Any
) -> tuple[str | None, tuple[torch.Tensor, torch.Tensor] | None]:
    """The scheduler class and the latents' (mean, variance) kept with checkpoint `source`, each None where absent."""
    mark = _find(source, MARK, hub_arguments)
    statistics = _find(source, STATISTICS, hub_arguments)
    scheduler = json.loads(mark.read_text(encoding="utf-8")).get("scheduler") if mark else None
    if statistics is None:
        return scheduler, None
    tensors, _ = load_tensors(statistics)
    return scheduler, (tensors["mean"], tensors["variance"])


def check_folder(source: str | os.PathLike) -> None:
    """Refuses a local checkpoint folder with a missing index or a damaged weight file, before anything is loaded.

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
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name, value in index.items():
        if not isinstance(value, list) or value[0] is None:
            continue
        if not (folder / name).is_dir():
            raise CheckpointError(f"'{folder}' lacks the folder '{name}' that its model_index.json names.")
        weights = [*(folder / name).glob("*.safetensors"), *(folder / name).glob("*.bin")]
        if (folder / name / "config.json").is_file() and not weights:
            raise CheckpointError(f"'{folder / name}' has no weight file; save or download the checkpoint again.")
        for file in sorted((folder / name).glob("*.safetensors")):
            check_safetensors(file)


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
