"""Class-conditional DiT with likelihood and guidance."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiTPipeline

from ..guidance.checks import Reward
from ..guidance.noise_ascent import GuidanceOutput
from ..likelihood import LikelihoodOutput
from .conditions import class_conditions
from .given_latents import call_with_latents
from .mixin import FisherPipelineMixin


class DiTFisherPipeline(FisherPipelineMixin, DiTPipeline):
    """`DiTPipeline` with `log_likelihood` and `guide`, and a call that takes `latents` and gives them.

    Class labels stand where text pipelines have prompts; a reward gets them as its second argument.
    """

    _scales_input = False

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 4.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 50,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,  # (B, C, h, w) initial noise of unit variance
    ) -> Any:
        """As the stock call; also from given `latents`, and to them with `output_type` "latent"."""
        return call_with_latents(
            self, DiTPipeline, len(class_labels), latents, output_type, return_dict, class_labels=class_labels,
            guidance_scale=guidance_scale, generator=generator, num_inference_steps=num_inference_steps,
        )  # fmt: skip

    def log_likelihood(  # type: ignore[override]
        self, images: Any = None, class_labels: int | Sequence[int] | None = None, **options: Any
    ) -> LikelihoodOutput:
        """As `FisherPipelineMixin.log_likelihood`, with `class_labels`, one for all or one an image."""
        return super().log_likelihood(images, class_labels, **options)  # type: ignore[arg-type]

    def guide(  # type: ignore[override]
        self, class_labels: int | Sequence[int], reward: Reward, **options: Any
    ) -> GuidanceOutput | tuple:
        """As `FisherPipelineMixin.guide`, with `class_labels` for prompts."""
        return super().guide(class_labels, reward, **options)  # type: ignore[arg-type]

    @torch.no_grad()
    def _pooled(self, conditions: dict[str, Any]) -> torch.Tensor:
        """The labels' embeddings in the network's first block."""
        table = self.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
        return table(torch.tensor(conditions["class_labels"], device=table.weight.device))

    @property
    def _factor(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def _size_multiple(self) -> int:
        return self._factor * self.transformer.config.patch_size

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.vae
        return vae.decode((1 / vae.config.scaling_factor * latents).to(vae.dtype)).sample  # rounded as the stock call

    def _conditions(
        self, prompt: Any, call_arguments: dict[str, Any], count: int | None, num_images_per_prompt: int = 1
    ) -> tuple[Sequence[int], dict[str, Any]]:
        # The class beyond the last stands for none.
        classes = self.transformer.config.num_embeds_ada_norm
        labels = class_conditions(prompt, classes, count, num_images_per_prompt)
        return labels, {"class_labels": labels}


DiTFisherPipeline.__module__ = "diffusers_fisher"
