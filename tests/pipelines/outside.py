"""Tiny random pipelines of classes of diffusers that have no backbone, each with a call."""

# ruff: noqa: C408

import dataclasses
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from PIL import Image

from diffusers_fisher.backbones import registry
from pipelines.backbones import FAMILIES


@dataclasses.dataclass
class SetUp:
    """A pipeline, the arguments of its call without and with guidance, and the shape of its latents."""

    pipe: Any
    conditions: dict[str, Any]
    guidance: dict[str, Any]
    shape: tuple[int, ...]
    takes_generator: bool = False

    def noise(self) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of the guided call, with a new generator where the run draws noise."""
        generator = {"generator": torch.Generator().manual_seed(11)} if self.takes_generator else {}
        return {**self.conditions, **self.guidance, **generator}


SET_UPS: dict[str, Callable[[], SetUp]] = {}
"""The set-ups by name, in the order of this file."""


def set_up(make: Callable[[], SetUp]) -> Callable[[], SetUp]:
    SET_UPS[make.__name__] = make
    return make


def forget_backbones(patch: pytest.MonkeyPatch) -> None:
    """Takes the backbones of `FAMILIES` out of the registry, so that their set-ups are of unknown classes."""
    known = {line.stock.__name__ for line in FAMILIES.values()}
    patch.setattr(
        registry, "BACKBONES", {name: entry for name, entry in registry.BACKBONES.items() if name not in known}
    )
    patch.setattr(registry, "TESTED", registry.TESTED - known)


def draw(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def awaken(network: Any) -> Any:
    """Gives random values to parameters that are zero or not finite."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            if not torch.isfinite(parameter).all() or not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return network.eval()


def embeddings(width: int = 16) -> dict[str, torch.Tensor]:
    return {"prompt_embeds": draw(2, 8, width, seed=1), "negative_prompt_embeds": draw(2, 8, width, seed=2)}


# fmt: off

@set_up
def z_image():
    torch.manual_seed(0)
    net = awaken(diffusers.ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4,
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, norm_eps=1e-05, qk_norm=True,
        cap_feat_dim=16, rope_theta=256.0, t_scale=1000.0, axes_dims=[8, 4, 4], axes_lens=[256, 32, 32]))
    p = quiet(diffusers.ZImagePipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.vae(), text_encoder=None, tokenizer=None, transformer=net))
    e = [draw(8, 16, seed=1), draw(8, 16, seed=2)]
    n = [draw(8, 16, seed=3), draw(8, 16, seed=4)]
    return SetUp(p, dict(prompt_embeds=e, negative_prompt_embeds=n, height=16, width=16), dict(guidance_scale=3.0),
        (2, 4, 8, 8))


@set_up
def qwen_image():
    torch.manual_seed(0)
    net = awaken(diffusers.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(8, 4, 4)))
    v = diffusers.AutoencoderKLQwenImage(base_dim=24, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1,
        temperal_downsample=[False, True], latents_mean=[0.1] * 4, latents_std=[1.5] * 4)
    p = quiet(diffusers.QwenImagePipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        shift_terminal=0.02), vae=v, text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8, dtype=torch.long)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), prompt_embeds_mask=m, negative_prompt_embeds=draw(2,
        8, 16, seed=2), negative_prompt_embeds_mask=m, height=32, width=32), dict(true_cfg_scale=4.0), (2, 16, 16))


@set_up
def krea2():
    if not hasattr(diffusers, "Krea2Pipeline"):
        pytest.skip("This release of diffusers has no Krea 2.")
    torch.manual_seed(0)
    net = awaken(diffusers.Krea2Transformer2DModel(in_channels=16, num_layers=1, attention_head_dim=12,
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=24, timestep_embed_dim=16, text_hidden_dim=16,
        num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
        num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 4)))
    p = quiet(diffusers.Krea2Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=None, text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8, dtype=torch.bool)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 2, 16, seed=1), prompt_embeds_mask=m,
        negative_prompt_embeds=draw(2, 8, 2, 16, seed=2), negative_prompt_embeds_mask=m, height=32, width=32),
        dict(guidance_scale=3.5), (2, 4, 16))


