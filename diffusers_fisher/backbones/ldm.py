"""Unconditional latent diffusion."""

from __future__ import annotations

import torch
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline

from .stock_calls import make_latents_call
from .unconditional import UnconditionalBackbone


class LDMBackbone(UnconditionalBackbone):
    """Knows unconditional latent diffusion. Its latents are a VQ autoencoder's, scaled and not quantised."""

    autoencoder_name = "vqvae"
    latents_call = staticmethod(make_latents_call(LDMPipeline))

    @property
    def factor(self) -> int:
        return 2 ** (len(self._known_autoencoder.config.block_out_channels) - 1)

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which sizes must be multiples: the network halves the latents between its blocks."""
        return self.factor * 2 ** (len(self.config["block_out_channels"]) - 1)

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self._known_autoencoder
        return vae.encode(pixels.to(vae.dtype)).latents.float() * vae.config.scaling_factor, None
