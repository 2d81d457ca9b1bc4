"""The embedded checkpoints: small networks that were trained on Fashion-MNIST and are part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

EMBEDDED_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Class names of Fashion-MNIST in the order of the labels, spelt as in the captions of the embedded checkpoints."""

_FOLDER = Path(__file__).parent / "fashion_mnist"
_SHARED_FILES = (
    "latent_statistics.safetensors", "model_index.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip
_FILES = {
    "sd": (
        *_SHARED_FILES, "classifier/config.json", "classifier/model.safetensors",
        "classifier/preprocessor_config.json", "test_images.safetensors", "trace_model/config.json",
        "trace_model/diffusion_pytorch_model.safetensors", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ),
    "sd3": (
        *_SHARED_FILES, "text_encoder_2/config.json", "text_encoder_2/model.safetensors", "tokenizer_2/tokenizer.json",
        "tokenizer_2/tokenizer_config.json", "trace_model/config.json",
        "trace_model/diffusion_pytorch_model.safetensors", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ),
}  # fmt: skip


def embedded_prompt(label: int) -> str:
    """Returns the caption of class `label` that the embedded checkpoint was trained with: "a photo of a coat"."""
    name = EMBEDDED_CLASSES[label]
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def embedded_checkpoint(name: str = "sd") -> str:
    """Returns the folder of an embedded checkpoint, for any `from_pretrained`.

    Args:
        name: "sd" is a Stable Diffusion, whose subfolder `classifier` holds an image classifier. "sd3" is a Stable
            Diffusion 3 without T5, trained by flow matching. The stock class loads it by
            `from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)`, because diffusers requires these two
            components though the index has them as null. Our class needs only the folder.

    Raises:
        InputError: there is no checkpoint of this name.
        CheckpointError: a file of the checkpoint is missing or truncated.
    """
    from ..files import check_safetensors, read_json

    if name not in _FILES:
        raise InputError(f"`name` is {name!r}; allowed: {', '.join(map(repr, _FILES))}.")
    folder = _FOLDER if name == "sd" else _FOLDER.with_name(f"{_FOLDER.name}_{name}")
    missing = [file for file in _FILES[name] if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(f"The embedded checkpoint '{folder}' lacks {missing}; install the package again.")
    for file in _FILES[name]:
        check = read_json if file.endswith(".json") else check_safetensors
        check(folder / file)
    return str(folder)


def embedded_test_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 64 test images (64, 3, 32, 32), float32 in [0, 1], and their labels (64,)."""
    from ..files import load_tensors

    tensors, _ = load_tensors(Path(embedded_checkpoint()) / "test_images.safetensors")
    return tensors["images"].expand(-1, 3, -1, -1).float() / 255, tensors["labels"]
