"""Unconditional models in pixels, sampled by DDPM, with likelihood and guidance."""

from typing import Any

import torch
from diffusers import DDPMPipeline

from .given_latents import call_with_latents
from .space import PixelSpace
from .unconditional import UnconditionalMixin


class DDPMFisherPipeline(PixelSpace, UnconditionalMixin, DDPMPipeline):
    """`DDPMPipeline` with `log_likelihood` and `guide`, and a call that takes `latents` and gives them.

    Its space is that of the pixels, scaled to [-1, 1].
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 1000,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,  # (batch_size, C, H, W) initial noise of unit variance
    ) -> Any:
        """As the stock call; also from given `latents`, and to them, in [-1, 1], with `output_type` "latent"."""
        return call_with_latents(
            self, DDPMPipeline, batch_size, latents, output_type, return_dict, batch_size=batch_size,
            generator=generator, num_inference_steps=num_inference_steps,
        )  # fmt: skip


DDPMFisherPipeline.__module__ = "diffusers_fisher"
