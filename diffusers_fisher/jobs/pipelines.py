"""The pipeline of a run, loaded as its settings say."""

from __future__ import annotations

import dataclasses
from typing import Any

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..backbones import backbone_of
from ..checkpoints import embedded_checkpoint
from ..errors import CheckpointError, InputError
from ..pipelines import fisher_pipeline

EMBEDDED = "embedded"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass
class DenoiserSettings:
    """The pipeline whose denoiser is asked.

    Args:
        path: folder or Hub id of a pipeline; "embedded": the checkpoint that the package ships.
        revision, variant: of the Hub.
        dtype: of its weights.
        compile: its network by torch.compile, which takes a minute and a compiler; training is then faster.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    dtype: str = "float32"
    compile: bool = False


def load_pipeline(settings: DenoiserSettings) -> Any:
    """The Fisher version of the pipeline with its trace model and statistics, its weights frozen.

    Raises:
        InputError: there is no pipeline there; UnsupportedError: one without a Fisher version. CheckpointError: a
            damaged one.
    """
    path = embedded_checkpoint() if settings.path == EMBEDDED else settings.path
    hub = {"revision": settings.revision}
    try:
        index = diffusers.DiffusionPipeline.load_config(path, **hub)
        stock: type[DiffusionPipeline] = getattr(diffusers, index["_class_name"], DiffusionPipeline)
        pipe = fisher_pipeline(stock).from_pretrained(
            path, variant=settings.variant, dtype=getattr(torch, settings.dtype), **hub
        )
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(
            f"'{settings.path}' can't be loaded as a pipeline: {error}. Give a folder or Hub id, or '{EMBEDDED}'."
        ) from error
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    if settings.compile:
        from torch._functorch import config

        config.donated_buffer = False  # AutodiffFisher keeps graphs for further products
        network = backbone_of(pipe).network
        if network is not None:
            network.compile()
    return pipe
