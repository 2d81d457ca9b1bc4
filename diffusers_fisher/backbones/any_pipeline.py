"""Backbone of pipelines of a family that the library does not know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .base import Backbone


class AnyPipelineBackbone(Backbone):
    """Knows a pipeline by its call alone: evaluates it at latents and, with an autoencoder, decodes them.

    It has no likelihood, because its guidance and the layout of its latents are not known.
    """

    @property
    def network(self) -> torch.nn.Module | None:
        components = self.pipe.components
        return next((components[name] for name in ("unet", "transformer") if components.get(name) is not None), None)

    @property
    def config(self) -> Mapping[str, Any]:
        return {} if self.network is None else super().config

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.dtype if self.network is None else self._known_network.dtype

    @property
    def factor(self) -> int:
        """Pixels per latent along one side; 0 where the pipeline does not say."""
        return int(vars(self.pipe).get("vae_scale_factor") or 0)

    def size_arguments_of(self, latents: torch.Tensor) -> dict[str, Any]:
        return super().size_arguments_of(latents) if self.factor else {}

    @property
    def standardises_latents(self) -> bool:  # type: ignore[override]
        """Whether the pipeline is one of Stable Diffusion XL's, which all standardise their latents."""
        return self.name.startswith("StableDiffusionXL")

    def pooled(self, conditions: dict[str, Any]) -> None:
        """Returns None: how this family pools its conditions is not known."""
        return None

    def check_scheduler(self) -> None:
        """Checks nothing: what the network was trained with is not known."""
