"""One typed object per pipeline family, by which likelihood and guidance know any pipeline."""

from .base import Backbone, PixelBackbone
from .denoiser import PipelineDenoiser
from .registry import BACKBONES, backbone_of, register_backbone

__all__ = ["BACKBONES", "Backbone", "PipelineDenoiser", "PixelBackbone", "backbone_of", "register_backbone"]
