"""Makes the networks of the embedded checkpoints: every size is in one place."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    RegNetConfig,
    RegNetForImageClassification,
)

from diffusers_fisher.checkpoints import EMBEDDED_CLASSES, embedded_prompt
from diffusers_fisher.files import write_json


def make_tokenizer() -> CLIPTokenizer:
    """Makes CLIP's byte-level BPE with just enough merges that each word of the captions is one token."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    captions = [embedded_prompt(label).replace("-", " - ") for label in range(len(EMBEDDED_CLASSES))]
    # Longest first: a merge that a short word brings ("an") must not cut a longer one ("sandal").
    words = sorted({word for text in captions for word in text.split()}, key=lambda word: (-len(word), word))
    characters = list(bytes_to_unicode().values())
    vocabulary = characters + [character + "</w>" for character in characters]
    merges = []
    for word in words:
        left = word[0] if len(word) > 1 else word + "</w>"
        for index, character in enumerate(word[1:], start=1):
            right = character + ("</w>" if index == len(word) - 1 else "")
            if (left, right) not in merges:
                merges.append((left, right))
                vocabulary.append(left + right)
            left += right
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    table = {token: index for index, token in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=table, merges=merges, model_max_length=16)


def _text_config(tokenizer: CLIPTokenizer, hidden_size: int, **changes: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **changes,
    )  # fmt: skip


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(_text_config(tokenizer, 128))


def make_pooled_text_encoders(tokenizer: CLIPTokenizer) -> list[CLIPTextModelWithProjection]:
    """Makes two encoders of unequal size, as Stable Diffusion 3 has."""
    sizes = (64, 96)
    return [CLIPTextModelWithProjection(_text_config(tokenizer, size, projection_dim=size)) for size in sizes]


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    )  # fmt: skip


def make_transformer() -> SD3Transformer2DModel:
    """Makes a network whose blocks are the identity and whose output is zero at first, as in DiT (Peebles and Xie,
    2023), which shortens the training."""
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=5, attention_head_dim=32,
        num_attention_heads=4, joint_attention_dim=192, caption_projection_dim=128, pooled_projection_dim=160,
        pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip
    modulations = [norm.linear for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*modulations, model.norm_out.linear, model.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return model


def make_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(32, 64, 64), layers_per_block=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=8,
        sample_size=32,
    )  # fmt: skip


def make_classifier() -> RegNetForImageClassification:
    return RegNetForImageClassification(
        RegNetConfig(
            num_channels=3, embedding_size=32, hidden_sizes=[48, 96, 160], depths=[1, 2, 1], groups_width=16,
            layer_type="x", downsample_in_first_stage=False,
            id2label=dict(enumerate(EMBEDDED_CLASSES)),
            label2id={name: index for index, name in enumerate(EMBEDDED_CLASSES)},
        )
    )  # fmt: skip


def save_image_processor(folder: Path) -> None:
    """Writes how pixels in [0, 1] become the classifier's input, in the form of every transformers image processor."""
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": 32, "width": 32},
            "resample": 2, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
        },
    )  # fmt: skip
