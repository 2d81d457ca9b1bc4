"""Tiny random pipelines of the real classes."""

import random

import numpy
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LDMPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker, cosine_distance
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)


def scheduler(**changes):
    config = {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    return DDIMScheduler(**{**config, **changes})


def tokenizer():
    characters = [chr(code) for code in range(97, 123)]
    vocabulary = characters + [character + "</w>" for character in characters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=8)


def text_config(words, projection_dim=16):
    return CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=words.model_max_length, projection_dim=projection_dim,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id,
    )  # fmt: skip


def vae(latent_channels=4, **changes):
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, sample_size=16,
        latent_channels=latent_channels, **changes,
    )  # fmt: skip


def unet(**changes):
    config = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16, "attention_head_dim": 2, "norm_num_groups": 4,
    }  # fmt: skip
    return UNet2DConditionModel(**{**config, **changes})


def stable_diffusion(cls=StableDiffusionPipeline, **components):
    torch.manual_seed(0)
    words = tokenizer()
    parts = {
        "vae": vae(), "text_encoder": CLIPTextModel(text_config(words)), "tokenizer": words, "unet": unet(),
        "scheduler": scheduler(), "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip
    return quiet(cls(**{**parts, **components}, requires_safety_checker=False))


def one_channel(cls=StableDiffusionPipeline, **components):
    """Stable Diffusion whose latents have 16 dimensions at its own size: full Jacobians take no time."""
    torch.manual_seed(0)
    parts = {"vae": vae(latent_channels=1), "unet": unet(in_channels=1, out_channels=1, sample_size=4)}
    return stable_diffusion(cls, **{**parts, **components})


def safety_checker(threshold):
    """Makes a safety checker that refuses images whose similarity to one concept is above `threshold`, in [-1, 1]."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=8)).eval()
    checker.concept_embeds.data.normal_()
    checker.concept_embeds_weights.data.fill_(threshold)
    checker.special_care_embeds_weights.data.fill_(2.0)  # a cosine never gets there
    return checker


def feature_extractor():
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def similarities(pipe, images):
    """Returns the number (B,) of every image that the safety checker compares with its threshold."""
    pictures = pipe.image_processor.postprocess(2 * images - 1, output_type="pil")
    pixels = pipe.feature_extractor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        embeds = pipe.safety_checker.visual_projection(pipe.safety_checker.vision_model(pixels)[1])
        return cosine_distance(embeds, pipe.safety_checker.concept_embeds).max(1).values


def snapshot(pipe):
    """Returns all that a caller could see of a pipeline, its parts and the process, comparable with `==`."""
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {
        "attributes": {name: id(value) for name, value in vars(pipe).items()},
        "progress bar": dict(vars(pipe).get("_progress_bar_config", {})),
        "config": dict(pipe.config),
        "scheduler": {name: _comparable(value) for name, value in vars(pipe.scheduler).items()},
        "modules": {name: _module(module) for name, module in modules.items()},
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "random numbers": (torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()),
    }


def _comparable(value):
    return (id(value), value._version, value.tolist()) if isinstance(value, torch.Tensor) else (id(value), repr(value))


def _module(module):
    parts = [
        (id(part), part.training, len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
        for part in module.modules()
    ]
    tensors = [
        (name, id(tensor), tensor._version, tensor.dtype, tensor.requires_grad, tensor.grad is None)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    ]
    return parts, tensors


def t5(width=16):
    """Makes a T5 tokenizer of single letters, and its encoder."""
    letters = [chr(code) for code in range(97, 123)]
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(token, -1.0 - index / 100) for index, token in enumerate(["▁", *letters])]
    config = T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2, is_gated_act=False
    )
    return T5Tokenizer(vocab=vocabulary, extra_ids=0), T5EncoderModel(config).eval()


def stable_diffusion_xl(cls=StableDiffusionXLPipeline):
    torch.manual_seed(0)
    words = tokenizer()
    net = unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16,
        cross_attention_dim=32,
    )  # fmt: skip
    return quiet(
        cls(
            vae=vae(), unet=net, tokenizer=words, tokenizer_2=words, text_encoder=CLIPTextModel(text_config(words)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(words)),
            scheduler=EulerDiscreteScheduler.from_config(scheduler().config), add_watermarker=False,
        )
    )  # fmt: skip


def stable_diffusion_3(cls=StableDiffusion3Pipeline, texts=False, **changes):
    """Makes Stable Diffusion 3; with `texts`, it has its three text encoders."""
    torch.manual_seed(0)
    words = tokenizer()
    parts = dict.fromkeys(
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    if texts:  # two of width 16 beside each other make one of T5's
        parts["tokenizer_3"], parts["text_encoder_3"] = t5(32)
        for name in ("", "_2"):
            parts |= {
                "tokenizer" + name: words,
                "text_encoder" + name: CLIPTextModelWithProjection(text_config(words, 8)),
            }
    config = {
        "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 2, "joint_attention_dim": 32 if texts else 16, "caption_projection_dim": 16,
        "pooled_projection_dim": 16, "out_channels": 4,
    }  # fmt: skip
    net = SD3Transformer2DModel(**{**config, **changes})
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return quiet(cls(transformer=net, scheduler=scheduler, vae=vae(shift_factor=0.06), **parts))


def aura_flow(cls=AuraFlowPipeline):
    """Makes AuraFlow, whose transformer cuts latents into patches of 2x2."""
    torch.manual_seed(0)
    words, encoder = t5()
    net = AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
        pos_embed_max_size=64,
    )  # fmt: skip
    awaken(net)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return quiet(cls(tokenizer=words, text_encoder=encoder, transformer=net, vae=vae(), scheduler=scheduler))


def flux(cls=FluxPipeline, texts=False, guidance_embeds=False):
    """Makes Flux; with `texts`, it has its two text encoders; with `guidance_embeds`, it is as Flux-dev."""
    torch.manual_seed(0)
    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    if texts:
        words = tokenizer()
        parts |= {"tokenizer": words, "text_encoder": CLIPTextModel(text_config(words))}
        parts["tokenizer_2"], parts["text_encoder_2"] = t5()
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return quiet(cls(transformer=net, scheduler=scheduler, vae=vae(shift_factor=0.1), **parts))


def pixart(cls=PixArtAlphaPipeline, sample_size=8):
    """Makes PixArt with learned variance; for `sample_size` 128 it takes the image's size and shape."""
    torch.manual_seed(0)
    words, encoder = t5()
    net = PixArtTransformer2DModel(
        sample_size=sample_size, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=12,
        num_attention_heads=2, cross_attention_dim=24, caption_channels=16,
    )  # fmt: skip
    awaken(net)
    return quiet(cls(tokenizer=words, text_encoder=encoder, transformer=net, vae=vae(), scheduler=scheduler()))


def dit(cls=DiTPipeline, **changes):
    """Makes a class-conditional DiT with learned variance."""
    torch.manual_seed(0)
    net = DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    awaken(net)
    net.eval()  # in training it drops labels
    return quiet(cls(transformer=net, vae=vae(), scheduler=scheduler(**{"beta_schedule": "linear", **changes})))


def unconditional_unet(channels):
    return UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, norm_num_groups=4,
    )  # fmt: skip


def unconditional(cls=DDPMPipeline, **components):
    """Makes a model of pixels."""
    torch.manual_seed(0)
    parts = {"unet": unconditional_unet(3), "scheduler": scheduler(beta_schedule="linear")}
    return quiet(cls(**{**parts, **components}))


def latent_unconditional(cls=LDMPipeline):
    torch.manual_seed(0)
    vqvae = VQModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4, latent_channels=3,
        num_vq_embeddings=32, scaling_factor=0.5,
    )  # fmt: skip
    return quiet(cls(vqvae=vqvae, unet=unconditional_unet(3), scheduler=scheduler()))


def awaken(network):
    """Sets weights that begin at zero to random numbers; a network with such zeros ignores its input."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def embeds(batch, pooled=True, length=8):
    """Returns the call's arguments that stand for prompts in pipelines without text encoders."""
    generator = torch.Generator().manual_seed(7)
    result = {"prompt_embeds": torch.randn(batch, length, 16, generator=generator)}
    if pooled:
        result["pooled_prompt_embeds"] = torch.randn(batch, 16, generator=generator)
    return result


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
