"""One typed object per pipeline family, by which likelihood and guidance know any pipeline."""

from .base import Backbone
from .denoiser import PipelineDenoiser
from .pixels import PixelBackbone
from .registry import BACKBONES, backbone_of, register_backbone

__all__ = ["BACKBONES", "Backbone", "PipelineDenoiser", "PixelBackbone", "backbone_of", "register_backbone"]