def hunyuan_image(guider, **changes):
    """Makes a pipeline that is guided by a component; without a guider and with changes, a distilled one."""
    torch.manual_seed(0)
    net = awaken(diffusers.HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=8, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1),
        text_embed_dim=16, text_embed_2_dim=16, rope_axes_dim=(4, 4), **changes))
    p = quiet(diffusers.HunyuanImagePipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), vae=None,
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=net, guider=guider))
    m = torch.ones(2, 8, dtype=torch.long)
    c = {}
    for sign, seed in (("", 1), ("negative_", 5)):
        c |= {sign + "prompt_embeds": draw(2, 8, 16, seed=seed), sign + "prompt_embeds_2": draw(2, 8,
            16, seed=seed + 1),
            sign + "prompt_embeds_mask": m, sign + "prompt_embeds_mask_2": m}
    return SetUp(p, c | dict(height=256, width=256), {}, (2, 4, 8, 8))


@set_up
def lumina2():
    torch.manual_seed(0)
    net = awaken(diffusers.Lumina2Transformer2DModel(sample_size=4, patch_size=2, in_channels=4, hidden_size=24,
        num_layers=1, num_refiner_layers=1, num_attention_heads=3, num_kv_heads=1, multiple_of=16,
        ffn_dim_multiplier=None, norm_eps=1e-05, scaling_factor=1.0, axes_dim_rope=[4, 2, 2], cap_feat_dim=8))
    p = quiet(diffusers.Lumina2Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=tiny.vae(), text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8, dtype=torch.long)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 8, seed=1), prompt_attention_mask=m, negative_prompt_embeds=draw(2,
        8, 8, seed=2), negative_prompt_attention_mask=m), dict(guidance_scale=4.0), (2, 4, 8, 8))


def _sana(scheduler):
    torch.manual_seed(0)
    net = awaken(diffusers.SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1,
        num_attention_heads=2, attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
        cross_attention_dim=8, caption_channels=8, sample_size=8))
    p = quiet(diffusers.SanaPipeline(scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None,
        transformer=net))
    m = torch.ones(2, 8, dtype=torch.long)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 8, seed=1), prompt_attention_mask=m, negative_prompt_embeds=draw(2,
        8, 8, seed=2), negative_prompt_attention_mask=m, negative_prompt=None, use_resolution_binning=False,
        height=256, width=256), dict(guidance_scale=4.5), (2, 4, 8, 8))


@set_up
def sana_dpm():
    return _sana(diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=3.0))


@set_up
def sana_euler():
    return _sana(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@set_up
def hidream():
    torch.manual_seed(0)
    net = awaken(diffusers.HiDreamImageTransformer2DModel(patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        num_single_layers=1, attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64,
        num_routed_experts=4, num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32),
        llama_layers=(0, 1)))
    p = diffusers.HiDreamImagePipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny.vae(), transformer=net, **{f"{a}{b}": None for a in ("text_encoder", "tokenizer") for b in ("",
        "_2", "_3", "_4")})
    p = quiet(p)
    p.default_sample_size = 8
    c = {}
    for sign, s in (("", 1), ("negative_", 2)):
        c |= {sign + "prompt_embeds_t5": draw(2, 8, 32, seed=s), sign + "prompt_embeds_llama3": draw(2, 2, 8, 16,
            seed=s + 5), sign + "pooled_prompt_embeds": draw(2, 64, seed=s + 9)}
    return SetUp(p, c, dict(guidance_scale=5.0), (2, 4, 8, 8))


