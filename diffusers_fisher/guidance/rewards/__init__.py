"""Differentiable rewards on image tensors in [0, 1].

A reward is any Python callable `reward(images, prompts) -> (B,)`. This package holds the usual rewards.
"""

from .images import ImageInput
from .measurements import LinearReward, MeasurementReward, gaussian_blur
from .models import AestheticReward, BlipReward, ClassifierReward, TextImageReward
from .named import WeightedReward, named_reward
from .wrappers import FiniteDifferenceReward

__all__ = [
    "AestheticReward", "BlipReward", "ClassifierReward", "FiniteDifferenceReward",
    "ImageInput", "LinearReward", "MeasurementReward", "TextImageReward",
    "WeightedReward", "gaussian_blur", "named_reward",
]  # fmt: skip
