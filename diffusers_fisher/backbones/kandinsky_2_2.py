"""Kandinsky 2.2."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..errors import InputError, UnsupportedError
from .base import Backbone
from .conditions import Condition, Conditions, repeat_embeddings


class Kandinsky22Backbone(Backbone):
    """Knows the decoder of Kandinsky 2.2, whose conditions are image embeddings that its prior makes of prompts.

    Latents are those of the vector-quantised autoencoder before quantisation, not scaled.
    """

    network_name = "unet"
    autoencoder_name = "movq"
    scales_samples = False

    @property
    def factor(self) -> int:
        return self.pipe.movq_scale_factor

    @property
    def size_multiple(self) -> int:
        """Number of pixels of which sizes must be multiples: the call rounds them up to multiples of the factor's
        square, and the network halves the latents between its blocks."""
        return self.factor * math.lcm(self.factor, 2 ** (len(self.config["block_out_channels"]) - 1))

    def encode(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        movq = self._known_autoencoder
        return movq.encode(pixels.to(movq.dtype)).latents.float(), None

    def decode_scaled(self, latents: torch.Tensor) -> torch.Tensor:
        movq = self._known_autoencoder
        return movq.decode(latents.to(movq.dtype), force_not_quantize=True).sample

    def conditions(
        self, prompt: Condition, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> Conditions:
        names = ["image_embeds", "negative_image_embeds"]
        embeddings = {name: call_arguments[name] for name in names if call_arguments.get(name) is not None}
        missing = [name for name in names[: 1 if count is not None else 2] if name not in embeddings]
        if prompt is not None or missing:
            got = "a prompt" if prompt is not None else f"no `{missing[0]}`"
            raise InputError(
                f"{self.name} is the second of two stages and was given {got}; it takes image embeddings. Pass "
                "`image_embeds` and for guidance `negative_image_embeds`, as KandinskyV22PriorPipeline makes them."
            )
        for name, value in embeddings.items():
            tensor = torch.cat(value) if isinstance(value, list) else value
            embeddings[name] = tensor.to(self.device, self.dtype)
        prompts, conditions = repeat_embeddings(embeddings, call_arguments, count, num_images_per_prompt)
        return prompts, {"negative_image_embeds": None, **conditions}

    def null_conditions(self, count: int) -> dict[str, Any]:
        raise UnsupportedError(
            f"{self.name} has image embeddings for conditions, and its prior alone knows those of the unconditional "
            "branch. Compare image embeddings with each other."
        )

    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        return conditions["image_embeds"]
