"""Flux with likelihood and guidance."""

from typing import Any

import torch
from diffusers import FluxPipeline

from ..errors import InputError
from .conditions import encoded_conditions
from .mixin import FisherPipelineMixin


class FluxFisherPipeline(FisherPipelineMixin, FluxPipeline):
    """`FluxPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Latents are packed, (B, h/2 * w/2, 4 * C), in `guide` and in outputs; `log_likelihood` takes (B, C, h, w). The
    guidance scale of Flux-dev is an input of the network, so a likelihood is that of one scale: the stock call's
    default unless `guidance_scale` is given.
    """

    _predicts_flow = True

    def _size_multiple(self) -> int:
        return 2 * self.vae_scale_factor

    def _sample_size(self) -> int:
        return self.default_sample_size

    def _latent_channels(self) -> int:
        return self.transformer.config.in_channels // 4

    def _pack(self, latents: torch.Tensor) -> torch.Tensor:
        return self._pack_latents(latents, *latents.shape)

    def _unpack(self, latents: torch.Tensor, pixels: tuple[int, int] | None) -> torch.Tensor:
        if pixels is None:
            raise InputError("Packed latents don't tell the image's shape; give `pixels`, its height and width.")
        return self._unpack_latents(latents, *pixels, self.vae_scale_factor)

    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The pooled embeddings that the network itself is given."""
        return encoded_conditions(self, conditions)[1]

    def _likelihood_guidance(self, call_arguments: dict[str, Any]) -> float:
        if call_arguments.get("true_cfg_scale", 1.0) != 1.0:
            raise InputError(
                f"`true_cfg_scale` is {call_arguments['true_cfg_scale']}; a likelihood is at 1.0, because a guided "
                "output is the score of no density. Leave it out."
            )
        return call_arguments.pop("guidance_scale", 3.5)


FluxFisherPipeline.__module__ = "diffusers_fisher"
