"""Text-to-image pipelines with likelihood and guidance; their calls are the stock ones.

What is particular to each family is its backbone's business (`diffusers_fisher/backbones/`). The components are
declared for type checkers and editors, which do not see that diffusers registers them at run time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import PixArtAlphaPipeline
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import PixArtSigmaPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

from .mixin import FisherPipelineMixin

if TYPE_CHECKING:
    from diffusers.image_processor import VaeImageProcessor
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import (
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        T5EncoderModel,
    )


class LatentPipelineMixin(FisherPipelineMixin):
    """`FisherPipelineMixin` for pipelines with an autoencoder."""

    vae: AutoencoderKL
    vae_scale_factor: int
    image_processor: VaeImageProcessor


class StableDiffusionMixin(LatentPipelineMixin):
    """`LatentPipelineMixin` for the generations of Stable Diffusion whose network is a U-Net."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    feature_extractor: object
    image_encoder: PreTrainedModel | None


class StableDiffusionFisherPipeline(StableDiffusionMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Made with `from_pretrained` from any Stable Diffusion 1.x or 2.x checkpoint, or from a pipeline at hand with
    `fisher_pipeline(pipe)`. `StableDiffusionFisherPipeline(**pipe.components)` has no trace model and no latent
    statistics, because these are not components; they can be set.
    """

    safety_checker: StableDiffusionSafetyChecker | None


class StableDiffusionXLFisherPipeline(StableDiffusionMixin, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    The network's size conditions (`original_size`, `target_size`) are those of the image unless others are passed.
    """

    text_encoder_2: CLIPTextModelWithProjection
    tokenizer_2: CLIPTokenizer


class StableDiffusion3FisherPipeline(LatentPipelineMixin, StableDiffusion3Pipeline):
    """`StableDiffusion3Pipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Flow matching: the likelihood's grid ends at 0.999 of the noise, where the standard prior holds.
    """

    transformer: SD3Transformer2DModel
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    tokenizer_3: PreTrainedTokenizerBase


class FluxFisherPipeline(LatentPipelineMixin, FluxPipeline):
    """`FluxPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Latents are packed, (B, h/2 * w/2, 4 * C), in `guide` and in outputs; `log_likelihood` takes (B, C, h, w). The
    guidance scale of Flux-dev is an input of the network, so a likelihood is that of one scale: the stock call's
    default unless `guidance_scale` is passed.
    """

    transformer: FluxTransformer2DModel
    text_encoder: CLIPTextModel
    text_encoder_2: T5EncoderModel
    tokenizer: CLIPTokenizer
    tokenizer_2: PreTrainedTokenizerBase


class PixArtMixin(LatentPipelineMixin):
    """`LatentPipelineMixin` for both generations of PixArt."""

    transformer: PixArtTransformer2DModel
    text_encoder: T5EncoderModel
    tokenizer: PreTrainedTokenizerBase


class PixArtAlphaFisherPipeline(PixArtMixin, PixArtAlphaPipeline):
    """`PixArtAlphaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """


class PixArtSigmaFisherPipeline(PixArtMixin, PixArtSigmaPipeline):
    """`PixArtSigmaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """
