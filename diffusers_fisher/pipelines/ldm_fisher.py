"""Unconditional latent diffusion with likelihood and guidance."""

from typing import Any

import torch
from diffusers import LDMPipeline

from ..autoencoder import decoded
from .given_latents import call_with_latents
from .unconditional import UnconditionalMixin


class LDMFisherPipeline(UnconditionalMixin, LDMPipeline):
    """`LDMPipeline` with `log_likelihood` and `guide`, and a call that takes `latents` and gives them.

    Latents are those of the vector-quantised autoencoder before its quantisation, scaled.
    """

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,  # (batch_size, C, h, w) initial noise of unit variance
        **kwargs: Any,
    ) -> Any:
        """As the stock call; also from given `latents`, and to them with `output_type` "latent"."""
        return call_with_latents(
            self, LDMPipeline, batch_size, latents, output_type, return_dict, batch_size=batch_size,
            generator=generator, eta=eta, num_inference_steps=num_inference_steps, **kwargs,
        )  # fmt: skip

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.vqvae.config.block_out_channels) - 1)

    def _size_multiple(self) -> int:
        """The network halves the latents between its blocks."""
        return self._factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        return decoded(self.vqvae, latents)

    def _posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        vae = self.vqvae
        return vae.encode(pixels.to(vae.dtype)).latents.float() * vae.config.scaling_factor, None


LDMFisherPipeline.__module__ = "diffusers_fisher"
