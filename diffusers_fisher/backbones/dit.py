"""Class-conditional DiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline

from .base import Backbone
from .conditions import Condition, Conditions, class_conditions
from .stock_calls import make_latents_call


class DiTBackbone(Backbone):
    """Knows DiT: class labels stand where text pipelines have prompts."""

    scales_samples = False
    pixel_multiple = 1
    latents_call = staticmethod(make_latents_call(DiTPipeline))

    @property
    def factor(self) -> int:
        return 2 ** (len(self._known_autoencoder.config.block_out_channels) - 1)

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self._known_autoencoder
        return vae.decode((1 / vae.config.scaling_factor * latents).to(vae.dtype)).sample  # rounded as the stock call

    def conditions(
        self, prompt: Condition, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> Conditions:
        # The class beyond the last stands for none.
        labels = class_conditions(prompt, self.config["num_embeds_ada_norm"], count, num_images_per_prompt)
        return labels, {"class_labels": labels}

    def null_conditions(self, count: int) -> dict[str, Any]:
        return {"class_labels": [self.config["num_embeds_ada_norm"]] * count}

    @torch.no_grad()
    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """Returns the labels' embeddings in the network's first block, (B, width)."""
        table = self.pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        return table(torch.tensor(conditions["class_labels"], device=table.weight.device))
