"""The embedded checkpoint: a small Stable Diffusion trained on Fashion-MNIST, shipped with the package."""

from pathlib import Path

EMBEDDED_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
"""Fashion-MNIST's class names in label order, as the embedded checkpoint's captions spell them."""


def embedded_prompt(label: int) -> str:
    """The caption that the embedded checkpoint was trained with for class `label`, such as "a photo of a coat"."""
    name = EMBEDDED_CLASSES[label]
    return f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}"
