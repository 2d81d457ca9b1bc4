"""Noise levels, prediction types and denoising states: one noise schedule per family of diffusers' schedulers."""

from .level import NoiseLevel, Timestep, combine, expand
from .prediction import PREDICTION_TYPES, Prediction
from .registry import (
    input_scale,
    log_noise_to_signal_at,
    log_noise_to_signal_range,
    noise_level,
    noise_schedule,
    prediction_of,
    register_noise_schedule,
    timestep_at,
)
from .schedule import NoiseSchedule, RunSigmaSchedule, VarianceExplodingSchedule
from .scheduler_families import TableSchedule
from .state import DenoisingState, split_variance, state_of

__all__ = [
    "PREDICTION_TYPES", "DenoisingState", "NoiseLevel", "NoiseSchedule", "Prediction", "RunSigmaSchedule",
    "TableSchedule", "Timestep", "VarianceExplodingSchedule", "combine", "expand", "input_scale",
    "log_noise_to_signal_at", "log_noise_to_signal_range", "noise_level", "noise_schedule", "prediction_of",
    "register_noise_schedule", "split_variance", "state_of", "timestep_at",
]  # fmt: skip
