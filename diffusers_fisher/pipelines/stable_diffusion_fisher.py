"""Stable Diffusion 1.x and 2.x with likelihood and guidance."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from ..errors import InputError
from .mixin import FisherPipelineMixin


class StableDiffusionFisherPipeline(FisherPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Made with `from_pretrained` from any Stable Diffusion 1.x or 2.x checkpoint, or from a pipeline at hand with
    `fisher_pipeline(pipe)`. `StableDiffusionFisherPipeline(**pipe.components)` knows of no trace model and no latent
    statistics, which are no components; they may be set.
    """

    @torch.no_grad()
    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The text encoder's pooled output, its last hidden state at the end of the text; the network is given the
        states of all tokens. Embeddings in place of prompts do not tell where the text ends."""
        prompts = conditions.get("prompt")
        if prompts is None:
            raise InputError(
                "The trace model takes the text encoder's pooled output, which `prompt_embeds` do not have. Give "
                "prompts, or estimator=TraceMatchingFisher(trace_model, pooled=...)."
            )
        words = self.tokenizer
        texts = self.maybe_convert_prompt(prompts, words)
        tokens = words(
            texts, padding="max_length", max_length=words.model_max_length, truncation=True, return_tensors="pt"
        ).to(self._execution_device)
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        return self.text_encoder(
            tokens.input_ids, attention_mask=tokens.attention_mask if masked else None
        ).pooler_output

    def _finished(self, images: Any) -> tuple[Any, list[bool]]:
        if self.safety_checker is None:
            return images, []
        checked, found = self.run_safety_checker(2 * images - 1, images.device, self.dtype)
        flagged = [bool(entry) for entry in found]
        # As in the stock call, what the checker puts in place (black) is taken as it is.
        chosen = torch.tensor(flagged, device=images.device)[:, None, None, None]
        return torch.where(chosen, checked, images), flagged


StableDiffusionFisherPipeline.__module__ = "diffusers_fisher"
