"""Unconditional models in pixels, sampled by DDIM, with likelihood and guidance."""

from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler

from .given_latents import call_with_latents
from .space import PixelSpace
from .unconditional import UnconditionalMixin


class DDIMFisherPipeline(PixelSpace, UnconditionalMixin, DDIMPipeline):
    """`DDIMPipeline` with `log_likelihood` and `guide`, and a call that takes `latents` and gives them.

    Its space is that of the pixels, scaled to [-1, 1]. A `DDIMScheduler` is kept, also a Fisher one; any other is
    replaced by one, as the stock pipeline does with every scheduler.
    """

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__(unet, scheduler)
        if isinstance(scheduler, DDIMScheduler):
            self.register_modules(scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        use_clipped_model_output: bool | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,  # (batch_size, C, H, W) initial noise of unit variance
    ) -> Any:
        """As the stock call; also from given `latents`, and to them, in [-1, 1], with `output_type` "latent"."""
        return call_with_latents(
            self, DDIMPipeline, batch_size, latents, output_type, return_dict, batch_size=batch_size,
            generator=generator, eta=eta, num_inference_steps=num_inference_steps,
            use_clipped_model_output=use_clipped_model_output,
        )  # fmt: skip


DDIMFisherPipeline.__module__ = "diffusers_fisher"
