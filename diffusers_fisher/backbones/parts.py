"""What a checkpoint's folder keeps beside the stock components: statistics of the training data, and a trace model."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..files import load_tensors, read_table

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from ..models import FisherTraceModel

MARK = "fisher.json"
STATISTICS = "latent_statistics.safetensors"
TRACE_MODEL = "trace_model"

LatentStatistics = tuple[torch.Tensor, torch.Tensor]
"""Mean and variance of the training data's scaled latents, each of one sample's shape."""


@dataclasses.dataclass
class CheckpointParts:
    """Parts of a checkpoint that stock diffusers knows nothing of; None where the checkpoint has none.

    Args:
        latent_spectrum: variances of the coefficients of the discrete cosine transform of the training data's latents
            over the last two axes, of one sample's shape; it belongs to the mean of `latent_statistics`.
    """

    trace_model: FisherTraceModel | None = None
    latent_statistics: LatentStatistics | None = None
    latent_spectrum: torch.Tensor | None = None


_STOCK: weakref.WeakKeyDictionary[DiffusionPipeline, CheckpointParts] = weakref.WeakKeyDictionary()
_ATTRIBUTE = "_checkpoint_parts"  # the attribute of our own pipelines, which copies of them keep


def checkpoint_parts(pipe: DiffusionPipeline) -> CheckpointParts:
    """Returns the parts of a pipeline: those that were set on it, else those of the folder that it was loaded from.

    Nothing is written on a stock pipeline. A folder is read once.

    Raises:
        CheckpointError: a damaged file.
    """
    parts = loaded_parts(pipe)
    if parts is None:
        source = str(pipe.config.get("_name_or_path") or "")
        parts = load_parts(source) if os.path.isdir(source) else CheckpointParts()
        if parts.trace_model is not None:
            torch.nn.Module.to(parts.trace_model, pipe.device)
        _STOCK[pipe] = parts
    return parts


def loaded_parts(pipe: DiffusionPipeline) -> CheckpointParts | None:
    """Returns the parts that were set or read before; None if there are none."""
    return vars(pipe).get(_ATTRIBUTE) or _STOCK.get(pipe)


def set_checkpoint_parts(pipe: DiffusionPipeline, parts: CheckpointParts) -> None:
    """Sets the parts of a pipeline of ours, in the place of those of its folder."""
    vars(pipe)[_ATTRIBUTE] = parts


def checkpoint_moments(
    pipe: DiffusionPipeline, shape: torch.Size, is_packed: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, str]:
    """Returns mean and variance of the training data's latents (None where they are unknown) for samples of `shape`.

    The third entry names the coordinates of the variance: "dct" for the checkpoint's spectrum, which fits latents of
    its own size that are not packed; else "pixel".
    """
    parts = checkpoint_parts(pipe)
    if parts.latent_statistics is None:
        return None, None, "pixel"
    if parts.latent_spectrum is not None and parts.latent_spectrum.shape == shape and not is_packed:
        return parts.latent_statistics[0], parts.latent_spectrum, "dct"
    # Statistics per element fit latents of one size; for other sizes their mean over space stands for them.
    mean, variance = (
        value if value.shape == shape else value.mean(dim=(-2, -1), keepdim=True) for value in parts.latent_statistics
    )
    return mean, variance, "pixel"


def load_parts(source: str | os.PathLike, **hub_arguments: Any) -> CheckpointParts:
    """Loads the parts kept with checkpoint `source`. Raises `CheckpointError` for a damaged file."""
    statistics = load_statistics(source, **hub_arguments)
    return CheckpointParts(
        load_trace_model(source, **hub_arguments),
        None if statistics is None else (statistics["mean"], statistics["variance"]),
        None if statistics is None else statistics.get("spectrum"),
    )


def load_trace_model(source: str | os.PathLike, **hub_arguments: Any) -> FisherTraceModel | None:
    """Loads the trace model kept with checkpoint `source`; None where there is none.

    Raises:
        CheckpointError: one of its files is damaged.
    """
    from ..models import FisherTraceModel

    if find_file(source, f"{TRACE_MODEL}/{FisherTraceModel.config_name}", hub_arguments) is None:
        return None
    return FisherTraceModel.from_pretrained(source, subfolder=TRACE_MODEL, **hub_arguments)


def load_statistics(source: str | os.PathLike, **hub_arguments: Any) -> dict[str, torch.Tensor] | None:
    """Loads the latents' mean and variance, and their spectrum if there is one; None where there are none.

    Raises:
        CheckpointError: a damaged file.
    """
    file = find_file(source, STATISTICS, hub_arguments)
    if file is None:
        return None
    tensors, _ = load_tensors(file)
    if not {"mean", "variance"} <= tensors.keys():
        raise CheckpointError(f"'{file}' holds {sorted(tensors)}; it must hold mean and variance. Save it again.")
    return tensors


def load_scheduler_name(source: str | os.PathLike, **hub_arguments: Any) -> str | None:
    """Returns the name of the Fisher scheduler's class in checkpoint `source`; None for a stock scheduler."""
    file = find_file(source, MARK, hub_arguments)
    return read_table(file).get("scheduler") if file else None


def find_file(source: str | os.PathLike, name: str, hub_arguments: Mapping[str, Any]) -> Path | None:
    """Finds a file of a folder or of a repository on the Hub; returns None where there is no such file."""
    if Path(source).is_dir():
        file = Path(source) / name
        return file if file.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), name, **hub_arguments))
    except (EntryNotFoundError, LocalEntryNotFoundError):  # a checkpoint without our parts, or never fetched
        return None