@set_up
def aura_flow():
    torch.manual_seed(0)
    net = awaken(diffusers.AuraFlowTransformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1,
        num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16,
        joint_attention_dim=16, out_channels=4, pos_embed_max_size=64))
    p = quiet(diffusers.AuraFlowPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
        vae=tiny.vae(), text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8, dtype=torch.long)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), prompt_attention_mask=m,
        negative_prompt_embeds=draw(2, 8, 16, seed=2), negative_prompt_attention_mask=m,
        height=16, width=16), dict(guidance_scale=3.5), (2, 4, 8, 8))


@set_up
def chroma():
    torch.manual_seed(0)
    net = awaken(diffusers.ChromaTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=[4, 4, 8],
        approximator_hidden_dim=32, approximator_layers=1, approximator_num_channels=16))
    p = quiet(diffusers.ChromaPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_beta_sigmas=False),
        vae=tiny.vae(shift_factor=0.06), text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), prompt_attention_mask=m,
        negative_prompt_embeds=draw(2, 8, 16, seed=2), negative_prompt_attention_mask=m, height=16, width=16),
        dict(guidance_scale=5.0), (2, 16, 16))


@set_up
def cogview4():
    torch.manual_seed(0)
    net = awaken(diffusers.CogView4Transformer2DModel(patch_size=2, in_channels=4, num_layers=1,
        attention_head_dim=4, num_attention_heads=4, out_channels=4, text_embed_dim=32, time_embed_dim=8,
        condition_dim=4, sample_size=8))
    p = quiet(diffusers.CogView4Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(base_shift=0.25,
        max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"), vae=tiny.vae(),
        text_encoder=None, tokenizer=None, transformer=net))
    return SetUp(p, dict(prompt_embeds=draw(2, 16, 32, seed=1), negative_prompt_embeds=draw(2, 16, 32, seed=2)),
        dict(guidance_scale=5.0), (2, 4, 8, 8))


def _wan_net(**k):
    torch.manual_seed(k.pop("seed", 0))
    return awaken(diffusers.WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12,
        in_channels=4, out_channels=4, text_dim=16, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32))


def _wan(**k):
    s = k.pop("scheduler", None) or diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction",
        use_flow_sigmas=True, flow_shift=3.0)
    p = quiet(diffusers.WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=s, transformer=_wan_net(),
        **k))
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), negative_prompt_embeds=draw(2, 8, 16, seed=2),
        height=64, width=64, num_frames=9), dict(guidance_scale=5.0), (2, 4, 3, 8, 8))


@set_up
def wan21_unipc():
    return _wan()


@set_up
def wan21_euler():
    return _wan(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))


@set_up
def wan22_ti2v5b():
    return _wan(expand_timesteps=True)


@set_up
def wan22_a14b():
    return _wan(transformer_2=_wan_net(seed=1), boundary_ratio=0.5)


@set_up
def ltx():
    torch.manual_seed(0)
    net = awaken(diffusers.LTXVideoTransformer3DModel(in_channels=8, out_channels=8, patch_size=1, patch_size_t=1,
        num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32, num_layers=1, caption_channels=32))
    p = quiet(diffusers.LTXPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True,
        shift_terminal=0.1), vae=None, text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8, dtype=torch.long)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 32, seed=1), prompt_attention_mask=m,
        negative_prompt_embeds=draw(2, 8, 32, seed=2), negative_prompt_attention_mask=m, height=128, width=128,
        num_frames=9), dict(guidance_scale=3.0), (2, 32, 8))


def _cogvideo(s):
    torch.manual_seed(0)
    net = awaken(diffusers.CogVideoXTransformer3DModel(num_attention_heads=4, attention_head_dim=8, in_channels=4,
        out_channels=4, time_embed_dim=2, text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8,
        sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=8))
    p = quiet(diffusers.CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=net, scheduler=s))
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 32, seed=1), negative_prompt_embeds=draw(2, 8, 32, seed=2),
        height=64, width=64, num_frames=9), dict(guidance_scale=6.0), (2, 3, 4, 8, 8))


COG = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
    rescale_betas_zero_snr=True, timestep_spacing="trailing", set_alpha_to_one=True)


