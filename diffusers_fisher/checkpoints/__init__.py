"""The embedded checkpoint: a small Stable Diffusion that was trained on Fashion-MNIST and is part of the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    import torch

EMBEDDED_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Class names of Fashion-MNIST in the order of the labels, spelt as in the captions of the embedded checkpoint."""

_FOLDER = Path(__file__).parent / "fashion_mnist"
_FILES = (
    "classifier/config.json", "classifier/model.safetensors", "classifier/preprocessor_config.json",
    "latent_statistics.safetensors", "model_index.json", "scheduler/scheduler_config.json", "test_images.safetensors",
    "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json", "trace_model/config.json", "trace_model/diffusion_pytorch_model.safetensors",
    "unet/config.json", "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
)  # fmt: skip


def embedded_prompt(label: int) -> str:
    """Returns the caption of class `label` that the embedded checkpoint was trained with: "a photo of a coat"."""
    name = EMBEDDED_CLASSES[label]
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def embedded_checkpoint() -> str:
    """Returns the folder of the embedded checkpoint, for any `from_pretrained`.

    The subfolder `classifier` holds an image classifier.

    Raises:
        CheckpointError: a file of the checkpoint is missing or truncated.
    """
    from ..files import check_safetensors, read_json

    missing = [name for name in _FILES if not (_FOLDER / name).is_file()]
    if missing:
        raise CheckpointError(f"The embedded checkpoint '{_FOLDER}' lacks {missing}; install the package again.")
    for name in _FILES:
        check = read_json if name.endswith(".json") else check_safetensors
        check(_FOLDER / name)
    return str(_FOLDER)


def embedded_test_images() -> tuple[torch.Tensor, torch.Tensor]:
    """Returns 64 test images (64, 3, 32, 32), float32 in [0, 1], and their labels (64,)."""
    from ..files import load_tensors

    tensors, _ = load_tensors(Path(embedded_checkpoint()) / "test_images.safetensors")
    return tensors["images"].expand(-1, 3, -1, -1).float() / 255, tensors["labels"]
