"""Which backbone a pipeline has, by its class."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING

from ..errors import InputError
from .any_pipeline import AnyPipelineBackbone
from .base import Backbone

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

BACKBONES: dict[str, str | type[Backbone]] = {
    "AuraFlowPipeline": ".aura_flow:AuraFlowBackbone",
    "ChromaPipeline": ".chroma:ChromaBackbone",
    "CogView4Pipeline": ".cogview4:CogView4Backbone",
    "DDIMPipeline": ".unconditional:DDIMBackbone",
    "DDPMPipeline": ".unconditional:DDPMBackbone",
    "DiTPipeline": ".dit:DiTBackbone",
    "Flux2KleinPipeline": ".flux2:Flux2Backbone",
    "Flux2Pipeline": ".flux2:Flux2Backbone",
    "FluxPipeline": ".flux:FluxBackbone",
    "HiDreamImagePipeline": ".hidream:HiDreamBackbone",
    "HunyuanDiTPipeline": ".hunyuan_dit:HunyuanDiTBackbone",
    "KandinskyV22Pipeline": ".kandinsky_2_2:Kandinsky22Backbone",
    "LDMPipeline": ".ldm:LDMBackbone",
    "Lumina2Pipeline": ".lumina2:Lumina2Backbone",
    "PixArtAlphaPipeline": ".pixart:PixArtBackbone",
    "PixArtSigmaPipeline": ".pixart:PixArtBackbone",
    "QwenImagePipeline": ".qwen_image:QwenImageBackbone",
    "SanaPipeline": ".sana:SanaBackbone",
    "StableDiffusion3Pipeline": ".stable_diffusion_3:StableDiffusion3Backbone",
    "StableDiffusionPipeline": ".stable_diffusion:StableDiffusionBackbone",
    "StableDiffusionXLPipeline": ".stable_diffusion_xl:StableDiffusionXLBackbone",
    "ZImagePipeline": ".z_image:ZImageBackbone",
}
"""Backbones by the name of the stock pipeline class, loaded at their first use; subclasses inherit them."""

TESTED = frozenset(BACKBONES)
"""Names of the stock pipeline classes whose calls the package's tests compare with their runs."""


SCHEDULER_DOOR = (
    "differentiate its sampling runs: set pipe.scheduler = "
    "fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config) and call it inside "
    "`with pipe.scheduler.differentiable(...)`"
)
"""What works with every pipeline whose scheduler has known noise levels."""


def register_backbone(pipeline: type[DiffusionPipeline], backbone: type[Backbone]) -> None:
    """Registers the backbone of pipelines of class `pipeline` and of its subclasses."""
    BACKBONES[pipeline.__name__] = backbone


def has_tested_call(backbone: Backbone) -> bool:
    """Returns whether the pipeline's call is the stock one of a class that the package has a backbone for."""
    is_stock = inspect.unwrap(backbone.function).__module__.startswith(("diffusers.", "diffusers_fisher."))
    return is_stock and any(parent.__name__ in TESTED for parent in type(backbone.pipe).__mro__)


def other_doors(pipeline: type[DiffusionPipeline]) -> str:
    """Returns the sentence that says how to use pipelines of a class without a backbone."""
    if not takes_latents(pipeline):
        return f"Its call takes no `latents`, so only one way remains: {SCHEDULER_DOOR}."
    return (
        "log_likelihood(pipe, latents=...), guide(pipe, ...) and PipelineDenoiser(pipe, ...) know it by what its own "
        f"call says; or {SCHEDULER_DOOR}."
    )


def takes_latents(pipeline: type[DiffusionPipeline]) -> bool:
    """Returns whether the call of a class can start from `latents`, as it stands or by the backbone of the class."""
    return _entry(pipeline) is not None or "latents" in inspect.signature(pipeline.__call__).parameters


def _entry(pipeline: type[DiffusionPipeline]) -> str | type[Backbone] | None:
    """Returns the registry's entry for a class or the nearest of its parents; None where there is none."""
    return next((BACKBONES[parent.__name__] for parent in pipeline.__mro__ if parent.__name__ in BACKBONES), None)


def backbone_of(pipe: DiffusionPipeline) -> Backbone:
    """Makes the backbone of a pipeline, stock or ours.

    A class without a backbone of its own gets an `AnyPipelineBackbone`, which knows the pipeline by what its call
    says: its latents and their decoding, but not how images become latents.

    Raises:
        InputError: another object than a pipeline.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(
            f"The pipeline is a {type(pipe).__name__}; pass a diffusers pipeline, such as "
            "StableDiffusionPipeline.from_pretrained(...)."
        )
    entry = _entry(type(pipe))
    if isinstance(entry, str):
        module, _, name = entry.partition(":")
        entry = getattr(importlib.import_module(module, __package__), name)
    return AnyPipelineBackbone(pipe) if entry is None else entry(pipe)
