"""Stable Diffusion 3 and 3.5 with likelihood and guidance."""

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

from .conditions import encoded_conditions
from .mixin import FisherPipelineMixin


class StableDiffusion3FisherPipeline(FisherPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Flow matching: the likelihood's grid ends at 0.999 of the noise, where the standard prior holds.
    """

    _predicts_flow = True

    def _size_multiple(self) -> int:
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The pooled embeddings that the network itself is given."""
        return encoded_conditions(self, conditions)[2]


StableDiffusion3FisherPipeline.__module__ = "diffusers_fisher"
