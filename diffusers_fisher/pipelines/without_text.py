"""Unconditional and class-conditional pipelines with likelihood and guidance, and calls that take `latents`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.pipelines.deprecated.latent_diffusion_uncond.pipeline_latent_diffusion_uncond import LDMPipeline
from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..backbones.dit import DiTBackbone
from ..backbones.ldm import LDMBackbone
from ..backbones.unconditional import DDIMBackbone, DDPMBackbone
from ..guidance import GuidanceOutput, Reward, pipeline as guidance
from ..images import ImageLike
from ..likelihood import LikelihoodOutput, pipeline as likelihood
from .mixin import FisherPipelineMixin


class UnconditionalMixin(FisherPipelineMixin):
    """`FisherPipelineMixin` without prompts."""

    def log_likelihood(self, images: ImageLike | None = None, **options: Any) -> LikelihoodOutput:  # type: ignore[override]
        """Scores images as `diffusers_fisher.log_likelihood` does, without a prompt."""
        return likelihood.log_likelihood(self, images, **options)

    def guide(self, reward: Reward, batch_size: int = 1, **options: Any) -> GuidanceOutput:  # type: ignore[override]
        """Guides `batch_size` samples as `diffusers_fisher.guide` does; a reward's prompts are empty strings."""
        return guidance.guide(self, None, reward, batch_size=batch_size, **options)


class DDPMFisherPipeline(UnconditionalMixin, DDPMPipeline):
    """`DDPMPipeline` with `log_likelihood` and `guide`, and a call that takes and returns `latents`.

    Its space is that of the pixels, scaled to [-1, 1].
    """

    unet: UNet2DModel

    __call__ = torch.no_grad()(DDPMBackbone.latents_call)


class DDIMFisherPipeline(UnconditionalMixin, DDIMPipeline):
    """`DDIMPipeline` with `log_likelihood` and `guide`, and a call that takes and returns `latents`.

    Its space is that of the pixels, scaled to [-1, 1]. A `DDIMScheduler` is kept, also a Fisher one; any other is
    replaced by one, as the stock pipeline does with every scheduler.
    """

    unet: UNet2DModel

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin):
        super().__init__(unet, scheduler)  # type: ignore[arg-type]
        if isinstance(scheduler, DDIMScheduler):
            self.register_modules(scheduler=scheduler)

    __call__ = torch.no_grad()(DDIMBackbone.latents_call)


class LDMFisherPipeline(UnconditionalMixin, LDMPipeline):
    """`LDMPipeline` with `log_likelihood` and `guide`, and a call that takes and returns `latents`.

    Latents are those of the vector-quantised autoencoder before its quantisation, scaled.
    """

    unet: UNet2DModel
    vqvae: VQModel

    __call__ = torch.no_grad()(LDMBackbone.latents_call)


class DiTFisherPipeline(FisherPipelineMixin, DiTPipeline):
    """`DiTPipeline` with `log_likelihood` and `guide`, and a call that takes and returns `latents`.

    Class labels stand where text pipelines have prompts; a reward gets them as its second argument.
    """

    transformer: DiTTransformer2DModel
    vae: AutoencoderKL
    labels: dict[str, int]

    __call__ = torch.no_grad()(DiTBackbone.latents_call)

    def log_likelihood(  # type: ignore[override]
        self, images: ImageLike | None = None, class_labels: int | Sequence[int] | None = None, **options: Any
    ) -> LikelihoodOutput:
        """Scores images as `diffusers_fisher.log_likelihood` does, with one class label for all or one per image."""
        return likelihood.log_likelihood(self, images, class_labels, **options)

    def guide(  # type: ignore[override]
        self, class_labels: int | Sequence[int], reward: Reward, **options: Any
    ) -> GuidanceOutput:
        """Guides samples as `diffusers_fisher.guide` does, with class labels for prompts."""
        return guidance.guide(self, class_labels, reward, **options)


class KandinskyV22FisherPipeline(FisherPipelineMixin, KandinskyV22Pipeline):
    """`KandinskyV22Pipeline` with `log_likelihood` and `guide`; its call is the stock one.

    It is the second of two stages: `image_embeds`, which KandinskyV22PriorPipeline makes of prompts, stand where
    other pipelines have prompts, as `log_likelihood(images, image_embeds=...)` and `guide(None, reward,
    image_embeds=..., negative_image_embeds=...)`.
    """

    unet: UNet2DConditionModel
    movq: VQModel
