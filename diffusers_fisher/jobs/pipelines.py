"""Loads the pipeline of a run as its settings say."""

import traceback
from typing import TYPE_CHECKING

import diffusers
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..backbones import backbone_of
from ..checkpoints import embedded_checkpoint
from ..errors import FisherError, InputError, UnsupportedError
from ..settings import Dtype, settings_class

if TYPE_CHECKING:
    from ..pipelines import FisherPipelineMixin

EMBEDDED = {"embedded": "sd", "embedded:sd3": "sd3"}
"""Names that stand for the embedded checkpoints, and what `embedded_checkpoint` calls them."""


@settings_class
class DenoiserSettings:
    """The pipeline that contains the denoiser.

    Args:
        path: folder or Hub id of a pipeline; "embedded" means the Stable Diffusion that the package ships, and
            "embedded:sd3" its Stable Diffusion 3.
        revision, variant: revision and variant of the pipeline on the Hub.
        dtype: dtype of the weights.
        compile: compile the network by `torch.compile`. This takes a minute and needs a C++ compiler; training is
            faster afterwards.
    """

    path: str
    revision: str | None = None
    variant: str | None = None
    dtype: Dtype = "float32"
    compile: bool = False


def _component_at_fault(error: BaseException) -> str:
    """Says in words which component diffusers was loading when the error was raised; empty if it was none."""
    calls = traceback.walk_tb(error.__traceback__)
    names = [frame.f_locals.get("name") for frame, _ in calls if frame.f_code.co_name == "load_sub_model"]
    return f", because of its component '{names[-1]}'" if names else ""


def load_pipeline(settings: DenoiserSettings) -> "FisherPipelineMixin":
    """Loads the Fisher version of the pipeline with its trace model and statistics, and freezes its weights.

    Raises:
        InputError: there is no pipeline at `path`.
        UnsupportedError: the pipeline has no Fisher version.
        CheckpointError: the pipeline's files are damaged.
    """
    from ..pipelines import fisher_pipeline  # loads every pipeline class of diffusers that has a Fisher version

    path = embedded_checkpoint(EMBEDDED[settings.path]) if settings.path in EMBEDDED else settings.path
    try:
        index = diffusers.DiffusionPipeline.load_config(path, revision=settings.revision)
        stock: type[DiffusionPipeline] = getattr(diffusers, index["_class_name"], DiffusionPipeline)
        options = {"variant": settings.variant, "dtype": getattr(torch, settings.dtype)}
        pipe = fisher_pipeline(stock).from_pretrained(path, revision=settings.revision, **options)
    except (FisherError, MemoryError, torch.OutOfMemoryError):
        raise
    # Damaged configurations make diffusers, transformers and tokenizers raise errors of every kind, bare ones too.
    except Exception as error:
        kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
        raise InputError(
            f"'{settings.path}' can't be loaded as a pipeline{_component_at_fault(error)}: {kind}{error}. Give a "
            f"folder or Hub id, or {' or '.join(map(repr, EMBEDDED))}."
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


def named_device(name: str) -> torch.device:
    """Returns the device of a name such as "cuda:1". Raises `InputError` if this machine has no such device."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    # A build of torch without the device's kind raises AssertionError, ImportError or NotImplementedError.
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"`device` is {name!r}, which can't be used here: {reason}. Name a device of this machine, such as 'cpu' "
            "or 'cuda:0'."
        ) from error
    return device


def check_offload(offload: bool, device: torch.device) -> None:
    """Raises `InputError` if `offload` is wanted without an accelerator."""
    if offload and device.type == "cpu":
        raise InputError("`offload` needs an accelerator to load the networks onto, and none was found; leave it out.")


def place_pipeline(pipe: "FisherPipelineMixin", device: torch.device, offload: bool = False) -> "FisherPipelineMixin":
    """Moves a pipeline to a device, or with `offload` each of its networks only while the network works.

    Raises:
        UnsupportedError: diffusers can't offload the pipeline.
    """
    if not offload:
        return pipe.to(device)
    try:
        pipe.enable_model_cpu_offload(device=device)
    except (ValueError, RuntimeError, ImportError) as error:  # no order of its networks, no accelerator, no accelerate
        raise UnsupportedError(
            f"{type(pipe).__name__} can't be offloaded: {error} Leave `offload` out, or save memory with a smaller "
            "batch and a checkpointed decoder."
        ) from error
    return pipe