@set_up
def cogvideox_stock():
    return _cogvideo(diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, **COG))


@set_up
def cogvideox_ddim():
    return _cogvideo(diffusers.DDIMScheduler(clip_sample=False, **COG))


@set_up
def hunyuan_video():
    torch.manual_seed(0)
    net = awaken(diffusers.HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2,
        attention_head_dim=10, num_layers=1, num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1,
        guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4)))
    p = quiet(diffusers.HunyuanVideoPipeline(text_encoder=None, tokenizer=None, transformer=net, vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=None, tokenizer_2=None))
    m = torch.ones(2, 8, dtype=torch.long)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), prompt_attention_mask=m, pooled_prompt_embeds=draw(2,
        8, seed=3), height=64, width=64, num_frames=9), dict(guidance_scale=6.0), (2, 4, 3, 8, 8))


@set_up
def mochi():
    torch.manual_seed(0)
    net = diffusers.MochiTransformer3DModel(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2,
        pooled_projection_dim=16, in_channels=4, out_channels=None, qk_norm="rms_norm", text_embed_dim=32,
        time_embed_dim=4, activation_fn="swiglu", max_sequence_length=8)
    net.pos_frequencies.data.normal_(generator=torch.Generator().manual_seed(2))
    awaken(net)
    p = quiet(diffusers.MochiPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None, text_encoder=None, tokenizer=None, transformer=net))
    m = torch.ones(2, 8, dtype=torch.bool)
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 32, seed=1), prompt_attention_mask=m,
        negative_prompt_embeds=draw(2, 8, 32, seed=2), negative_prompt_attention_mask=m, height=64, width=64,
        num_frames=13), dict(guidance_scale=4.5), (2, 4, 3, 8, 8))


def _flux2_net(ge):
    torch.manual_seed(0)
    return awaken(diffusers.Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=32,
        axes_dims_rope=[4, 4, 4, 4], guidance_embeds=ge))


def _flux2_vae():
    return diffusers.AutoencoderKLFlux2(sample_size=32, in_channels=3, out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1, use_quant_conv=False,
        use_post_quant_conv=False)


@set_up
def flux2_dev():
    p = quiet(diffusers.Flux2Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_flux2_vae(), text_encoder=None, tokenizer=None, transformer=_flux2_net(True)))
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), height=16, width=16), dict(guidance_scale=4.0), (2,
        16, 4, 4))


@set_up
def flux2_klein():
    p = quiet(diffusers.Flux2KleinPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True),
        vae=_flux2_vae(), text_encoder=None, tokenizer=None, transformer=_flux2_net(False)))
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 16, seed=1), negative_prompt_embeds=draw(2, 8, 16, seed=2),
        height=16, width=16), dict(guidance_scale=4.0), (2, 16, 4, 4))


@set_up
def flux_kontext():
    t = tiny.flux()
    net = awaken(t.transformer)
    p = quiet(diffusers.FluxKontextPipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True),
        vae=t.vae, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, transformer=net))
    return SetUp(p, dict(image=Image.new("RGB", (16, 16), (200, 40, 90)), max_area=256, _auto_resize=False,
        height=16, width=16, **tiny.embeds(2)), dict(guidance_scale=2.5), (2, 16, 16))


def _pag(cls, base, **k):
    b = base()
    parts = b.components
    p = quiet(cls(**parts, pag_applied_layers=["mid"], **k))
    awaken(p.unet)
    p.text_encoder.eval()
    return p


@set_up
def sd_pag():
    p = _pag(diffusers.StableDiffusionPAGPipeline, tiny.stable_diffusion, requires_safety_checker=False)
    return SetUp(p, dict(prompt=["a b", "c"]), dict(guidance_scale=7.5, pag_scale=3.0), (2, 4, 8, 8))


