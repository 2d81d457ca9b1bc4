"""Guidance by differentiable rewards."""

from .checks import Reward
from .noise_ascent import AscentSettings, GuidedRun, ascend_noise
from .output import GuidanceOutput
from .phases import GuidanceStep
from .posterior import PosteriorGuidance, posterior_guidance
from .regulariser import LikelihoodRegulariser
from .rewards import (
    AestheticReward,
    BlipReward,
    ClassifierReward,
    FiniteDifferenceReward,
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
    "AestheticReward", "AscentSettings", "BlipReward", "ClassifierReward", "FiniteDifferenceReward", "GuidanceOutput",
    "GuidanceStep", "GuidedRun", "ImageInput", "LikelihoodRegulariser", "LinearReward", "MeasurementReward",
    "NoiseWhiteness", "PosteriorGuidance", "Reward", "TextImageReward",
    "WeightedReward", "ascend_noise", "gaussian_blur", "named_reward", "noise_whiteness",
    "posterior_guidance",
]  # fmt: skip
