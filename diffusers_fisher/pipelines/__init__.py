"""Pipelines with likelihood and guidance."""

from pathlib import Path

from .mixin import FisherPipelineMixin
from .stable_diffusion_fisher import StableDiffusionFisherPipeline

__all__ = ["FisherPipelineMixin", "StableDiffusionFisherPipeline", "custom_pipeline_file"]


def custom_pipeline_file() -> str:
    """The file for `DiffusionPipeline.from_pretrained(path, custom_pipeline=..., trust_remote_code=True)`."""
    return str(Path(__file__).parent / "custom_pipeline.py")
