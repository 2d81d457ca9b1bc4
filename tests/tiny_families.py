"""Tiny random pipelines of the families whose text encoders are language models."""

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import awaken, quiet, scheduler, t5, text_config, tokenizer, vae
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

CHAT = "{{ messages[-1]['content'] }}"
CHAT_OF_PARTS = "{{ messages[-1]['content'][0]['text'] }}"


def letters(template=CHAT):
    """Makes a tokenizer of single letters, whose chat template takes the last message alone."""
    tokens = ["<pad>", "<unk>", "<s>", *map(chr, range(97, 123))]
    backend = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="<s>", bos_token="<s>",
        padding_side="right", chat_template=template, model_max_length=512,
    )  # fmt: skip


SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip


def flow(**settings):
    return FlowMatchEulerDiscreteScheduler(**settings)


def z_image(cls=diffusers.ZImagePipeline):
    torch.manual_seed(0)
    net = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, norm_eps=1e-5, qk_norm=True, cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    awaken_all(net)
    encoder = Qwen3Model(Qwen3Config(**SIZES)).eval()
    return quiet(
        cls(
            scheduler=flow(shift=3.0), vae=vae(shift_factor=0.1), text_encoder=encoder, tokenizer=letters(),
            transformer=net,
        )
    )  # fmt: skip


def qwen_image(cls=diffusers.QwenImagePipeline, guidance_embeds=False):
    torch.manual_seed(0)
    net = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    awaken_all(net)
    autoencoder = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.5, 1.2, 0.8, 1.0],
    )  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval()
    scheduler = flow(use_dynamic_shifting=True, shift_terminal=0.02)
    return quiet(cls(scheduler=scheduler, vae=autoencoder, text_encoder=encoder, tokenizer=letters(), transformer=net))


def flux2_parts(guidance_embeds):
    torch.manual_seed(0)
    net = diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16 * 3, timestep_guidance_channels=32, axes_dims_rope=[4, 4, 4, 4],
        guidance_embeds=guidance_embeds,
    )  # fmt: skip
    awaken_all(net)
    autoencoder = diffusers.AutoencoderKLFlux2(
        sample_size=32, in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(4, 4), layers_per_block=1, latent_channels=4,
        norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    autoencoder.bn.running_mean.normal_().mul_(0.2)
    autoencoder.bn.running_var.uniform_(0.5, 2.0)
    return {"scheduler": flow(use_dynamic_shifting=True), "vae": autoencoder.eval(), "transformer": net}


def flux2_klein(cls=diffusers.Flux2KleinPipeline, **settings):
    parts = flux2_parts(False)
    encoder = Qwen3ForCausalLM(Qwen3Config(**SIZES)).eval()
    return quiet(cls(**parts, text_encoder=encoder, tokenizer=letters(), **settings))


def flux2(cls=diffusers.Flux2Pipeline):
    parts = flux2_parts(True)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8,
        "image_size": 16, "patch_size": 8, "model_type": "pixtral",
    }  # fmt: skip
    config = Mistral3Config(text_config={**SIZES, "model_type": "mistral"}, vision_config=vision)
    encoder = Mistral3ForConditionalGeneration(config).eval()
    return quiet(cls(**parts, text_encoder=encoder, tokenizer=letters(CHAT_OF_PARTS)))


def sana(cls=diffusers.SanaPipeline, scheduler=None):
    torch.manual_seed(0)
    net = diffusers.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=16,
        sample_size=8,
    )  # fmt: skip
    awaken_all(net)
    autoencoder = diffusers.AutoencoderDC(
        in_channels=3, latent_channels=4, attention_head_dim=2,
        encoder_block_types=("ResBlock",) * 4, decoder_block_types=("ResBlock",) * 4,
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        encoder_layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4, decoder_qkv_multiscales=((),) * 4, scaling_factor=0.4,
        decoder_norm_types="rms_norm", decoder_act_fns="silu",
    )  # fmt: skip
    encoder = Gemma2Model(Gemma2Config(**SIZES)).eval()
    scheduler = scheduler or diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return quiet(cls(tokenizer=letters(), text_encoder=encoder, vae=autoencoder, transformer=net, scheduler=scheduler))


def chroma(cls=diffusers.ChromaPipeline):
    torch.manual_seed(0)
    net = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=[4, 4, 8], approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    awaken_all(net)
    words, encoder = t5()
    return quiet(
        cls(scheduler=flow(), vae=vae(shift_factor=0.06), text_encoder=encoder, tokenizer=words, transformer=net)
    )


