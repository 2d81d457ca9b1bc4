"""Unconditional models in pixels, sampled by DDPM or DDIM."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline

from ..errors import InputError
from .base import Backbone, PixelBackbone
from .conditions import Condition, Conditions
from .given_latents import call_with_latents


def call_ddpm(
    pipe: DDPMPipeline,
    batch_size: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    num_inference_steps: int = 1000,
    output_type: str = "pil",
    return_dict: bool = True,
    latents: torch.Tensor | None = None,  # (batch_size, C, H, W) initial noise of unit variance
) -> Any:
    """Runs the stock call; also from `latents`, and with `output_type` "latent" up to final samples in [-1, 1]."""
    return call_with_latents(
        pipe, DDPMPipeline, batch_size, latents, output_type, return_dict, batch_size=batch_size,
        generator=generator, num_inference_steps=num_inference_steps,
    )  # fmt: skip


def call_ddim(
    pipe: DDIMPipeline,
    batch_size: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    eta: float = 0.0,
    num_inference_steps: int = 50,
    use_clipped_model_output: bool | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    latents: torch.Tensor | None = None,  # (batch_size, C, H, W) initial noise of unit variance
) -> Any:
    """Runs the stock call; also from `latents`, and with `output_type` "latent" up to final samples in [-1, 1]."""
    return call_with_latents(
        pipe, DDIMPipeline, batch_size, latents, output_type, return_dict, batch_size=batch_size,
        generator=generator, eta=eta, num_inference_steps=num_inference_steps,
        use_clipped_model_output=use_clipped_model_output,
    )  # fmt: skip


class UnconditionalBackbone(Backbone):
    """Pipelines without prompts, which are told a number of samples."""

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


class DDPMBackbone(UnconditionalBackbone, PixelBackbone):
    """Unconditional models in pixels, sampled by DDPM."""

    latents_call = staticmethod(call_ddpm)


class DDIMBackbone(UnconditionalBackbone, PixelBackbone):
    """Unconditional models in pixels, sampled by DDIM."""

    latents_call = staticmethod(call_ddim)
