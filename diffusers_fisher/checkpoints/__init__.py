"""The embedded checkpoint: a small Stable Diffusion trained on Fashion-MNIST, shipped with the package."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

EMBEDDED_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Fashion-MNIST's class names in label order, as the embedded checkpoint's captions spell them."""


def embedded_prompt(label: int) -> str:
    """The caption that the embedded checkpoint was trained with for class `label`, such as "a photo of a coat"."""
    name = EMBEDDED_CLASSES[label]
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"


def embedded_checkpoint() -> str:
    """Folder of the embedded checkpoint, for any `from_pretrained`; an image classifier lies in its `classifier`.

    Raises:
        CheckpointError: a file of it is missing or truncated.
    """
    from ..files import check_safetensors
    from ..pipelines.persistence import check_folder

    folder = Path(__file__).parent / "fashion_mnist"
    check_folder(folder)
    for name in ("classifier/model", "latent_statistics", "test_images"):
        check_safetensors(folder / f"{name}.safetensors")
    return str(folder)


def embedded_test_images() -> tuple[torch.Tensor, torch.Tensor]:
    """64 held-out test images (64, 3, 32, 32), float32 in [0, 1], and their labels (64,)."""
    from ..files import load_tensors

    tensors, _ = load_tensors(Path(embedded_checkpoint()) / "test_images.safetensors")
    return tensors["images"].expand(-1, 3, -1, -1).float() / 255, tensors["labels"]
