"""Pipelines with likelihood and guidance, one file a backbone."""

import importlib
import inspect
from pathlib import Path
from typing import Any

from ..errors import UnsupportedError
from .mixin import FisherPipelineMixin

BACKBONES = {
    "DDIMFisherPipeline": ".ddim_fisher",
    "DDPMFisherPipeline": ".ddpm_fisher",
    "DiTFisherPipeline": ".dit_fisher",
    "FluxFisherPipeline": ".flux_fisher",
    "LDMFisherPipeline": ".ldm_fisher",
    "PixArtAlphaFisherPipeline": ".pixart_alpha_fisher",
    "PixArtSigmaFisherPipeline": ".pixart_sigma_fisher",
    "StableDiffusion3FisherPipeline": ".stable_diffusion_3_fisher",
    "StableDiffusionFisherPipeline": ".stable_diffusion_fisher",
    "StableDiffusionXLFisherPipeline": ".stable_diffusion_xl_fisher",
}
"""Pipeline classes and their files, each loaded when its name is asked for."""

__all__ = ["BACKBONES", "FisherPipelineMixin", "custom_pipeline_file", "fisher_pipeline", *sorted(BACKBONES)]


def __getattr__(name: str) -> Any:
    if name not in BACKBONES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'; it has: {', '.join(__all__)}")
    value = getattr(importlib.import_module(BACKBONES[name], __name__), name)
    globals()[name] = value
    return value


def fisher_pipeline(pipe: Any) -> Any:
    """The Fisher version of a stock pipeline, over the same components; of a pipeline class, the class.

    A trace model and latent statistics in the folder that the pipeline was loaded from are found there.

    Raises:
        UnsupportedError: there is none for that class.
    """
    cls = pipe if isinstance(pipe, type) else type(pipe)
    if issubclass(cls, FisherPipelineMixin):
        return pipe
    name = cls.__name__.removesuffix("Pipeline") + "FisherPipeline"
    made = __getattr__(name) if name in BACKBONES else None
    if made is None or not issubclass(made, cls):
        supported = ", ".join(name.replace("Fisher", "") for name in BACKBONES)
        raise UnsupportedError(
            f"There is no Fisher version of {cls.__name__}; supported: {supported}. Its sampling runs may be "
            "differentiated all the same: set pipe.scheduler = fisher_scheduler(type(pipe.scheduler))"
            ".from_config(pipe.scheduler.config) and call it inside `with pipe.scheduler.differentiable(...)`."
        )
    if pipe is cls:
        return made
    components = pipe.components
    parameters = inspect.signature(cls.__init__).parameters
    settings = {key: pipe.config[key] for key in parameters if key not in components and key in pipe.config}
    made_pipe = made(**components, **settings)
    made_pipe.register_to_config(_name_or_path=pipe.config.get("_name_or_path"))
    if hasattr(pipe, "labels"):
        made_pipe.labels = dict(pipe.labels)  # of DiT, whose names of classes are in no config
    return made_pipe


def custom_pipeline_file(pipeline: str = "StableDiffusionFisherPipeline") -> str:
    """The file for `DiffusionPipeline.from_pretrained(path, custom_pipeline=..., trust_remote_code=True)`.

    For another pipeline than that of Stable Diffusion, whose file is a part of the package, it is written, one line
    long, into the cache where diffusers puts its copy of it.

    Args:
        pipeline: name of one of our pipeline classes.

    Raises:
        UnsupportedError: another name.
    """
    if pipeline == "StableDiffusionFisherPipeline":
        return str(Path(__file__).parent / "custom_pipeline.py")
    if pipeline not in BACKBONES:
        raise UnsupportedError(f"There is no pipeline '{pipeline}'; there are: {', '.join(BACKBONES)}.")
    from diffusers.utils import dynamic_modules_utils

    file = Path(dynamic_modules_utils.HF_MODULES_CACHE) / "diffusers_fisher" / f"{BACKBONES[pipeline][1:]}_custom.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"from diffusers_fisher import {pipeline}  # noqa: F401\n", encoding="utf-8")
    return str(file)
