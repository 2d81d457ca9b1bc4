"""Pipelines with likelihood and guidance: stock classes with `FisherPipelineMixin` before them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TypeVar, overload

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..backbones.parts import checkpoint_parts, set_checkpoint_parts
from ..backbones.registry import DIFFERENTIATE_RUNS
from ..errors import UnsupportedError
from .mixin import FisherPipelineMixin
from .persistence import make_pipeline
from .text_to_image import (
    FluxFisherPipeline,
    PixArtAlphaFisherPipeline,
    PixArtSigmaFisherPipeline,
    StableDiffusion3FisherPipeline,
    StableDiffusionFisherPipeline,
    StableDiffusionXLFisherPipeline,
)
from .transformers_of_text import (
    AuraFlowFisherPipeline,
    ChromaFisherPipeline,
    CogView4FisherPipeline,
    Flux2FisherPipeline,
    Flux2KleinFisherPipeline,
    HiDreamImageFisherPipeline,
    HunyuanDiTFisherPipeline,
    Lumina2FisherPipeline,
    QwenImageFisherPipeline,
    SanaFisherPipeline,
    ZImageFisherPipeline,
)
from .without_text import (
    DDIMFisherPipeline,
    DDPMFisherPipeline,
    DiTFisherPipeline,
    KandinskyV22FisherPipeline,
    LDMFisherPipeline,
)

__all__ = [
    "PIPELINES", "AuraFlowFisherPipeline", "ChromaFisherPipeline", "CogView4FisherPipeline", "DDIMFisherPipeline",
    "DDPMFisherPipeline", "DiTFisherPipeline", "FisherPipelineMixin", "Flux2FisherPipeline",
    "Flux2KleinFisherPipeline", "FluxFisherPipeline", "HiDreamImageFisherPipeline", "HunyuanDiTFisherPipeline",
    "KandinskyV22FisherPipeline", "LDMFisherPipeline", "Lumina2FisherPipeline", "PixArtAlphaFisherPipeline",
    "PixArtSigmaFisherPipeline", "QwenImageFisherPipeline", "SanaFisherPipeline", "StableDiffusion3FisherPipeline",
    "StableDiffusionFisherPipeline", "StableDiffusionXLFisherPipeline", "ZImageFisherPipeline", "custom_pipeline_file",
    "fisher_pipeline",
]  # fmt: skip

PIPELINES: dict[str, type[FisherPipelineMixin]] = {
    name: globals()[name] for name in __all__ if name.endswith("FisherPipeline")
}
"""Our pipeline classes by name."""

for _class in PIPELINES.values():
    _class.__module__ = "diffusers_fisher"  # the public module is what a saved component names

Fisher = TypeVar("Fisher", bound=FisherPipelineMixin)


@overload
def fisher_pipeline(pipe: Fisher) -> Fisher: ...
@overload
def fisher_pipeline(pipe: DiffusionPipeline) -> FisherPipelineMixin: ...
@overload
def fisher_pipeline(pipe: type[DiffusionPipeline]) -> type[FisherPipelineMixin]: ...
def fisher_pipeline(
    pipe: DiffusionPipeline | type[DiffusionPipeline],
) -> FisherPipelineMixin | type[FisherPipelineMixin]:
    """Makes the Fisher version of a stock pipeline over the same components; for a class, returns the Fisher class.

    It has the settings of the pipeline, and the trace model and the latent statistics of the folder that the pipeline
    was loaded from.

    Raises:
        CheckpointError: a damaged file of the trace model or the latent statistics.
        UnsupportedError: the class has no Fisher version.
    """
    if isinstance(pipe, type):
        return _fisher_class(pipe)
    if isinstance(pipe, FisherPipelineMixin):
        return pipe
    result = make_pipeline(pipe, _fisher_class(type(pipe)))
    settings = {name: value for name, value in pipe.config.items() if name not in {*result.config, "_class_name"}}
    result.register_to_config(**{"_name_or_path": None, **settings})
    # Whatever else was set on the pipeline: its progress bar, offload hooks, the names of DiT's classes.
    attributes = {name: value for name, value in vars(pipe).items() if name != "_internal_dict"}
    containers = {name: copy.copy(value) for name, value in attributes.items() if isinstance(value, (dict, list))}
    vars(result).update(attributes | containers)
    set_checkpoint_parts(result, checkpoint_parts(pipe))  # so that copies and pickles have them
    return result


def _fisher_class(cls: type[DiffusionPipeline]) -> type[FisherPipelineMixin]:
    if issubclass(cls, FisherPipelineMixin):
        return cls
    fisher_class = PIPELINES.get(cls.__name__.removesuffix("Pipeline") + "FisherPipeline")
    if fisher_class is None or not issubclass(fisher_class, cls):
        names = ", ".join(name.replace("Fisher", "") for name in PIPELINES)
        raise UnsupportedError(
            f"There is no Fisher version of {cls.__name__}; supported: {names}. {DIFFERENTIATE_RUNS}"
        )
    return fisher_class


def custom_pipeline_file(pipeline: str = "StableDiffusionFisherPipeline") -> str:
    """Returns the file for `DiffusionPipeline.from_pretrained(path, custom_pipeline=..., trust_remote_code=True)`.

    The file for Stable Diffusion is a part of the package. For other pipelines a file of one line is written to the
    cache in which diffusers puts its copy of the file.

    Args:
        pipeline: name of one of our pipeline classes.

    Raises:
        UnsupportedError: another name.
    """
    if pipeline == "StableDiffusionFisherPipeline":
        return str(Path(__file__).parent / "custom_pipeline.py")
    if pipeline not in PIPELINES:
        raise UnsupportedError(f"There is no pipeline '{pipeline}'; there are: {', '.join(PIPELINES)}.")
    from diffusers.utils import dynamic_modules_utils

    file = Path(dynamic_modules_utils.HF_MODULES_CACHE) / "diffusers_fisher" / f"{pipeline}_custom.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"from diffusers_fisher import {pipeline}  # noqa: F401\n", encoding="utf-8")
    return str(file)
