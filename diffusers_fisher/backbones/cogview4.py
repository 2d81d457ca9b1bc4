"""CogView4."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .base import Backbone


class CogView4Backbone(Backbone):
    """Knows CogView4: flow matching, on latents that the transformer cuts into patches.

    The network's timesteps are those before the shift of the sigmas, which depends on the size of the image.
    """

    predicts_flow = True
    noise_dtype = torch.float32
    token_indices = (0, None)
    pixel_multiple = 16

    def denoiser_scheduler(self, call_arguments: Mapping[str, Any]) -> SchedulerMixin:
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            shift = float(config["shift"])
        else:
            pixels = self.image_size(call_arguments.get("height"), call_arguments.get("width"))
            names = {"base_image_seq_len": 256, "base_shift": 0.25, "max_shift": 0.75}  # with the call's defaults
            tokens = math.prod(side // (self.factor * self.patch_size) for side in pixels)
            shift = calculate_shift(tokens, *(config.get(name, value) for name, value in names.items()))
            if config["time_shift_type"] == "exponential":
                shift = math.exp(shift)
        scheduler = copy.copy(self.scheduler)
        vars(scheduler)["network_log_shift"] = math.log(shift)
        return scheduler