@set_up
def hunyuan_dit():
    torch.manual_seed(0)
    net = awaken(diffusers.HunyuanDiT2DModel(sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8,
        num_attention_heads=3, in_channels=4, cross_attention_dim=16, cross_attention_dim_t5=16,
        pooled_projection_dim=16, hidden_size=24, activation_fn="gelu-approximate", text_len=8, text_len_t5=8))
    p = quiet(diffusers.HunyuanDiTPipeline(vae=tiny.vae(), text_encoder=None, tokenizer=None, transformer=net,
        scheduler=diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.018, beta_schedule="scaled_linear",
        prediction_type="v_prediction", clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, text_encoder_2=None, tokenizer_2=None))
    m = torch.ones(2, 8).long()
    return SetUp(p, dict(embeddings(), prompt_attention_mask=m, negative_prompt_attention_mask=m,
        prompt_embeds_2=draw(2, 8, 16, seed=5), negative_prompt_embeds_2=draw(2, 8, 16, seed=6),
        prompt_attention_mask_2=m, negative_prompt_attention_mask_2=m, use_resolution_binning=False),
        dict(guidance_scale=5.0), (2, 4, 8, 8), takes_generator=True)


@set_up
def lcm():
    sd = tiny.stable_diffusion()
    u = awaken(tiny.unet(time_cond_proj_dim=32))
    p = quiet(diffusers.LatentConsistencyModelPipeline(vae=sd.vae, text_encoder=sd.text_encoder.eval(),
        tokenizer=sd.tokenizer, unet=u, scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012,
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False))
    return SetUp(p, dict(prompt=["a b", "c"]), dict(guidance_scale=8.5), (2, 4, 8, 8), takes_generator=True)


def _cosmos25(s):
    torch.manual_seed(0)
    net = awaken(diffusers.CosmosTransformer3DModel(in_channels=5, out_channels=4, num_attention_heads=2,
        attention_head_dim=16, num_layers=1, mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32),
        patch_size=(1, 2, 2), rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False,
        extra_pos_embed_type="learnable"))
    v = diffusers.AutoencoderKLWan(base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)

    class Nobody:

        def __init__(self):
            pass

        def to(self, *a, **k):
            return self

        def check_text_safety(self, p):
            return True
    p = quiet(diffusers.Cosmos2_5_PredictBasePipeline(text_encoder=None, tokenizer=None, transformer=net, vae=v,
        scheduler=s, safety_checker=Nobody()))
    return SetUp(p, dict(prompt_embeds=draw(2, 8, 32, seed=1), negative_prompt_embeds=draw(2, 8, 32, seed=2),
        height=64, width=64, num_frames=5), dict(guidance_scale=7.0), (2, 4, 2, 8, 8))


@set_up
def cosmos25():
    return _cosmos25(diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
        flow_shift=5.0))


@set_up
def kandinsky22():
    torch.manual_seed(0)
    u = awaken(diffusers.UNet2DConditionModel(in_channels=4, out_channels=8, addition_embed_type="image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(16, 32), layers_per_block=1,
        encoder_hid_dim=16, encoder_hid_dim_type="image_proj", cross_attention_dim=16, attention_head_dim=4,
        resnet_time_scale_shift="scale_shift", class_embed_type=None, norm_num_groups=4, sample_size=8))
    mq = diffusers.VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, in_channels=3,
        latent_channels=4, layers_per_block=1, norm_num_groups=4, num_vq_embeddings=12, out_channels=3,
        up_block_types=("UpDecoderBlock2D",) * 2, vq_embed_dim=4)
    p = quiet(diffusers.KandinskyV22Pipeline(unet=u, scheduler=diffusers.DDIMScheduler(beta_schedule="linear",
        beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False, steps_offset=1), movq=mq))
    return SetUp(p, dict(image_embeds=draw(2, 16, seed=1), negative_image_embeds=draw(2, 16, seed=2), height=32,
        width=32), dict(guidance_scale=4.0), (2, 4, 16, 16))


