"""Counts the parameters of well-known checkpoints' parts, from their public settings; writes model_sizes.json.

The parts are built on PyTorch's "meta" device, which holds shapes and no numbers: nothing is downloaded, and nothing
of that size is in memory. One minute.

    python examples/benchmarks/model_sizes.py
"""

from typing import Any

import torch
from common import save
from diffusers import (
    AutoencoderKL,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "caption_projection_dim": 1536, "pooled_projection_dim": 2048, "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm",
}  # fmt: skip
SD35_LARGE = SD35_MEDIUM | {
    "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "pos_embed_max_size": 192,
    "dual_attention_layers": (),
}  # fmt: skip


def autoencoder(channels: int) -> nn.Module:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=channels == 4, use_post_quant_conv=channels == 4,
    )  # fmt: skip


def clip(hidden: int, layers: int, heads: int) -> nn.Module:
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=heads
        )
    )


def clip_l() -> nn.Module:
    return clip(768, 12, 12)


def clip_g() -> nn.Module:
    return clip(1280, 32, 20)


def t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu")
    )


def qwen() -> nn.Module:
    return Qwen3Model(
        Qwen3Config(
            hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936,
        )
    )  # fmt: skip


MODELS = {  # name: (side of the images, denoiser, autoencoder's channels, text encoders)
    "Stable Diffusion 1.5": (512, lambda: UNet2DConditionModel(cross_attention_dim=768), 4, [clip_l]),
    "Stable Diffusion XL": (1024, lambda: UNet2DConditionModel(**XL), 4, [clip_l, clip_g]),
    "Stable Diffusion 3.5 medium": (1024, lambda: SD3Transformer2DModel(**SD35_MEDIUM), 16, [clip_l, clip_g, t5]),
    "Stable Diffusion 3.5 large": (1024, lambda: SD3Transformer2DModel(**SD35_LARGE), 16, [clip_l, clip_g, t5]),
    "Flux.1-dev": (1024, lambda: FluxTransformer2DModel(guidance_embeds=True), 16, [clip_l, t5]),
    "Z-Image": (1024, ZImageTransformer2DModel, 16, [qwen]),
}


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    report = {}
    with torch.device("meta"):
        for name, (pixels, denoiser, channels, encoders) in MODELS.items():
            report[name] = {
                "pixels": pixels,
                "denoiser": count(denoiser()),
                "autoencoder": count(autoencoder(channels)),
                "text_encoders": [count(encoder()) for encoder in encoders],
            }
            print(name, report[name])
    save("model_sizes", {"models": report})


if __name__ == "__main__":
    main()
