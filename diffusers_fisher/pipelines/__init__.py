"""Pipelines with likelihood and guidance: stock classes with `FisherPipelineMixin` before them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any, TypeVar, overload

import diffusers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones.parts import checkpoint_parts, set_checkpoint_parts
from ..backbones.registry import other_doors, takes_latents
from ..errors import UnsupportedError, warn
from .mixin import HUB_ARGUMENTS, FisherPipelineMixin
from .persistence import make_pipeline, read_index
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
    "PIPELINES", "AuraFlowFisherPipeline", "AutoFisherPipeline", "ChromaFisherPipeline", "CogView4FisherPipeline",
    "DDIMFisherPipeline", "DDPMFisherPipeline", "DiTFisherPipeline", "FisherPipelineMixin", "Flux2FisherPipeline",
    "Flux2KleinFisherPipeline", "FluxFisherPipeline", "HiDreamImageFisherPipeline", "HunyuanDiTFisherPipeline",
    "KandinskyV22FisherPipeline", "LDMFisherPipeline", "Lumina2FisherPipeline", "PixArtAlphaFisherPipeline",
    "PixArtSigmaFisherPipeline", "QwenImageFisherPipeline", "SanaFisherPipeline", "StableDiffusion3FisherPipeline",
    "StableDiffusionFisherPipeline", "StableDiffusionXLFisherPipeline", "ZImageFisherPipeline",
    "custom_pipeline_file", "fisher_pipeline",
]  # fmt: skip

PIPELINES: dict[str, type[FisherPipelineMixin]] = {
    name: globals()[name] for name in __all__ if name.endswith("FisherPipeline") and name in globals()
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


class AutoFisherPipeline:
    """Loads any checkpoint: with the Fisher class of its family, or with the stock class where there is none.

        pipe = AutoFisherPipeline.from_pretrained("folder or name on the Hub", dtype=torch.bfloat16)
        scores = log_likelihood(pipe, latents=latents, prompt="a photo of a coat")

    The functions `log_likelihood`, `guide` and `PipelineDenoiser` take either kind. A pipeline of a family without a
    Fisher class is known by what its own call says (`backbone_of`), which a warning says.
    """

    def __init__(self) -> None:
        raise UnsupportedError(
            "AutoFisherPipeline makes pipelines of other classes. Call AutoFisherPipeline.from_pretrained(...) or "
            "AutoFisherPipeline.from_pipe(pipe)."
        )

    @staticmethod
    @check_kinds
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> DiffusionPipeline:
        """Loads a pipeline by the class that the checkpoint's model_index.json names.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hub.
            **kwargs: arguments of the class's own `from_pretrained`.

        Raises:
            CheckpointError: no model_index.json; a damaged file.
            UnsupportedError: a class that diffusers does not have, or one without a Fisher version whose call takes no
                `latents`. Nothing is loaded.
        """
        source = pretrained_model_name_or_path
        name = read_index(source, {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}).get("_class_name")
        if name not in dir(diffusers):
            raise UnsupportedError(
                f"'{source}' is of the class {name}, which diffusers {diffusers.__version__} does not have. Load it "
                "by its own class, and pass the pipeline to AutoFisherPipeline.from_pipe."
            )
        stock = getattr(diffusers, name)
        fisher_class = _find_fisher_class(stock)
        if fisher_class is not None:
            return fisher_class.from_pretrained(source, **kwargs)
        _say_unknown(stock)
        return stock.from_pretrained(source, **kwargs)

    @staticmethod
    @check_kinds
    def from_pipe(pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Returns `fisher_pipeline(pipe)`, or the pipeline itself where its family has no Fisher class.

        Raises:
            UnsupportedError: there is no Fisher class, and the pipeline's call takes no `latents`.
        """
        if _find_fisher_class(type(pipe)) is not None:
            return fisher_pipeline(pipe)
        _say_unknown(type(pipe))
        return pipe


def _say_unknown(stock: type[DiffusionPipeline]) -> None:
    """Warns that a class has no Fisher version. Raises `UnsupportedError` where nothing but its runs can be used."""
    if not takes_latents(stock):
        raise _unknown_class(stock)
    warn(
        f"There is no Fisher version of {stock.__name__}, so the pipeline is of the stock class. {other_doors(stock)}"
    )


def _unknown_class(stock: type[DiffusionPipeline]) -> UnsupportedError:
    names = ", ".join(name.replace("Fisher", "") for name in PIPELINES)
    return UnsupportedError(
        f"There is no Fisher version of {stock.__name__}; supported: {names}. {other_doors(stock)}"
    )


def _fisher_class(cls: type[DiffusionPipeline]) -> type[FisherPipelineMixin]:
    fisher_class = _find_fisher_class(cls)
    if fisher_class is None:
        raise _unknown_class(cls)
    return fisher_class


def _find_fisher_class(cls: type[DiffusionPipeline]) -> type[FisherPipelineMixin] | None:
    if issubclass(cls, FisherPipelineMixin):
        return cls
    fisher_class = PIPELINES.get(cls.__name__.removesuffix("Pipeline") + "FisherPipeline")
    return fisher_class if fisher_class is not None and issubclass(fisher_class, cls) else None


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
