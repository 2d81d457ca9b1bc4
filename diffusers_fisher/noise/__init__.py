"""Noise levels, prediction types and denoising states of every supported scheduler family."""

from .level import NoiseLevel, expand
from .prediction import PREDICTION_TYPES, Prediction
from .schedules import (
    FAMILIES,
    SchedulerFamily,
    input_scale,
    log_noise_to_signal_at,
    log_noise_to_signal_range,
    log_noise_to_signal_table,
    noise_level,
    prediction_of,
    scheduler_family,
    timestep_at,
)
from .state import DenoisingState, state_of

__all__ = [
    "FAMILIES", "PREDICTION_TYPES", "DenoisingState", "NoiseLevel", "Prediction", "SchedulerFamily", "expand",
    "input_scale", "log_noise_to_signal_at", "log_noise_to_signal_range", "log_noise_to_signal_table", "noise_level",
    "prediction_of", "scheduler_family", "state_of", "timestep_at",
]  # fmt: skip