@set_up
def consistency():
    torch.manual_seed(0)
    u = awaken(tiny.unconditional_unet(3))
    p = quiet(diffusers.ConsistencyModelPipeline(unet=u,
        scheduler=diffusers.CMStochasticIterativeScheduler(num_train_timesteps=40)))
    return SetUp(p, dict(batch_size=2, output_type="pt"), {}, (2, 3, 8, 8), takes_generator=True)


@set_up
def pix2pix():
    sd = tiny.stable_diffusion()
    u = awaken(tiny.unet(in_channels=8))
    c = dict(sd.components)
    c["unet"] = u
    p = quiet(diffusers.StableDiffusionInstructPix2PixPipeline(**c, requires_safety_checker=False))
    p.text_encoder.eval()
    p.vae.eval()
    return SetUp(p, dict(prompt=["a b"], image=torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))),
        dict(guidance_scale=7.5, image_guidance_scale=1.5), (1, 4, 8, 8))


@set_up
def playground_edm():
    p = tiny.stable_diffusion_xl()
    p.scheduler = diffusers.EDMEulerScheduler(sigma_data=0.5, sigma_min=0.002, sigma_max=80.0)
    awaken(p.unet)
    for t in (p.text_encoder, p.text_encoder_2):
        t.eval()
    return SetUp(p, dict(prompt=["a b", "c"]), dict(guidance_scale=3.0), (2, 4, 8, 8))


@set_up
def sdxl_turbo():
    p = tiny.stable_diffusion_xl()
    p.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(p.scheduler.config,
        timestep_spacing="trailing")
    awaken(p.unet)
    for t in (p.text_encoder, p.text_encoder_2):
        t.eval()
    return SetUp(p, dict(prompt=["a b", "c"]), dict(guidance_scale=0.0), (2, 4, 8, 8), takes_generator=True)


@set_up
def mochi_like():
    z = SET_UPS["aura_flow"]()
    z.pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return z


@set_up
def lumina2_trunc():
    z = SET_UPS["lumina2"]()
    z.guidance = dict(guidance_scale=4.0, cfg_trunc_ratio=0.5)
    return z


@set_up
def ltx2():
    torch.manual_seed(0)
    net = awaken(diffusers.LTX2VideoTransformer3DModel(in_channels=4, out_channels=4, patch_size=1, patch_size_t=1,
        num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, audio_in_channels=4,
        audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4, audio_cross_attention_dim=8,
        num_layers=1, qk_norm="rms_norm_across_heads", caption_channels=16, rope_double_precision=False,
        rope_type="split"))
    con = awaken(LTX2TextConnectors(caption_channels=16, text_proj_in_factor=2,
        video_connector_num_attention_heads=2, video_connector_attention_head_dim=8, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_theta=10000.0,
        rope_double_precision=False, causal_temporal_positioning=False, rope_type="split"))
    v = diffusers.AutoencoderKLLTX2Video(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,),
        decoder_block_out_channels=(8,), layers_per_block=(1,), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False,
        False), downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False)
    av = diffusers.AutoencoderKLLTX2Audio(base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1,
        attn_resolutions=None, in_channels=2, resolution=32, latent_channels=2, norm_type="pixel",
        causality_axis="height", dropout=0.0, mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160,
        is_causal=True, mel_bins=8)
    p = quiet(diffusers.LTX2Pipeline(scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=v, audio_vae=av,
        text_encoder=None, tokenizer=None, connectors=con, transformer=net, vocoder=None, processor=None,
        prompt_enhancer=None, duration_head=None))
    m = torch.ones(1, 32).long()
    return SetUp(p, dict(prompt_embeds=draw(1, 32, 32, seed=1), prompt_attention_mask=m,
        negative_prompt_embeds=draw(1, 32, 32, seed=2), negative_prompt_attention_mask=m, height=32, width=32,
        num_frames=5, frame_rate=25.0), dict(guidance_scale=4.0), (1, 4, 5, 16, 16), takes_generator=True)
