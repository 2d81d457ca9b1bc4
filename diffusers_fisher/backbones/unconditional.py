"""Unconditional models in pixels, sampled by DDPM or DDIM."""

from __future__ import annotations

from typing import Any

from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

from ..errors import InputError, UnsupportedError
from .base import Backbone
from .conditions import Condition, Conditions
from .pixels import PixelBackbone
from .stock_calls import make_latents_call


class UnconditionalBackbone(Backbone):
    """Pipelines without prompts, whose calls take a number of samples."""

    network_name = "unet"

    def conditions(
        self, prompt: Condition, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> Conditions:
        if prompt is not None:
            raise InputError(f"{self.name} is unconditional; it takes no `prompt`.")
        number = count if count is not None else call_arguments.get("batch_size", 1) * num_images_per_prompt
        if number < 1:
            raise InputError(f"`batch_size` is {call_arguments['batch_size']}; allowed: at least 1.")
        return [""] * number, {"batch_size": number}

    def null_conditions(self, count: int) -> dict[str, Any]:
        raise UnsupportedError(
            f"{self.name} is unconditional, so it has no prompts to compare with an unconditional branch. Use a "
            "pipeline with prompts or class labels."
        )


class DDPMBackbone(UnconditionalBackbone, PixelBackbone):
    """Knows unconditional models in pixels, sampled by DDPM."""

    latents_call = staticmethod(make_latents_call(DDPMPipeline))


class DDIMBackbone(UnconditionalBackbone, PixelBackbone):
    """Knows unconditional models in pixels, sampled by DDIM."""

    latents_call = staticmethod(make_latents_call(DDIMPipeline))
