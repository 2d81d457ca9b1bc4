"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .base import Backbone
from .safety import check_images


class StableDiffusionBackbone(Backbone):
    """Knows Stable Diffusion 1.x and 2.x."""

    network_name = "unet"

    @torch.no_grad()
    def pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """Returns the text encoder's pooled output, (B, width): its last hidden state at the end of the text.

        The network itself takes the states of all tokens. Embeddings in the place of prompts do not tell where the
        text ends.
        """
        prompts = conditions.get("prompt")
        if prompts is None:
            raise InputError(
                "The trace model takes the text encoder's pooled output, which `prompt_embeds` do not have. Give "
                "prompts, or estimator=TraceMatchingFisher(trace_model, pooled=...)."
            )
        tokenizer, encoder = self.pipe.tokenizer, self.pipe.text_encoder
        texts = self.pipe.maybe_convert_prompt(prompts, tokenizer)
        tokens = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        ).to(self.device)  # fmt: skip
        uses_mask = getattr(encoder.config, "use_attention_mask", False)  # only some encoders' configurations have it
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask if uses_mask else None).pooler_output

    def finish(self, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
        return check_images(self.pipe, images)
