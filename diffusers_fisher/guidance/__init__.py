"""Guidance by differentiable rewards."""

from .adjoint import GuidanceOutput, Reward, ascend_noise
from .rewards import ClassifierReward, LinearReward, MeasurementReward

__all__ = ["ClassifierReward", "GuidanceOutput", "LinearReward", "MeasurementReward", "Reward", "ascend_noise"]