def lumina2(cls=diffusers.Lumina2Pipeline):
    """Makes Lumina 2, whose pipeline takes the autoencoder's factor for 8."""
    torch.manual_seed(0)
    net = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, norm_eps=1e-5,
        scaling_factor=1.0, axes_dim_rope=[4, 2, 2], cap_feat_dim=16,
    )  # fmt: skip
    awaken_all(net)
    encoder = Gemma2Model(Gemma2Config(**SIZES)).eval()
    return quiet(
        cls(
            scheduler=flow(shift=6.0), vae=deep_vae(shift_factor=0.1), text_encoder=encoder, tokenizer=letters(),
            transformer=net,
        )
    )  # fmt: skip


def cogview4(cls=diffusers.CogView4Pipeline):
    torch.manual_seed(0)
    net = diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=4, out_channels=4,
        text_embed_dim=16, time_embed_dim=8, condition_dim=4, sample_size=8,
    )  # fmt: skip
    awaken_all(net)
    encoder = GlmModel(GlmConfig(**SIZES)).eval()
    scheduler = flow(
        base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
    )
    return quiet(cls(scheduler=scheduler, vae=deep_vae(), text_encoder=encoder, tokenizer=letters(), transformer=net))


def hunyuan_dit(cls=diffusers.HunyuanDiTPipeline):
    """Makes HunyuanDiT, whose pipeline takes the autoencoder's factor for 8."""
    torch.manual_seed(0)
    net = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
    )  # fmt: skip
    awaken_all(net)
    bert = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")}
    words, encoder = t5()
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, steps_offset=1,
    )  # fmt: skip
    return quiet(
        cls(
            vae=deep_vae(), text_encoder=BertModel(BertConfig(**bert, num_hidden_layers=1)).eval(),
            tokenizer=letters(), transformer=net, scheduler=scheduler, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False, text_encoder_2=encoder, tokenizer_2=words,
        )
    )  # fmt: skip


def hidream(cls=diffusers.HiDreamImagePipeline, sample_size=4):
    """Makes HiDream, whose pipeline scales all sizes to the area of a square of `sample_size` latents."""
    torch.manual_seed(0)
    net = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=16, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    )  # fmt: skip
    awaken_all(net)
    words = tokenizer()
    t5_words, t5_encoder = t5(32)
    clips = [CLIPTextModelWithProjection(text_config(words, 8)).eval() for _ in range(2)]
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    pipe = cls(
        scheduler=flow(shift=3.0), vae=vae(shift_factor=0.1), transformer=net, text_encoder=clips[0], tokenizer=words,
        text_encoder_2=clips[1], tokenizer_2=words, text_encoder_3=t5_encoder, tokenizer_3=t5_words,
        text_encoder_4=llama, tokenizer_4=letters(),
    )  # fmt: skip
    pipe.default_sample_size = sample_size
    return quiet(pipe)


def kandinsky_2_2(cls=diffusers.KandinskyV22Pipeline):
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=8, addition_embed_type="image", cross_attention_dim=16, attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), norm_num_groups=4, sample_size=8,
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), encoder_hid_dim_type="image_proj",
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(8, 16), layers_per_block=1,
        encoder_hid_dim=16, resnet_time_scale_shift="scale_shift", class_embed_type=None,
    )  # fmt: skip
    awaken_all(net)
    movq = diffusers.VQModel(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, in_channels=3, latent_channels=4,
        layers_per_block=1, norm_num_groups=4, num_vq_embeddings=12, out_channels=3, vq_embed_dim=4,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    return quiet(cls(unet=net, scheduler=scheduler(beta_schedule="linear"), movq=movq))


def image_embeds(count=2):
    """Returns what a prior would make of `count` prompts."""
    generator = torch.Generator().manual_seed(7)
    return {name: torch.randn(count, 16, generator=generator) for name in ("image_embeds", "negative_image_embeds")}


def deep_vae(**changes):
    """Makes an autoencoder of factor 8."""
    blocks = {
        "block_out_channels": (4,) * 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4, "sample_size": 16, "latent_channels": 4, "norm_num_groups": 2,
        "in_channels": 3, "out_channels": 3,
    }  # fmt: skip
    return diffusers.AutoencoderKL(**{**blocks, **changes})


def awaken_all(network):
    """Sets weights that are zero or not finite to random numbers."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.nan_to_num_(0.0, 0.0, 0.0)
    awaken(network)
    network.eval()
