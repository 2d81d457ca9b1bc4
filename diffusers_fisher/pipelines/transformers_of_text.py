"""Text-to-image pipelines of transformers with language models for text encoders; their calls are the stock ones.

What is particular to each family is its backbone's business, as in `text_to_image.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers.pipelines.aura_flow.pipeline_aura_flow import AuraFlowPipeline
from diffusers.pipelines.chroma.pipeline_chroma import ChromaPipeline
from diffusers.pipelines.cogview4.pipeline_cogview4 import CogView4Pipeline
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from diffusers.pipelines.hidream_image.pipeline_hidream_image import HiDreamImagePipeline
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import HunyuanDiTPipeline
from diffusers.pipelines.lumina2.pipeline_lumina2 import Lumina2Pipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage import QwenImagePipeline
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from diffusers.pipelines.z_image.pipeline_z_image import ZImagePipeline

from .mixin import FisherPipelineMixin
from .text_to_image import LatentPipelineMixin

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
    from diffusers.models.transformers.auraflow_transformer_2d import AuraFlowTransformer2DModel
    from diffusers.models.transformers.hunyuan_transformer_2d import HunyuanDiT2DModel
    from diffusers.models.transformers.sana_transformer import SanaTransformer2DModel
    from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel
    from diffusers.models.transformers.transformer_cogview4 import CogView4Transformer2DModel
    from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
    from diffusers.models.transformers.transformer_hidream_image import HiDreamImageTransformer2DModel
    from diffusers.models.transformers.transformer_lumina2 import Lumina2Transformer2DModel
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
    from diffusers.models.transformers.transformer_z_image import ZImageTransformer2DModel
    from transformers import CLIPTextModelWithProjection, PreTrainedModel, PreTrainedTokenizerBase


class OneEncoderMixin(FisherPipelineMixin):
    """`FisherPipelineMixin` for pipelines with one text encoder."""

    text_encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


class ZImageFisherPipeline(OneEncoderMixin, LatentPipelineMixin, ZImagePipeline):
    """`ZImagePipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Guidance is on at every scale above 0, so that likelihoods are at scale 0. `prompt_embeds` are a list of tensors.
    """

    transformer: ZImageTransformer2DModel


class QwenImageFisherPipeline(OneEncoderMixin, QwenImagePipeline):
    """`QwenImagePipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Latents are packed as those of `FluxFisherPipeline`. It guides by `true_cfg_scale`; a `guidance_scale` is an input
    of distilled networks.
    """

    vae: AutoencoderKLQwenImage
    transformer: QwenImageTransformer2DModel


class Flux2FisherPipeline(OneEncoderMixin, Flux2Pipeline):
    """`Flux2Pipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Latents are packed, (B, h/2 * w/2, 4 * C), in `guide` and in outputs, and standardised; `log_likelihood` takes
    (B, C, h, w). The stock call takes their grid, (B, 4 * C, h/2, w/2). The guidance scale is an input of the network.
    """

    vae: AutoencoderKLFlux2
    transformer: Flux2Transformer2DModel


class Flux2KleinFisherPipeline(OneEncoderMixin, Flux2KleinPipeline):
    """`Flux2KleinPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Its latents are those of `Flux2FisherPipeline`. The networks that are not distilled are guided by `guidance_scale`.
    """

    vae: AutoencoderKLFlux2
    transformer: Flux2Transformer2DModel


class SanaFisherPipeline(OneEncoderMixin, SanaPipeline):
    """`SanaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """

    vae: AutoencoderDC
    transformer: SanaTransformer2DModel


class ChromaFisherPipeline(OneEncoderMixin, LatentPipelineMixin, ChromaPipeline):
    """`ChromaPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Latents are packed as those of `FluxFisherPipeline`.
    """

    transformer: ChromaTransformer2DModel


class Lumina2FisherPipeline(OneEncoderMixin, LatentPipelineMixin, Lumina2Pipeline):
    """`Lumina2Pipeline` with `log_likelihood` and `guide`; its call is the stock one."""

    transformer: Lumina2Transformer2DModel


class AuraFlowFisherPipeline(OneEncoderMixin, LatentPipelineMixin, AuraFlowPipeline):
    """`AuraFlowPipeline` with `log_likelihood` and `guide`; its call is the stock one."""

    transformer: AuraFlowTransformer2DModel


class CogView4FisherPipeline(OneEncoderMixin, LatentPipelineMixin, CogView4Pipeline):
    """`CogView4Pipeline` with `log_likelihood` and `guide`; its call is the stock one."""

    transformer: CogView4Transformer2DModel


class HunyuanDiTFisherPipeline(OneEncoderMixin, LatentPipelineMixin, HunyuanDiTPipeline):
    """`HunyuanDiTPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Sizes are taken as they are: `use_resolution_binning` is off in both.
    """

    transformer: HunyuanDiT2DModel
    text_encoder_2: PreTrainedModel
    tokenizer_2: PreTrainedTokenizerBase


class HiDreamImageFisherPipeline(LatentPipelineMixin, HiDreamImagePipeline):
    """`HiDreamImagePipeline` with `log_likelihood` and `guide`; its call is the stock one.

    The call scales sizes to one area; sizes of another area are refused.
    """

    transformer: HiDreamImageTransformer2DModel
    text_encoder: CLIPTextModelWithProjection
    text_encoder_2: CLIPTextModelWithProjection
    text_encoder_3: PreTrainedModel
    text_encoder_4: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    tokenizer_2: PreTrainedTokenizerBase
    tokenizer_3: PreTrainedTokenizerBase
    tokenizer_4: PreTrainedTokenizerBase
