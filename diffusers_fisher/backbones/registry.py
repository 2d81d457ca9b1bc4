"""Which backbone a pipeline has, by its class."""

from __future__ import annotations

import importlib
import inspect
from typing import TYPE_CHECKING

from ..errors import InputError, UnsupportedError
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


DIFFERENTIATE_RUNS = (
    "Its sampling runs may be differentiated all the same: set pipe.scheduler = "
    "fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config) and call it inside "
    "`with pipe.scheduler.differentiable(...)`."
)
"""What a message about a pipeline without a backbone advises."""


def register_backbone(pipeline: type[DiffusionPipeline], backbone: type[Backbone]) -> None:
    """Registers the backbone of pipelines of class `pipeline` and of its subclasses."""
    BACKBONES[pipeline.__name__] = backbone


def has_tested_call(backbone: Backbone) -> bool:
    """Returns whether the pipeline's call is the stock one of a class that the package has a backbone for."""
    is_stock = inspect.unwrap(backbone.function).__module__.startswith(("diffusers.", "diffusers_fisher."))
    return is_stock and any(parent.__name__ in TESTED for parent in type(backbone.pipe).__mro__)


def backbone_of(pipe: DiffusionPipeline, any_pipeline: bool = False) -> Backbone:
    """Makes the backbone of a pipeline, stock or ours.

    Args:
        any_pipeline: for a class without a backbone, make one that can call the pipeline and knows its autoencoder.

    Raises:
        InputError: another object than a pipeline.
        UnsupportedError: a class without a backbone.
    """
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    if not isinstance(pipe, DiffusionPipeline):
        raise InputError(
            f"The pipeline is a {type(pipe).__name__}; pass a diffusers pipeline, such as "
            "StableDiffusionPipeline.from_pretrained(...)."
        )
    for parent in type(pipe).__mro__:
        entry = BACKBONES.get(parent.__name__)
        if isinstance(entry, str):
            module, _, name = entry.partition(":")
            entry = getattr(importlib.import_module(module, __package__), name)
        if entry is not None:
            return entry(pipe)
    if any_pipeline:
        return AnyPipelineBackbone(pipe)
    raise UnsupportedError(
        f"{type(pipe).__name__} has no backbone; supported: {', '.join(sorted(BACKBONES))}. {DIFFERENTIATE_RUNS}"
    )
