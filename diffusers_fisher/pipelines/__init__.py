"""Pipelines with likelihood and guidance."""

from .mixin import FisherPipelineMixin
from .stable_diffusion_fisher import StableDiffusionFisherPipeline

__all__ = ["FisherPipelineMixin", "StableDiffusionFisherPipeline"]
