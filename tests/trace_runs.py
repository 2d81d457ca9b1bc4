"""A tiny trace matching run: a tiny random pipeline saved to disk, a folder of random images."""

from pathlib import Path
from typing import Any

import tiny
import yaml
from image_folders import image_folder, saved_pipeline

from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.training.trace_config import TraceMatchingConfig


def settings(folder: Path, make=tiny.stable_diffusion, corrupt=(), **changes: Any) -> dict[str, Any]:
    """Returns nested settings; `changes` replace whole keys, and in sections only the entries that they name."""
    values = {
        "seed": 0, "output": str(folder / "run"), "target": "residual",
        "denoiser": {"path": saved_pipeline(folder / "pipeline", make)},
        "data": {"path": str(image_folder(folder / "images", corrupt=corrupt)), "caption_column": "text"},
        "model": {"block_out_channels": [4, 8], "head_channels": 8, "time_channels": 8},
        "optimisation": {
            "steps": 6, "batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.0, "warmup_steps": 1,
            "ema_decay": 0.9, "save_every": 2, "log_every": 1,
        },
        "validation": {"every": 4, "samples": 3, "levels": 3, "probes": 2}, "prior_samples": 9,
        "path_images": 8,
    }  # fmt: skip
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(value, dict) and key in values else value
    return values


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    """Writes the settings to a YAML file."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def config_of(folder: Path, **changes: Any) -> TraceMatchingConfig:
    return load_config(write_config(folder, settings(folder, **changes)), TraceMatchingConfig)
