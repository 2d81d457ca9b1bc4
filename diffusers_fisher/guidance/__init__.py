"""Guidance by differentiable rewards."""

from .checks import Reward
from .noise_ascent import AscentSettings, GuidedRun, ascend_noise
from .output import GuidanceOutput
from .phases import GuidanceStep
from .posterior import PosteriorGuidance, posterior_guidance
from .rewards import (
    AestheticReward,
    ClassifierReward,
    ImageInput,
    LinearReward,
    MeasurementReward,
    TextImageReward,
    WeightedReward,
    gaussian_blur,
    named_reward,
)
from .whiteness import NoiseWhiteness, noise_whiteness

__all__ = [
    "AestheticReward", "AscentSettings", "ClassifierReward", "GuidanceOutput", "GuidanceStep", "GuidedRun",
    "ImageInput", "LinearReward", "MeasurementReward", "NoiseWhiteness", "PosteriorGuidance", "Reward",
    "TextImageReward", "WeightedReward", "ascend_noise", "gaussian_blur", "named_reward", "noise_whiteness",
    "posterior_guidance",
]  # fmt: skip
