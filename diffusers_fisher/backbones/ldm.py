"""Unconditional latent diffusion."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline

from .given_latents import call_with_latents
from .unconditional import UnconditionalBackbone


def call_ldm(
    pipe: LDMPipeline,
    batch_size: int = 1,
    generator: torch.Generator | list[torch.Generator] | None = None,
    eta: float = 0.0,
    num_inference_steps: int = 50,
    output_type: str = "pil",
    return_dict: bool = True,
    latents: torch.Tensor | None = None,  # (batch_size, C, h, w) initial noise of unit variance
    **kwargs: Any,
) -> Any:
    """Runs the stock call; also from `latents`, and with `output_type` "latent" up to the final latents."""
    return call_with_latents(
        pipe, LDMPipeline, batch_size, latents, output_type, return_dict, batch_size=batch_size,
        generator=generator, eta=eta, num_inference_steps=num_inference_steps, **kwargs,
    )  # fmt: skip


class LDMBackbone(UnconditionalBackbone):
    """Latents of the vector-quantised autoencoder before its quantisation, scaled."""

    autoencoder_name = "vqvae"
    latents_call = staticmethod(call_ldm)

    @property
    def factor(self) -> int:
        return 2 ** (len(self._known_autoencoder.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """The network halves the latents between its blocks."""
        return self.factor * 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self._known_autoencoder
        return vae.encode(pixels.to(vae.dtype)).latents.float() * vae.config.scaling_factor, None
