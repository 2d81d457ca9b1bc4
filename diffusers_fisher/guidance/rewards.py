"""Differentiable rewards on image tensors in [0, 1]."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import InputError


class ClassifierReward:
    """Log-probability (nats) of a class under a transformers image classifier.

    Images are resized (bilinear, antialiased) and normalised on tensors, because image processors go through PIL and
    cut gradients.

    Args:
        model: an image-classification model that takes `pixel_values`; put in evaluation mode by the caller.
        target: class name or number, or one for each image.
        size: (height, width) the model was trained on.
        mean, std: its normalisation, for images in [0, 1].
    """

    def __init__(
        self,
        model: Any,
        target: str | int | Sequence[str | int],
        size: tuple[int, int],
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        self.model = model
        targets = [target] if isinstance(target, (str, int)) else list(target)
        self.targets = torch.tensor([self._number(entry) for entry in targets])
        self.size = size
        self.mean = torch.tensor(mean).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std).reshape(1, -1, 1, 1)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, target: str | int | Sequence[str | int], **kwargs: Any
    ) -> ClassifierReward:
        """Loads a classifier and its `preprocessor_config.json`; `kwargs` go to transformers' `from_pretrained`."""
        from transformers import AutoModelForImageClassification
        from transformers.utils import cached_file

        model = AutoModelForImageClassification.from_pretrained(path, **kwargs).eval()
        processor = json.loads(Path(str(cached_file(path, "preprocessor_config.json"))).read_text(encoding="utf-8"))
        side = processor["size"]
        side = side if isinstance(side, dict) else {"shortest_edge": side}  # a plain number in older files
        size = (side["height"], side["width"]) if "height" in side else (side["shortest_edge"],) * 2
        return cls(model, target, size, processor["image_mean"], processor["image_std"])

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        targets = self.targets.to(images.device)
        if len(targets) not in (1, len(images)):
            raise InputError(f"{len(targets)} target classes for {len(images)} images; give one, or as many.")
        logits = self.logits(images)
        log_probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return log_probabilities.gather(1, targets.expand(len(images))[:, None])[:, 0]

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Class scores (B, classes) of images (B, 3, H, W) in [0, 1]."""
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bilinear", antialias=True, align_corners=False)
        pixels = (images - self.mean.to(images)) / self.std.to(images)
        return self.model(pixel_values=pixels.to(self.model.dtype)).logits

    def _number(self, target: str | int) -> int:
        names = {str(name): int(number) for number, name in self.model.config.id2label.items()}
        if isinstance(target, str) and target in names:
            return names[target]
        if isinstance(target, int) and target in names.values():
            return target
        raise InputError(f"The classifier has no class {target!r}; it has {names}.")


class LinearReward:
    """Mean over channels of <weights, image>: brightness of a region, difference of two regions.

    Args:
        weights: (H, W), or (3, H, W); positive where the image should become brighter.
    """

    def __init__(self, weights: torch.Tensor):
        self.weights = weights

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        if self.weights.shape[-2:] != images.shape[-2:]:
            raise InputError(
                f"The weights are {tuple(self.weights.shape[-2:])} pixels, the images {tuple(images.shape[-2:])}; "
                "give weights of the images' size."
            )
        return (images * self.weights.to(images)).mean(1).flatten(1).sum(1)

    @classmethod
    def left_minus_right(cls, height: int, width: int) -> LinearReward:
        """Mean brightness of the left half minus that of the right half; a middle column counts for neither."""
        side = torch.sign((width - 1) / 2 - torch.arange(width))
        return cls(side.expand(height, width) / (height * (width // 2)))


class MeasurementReward:
    """Minus the mean squared distance to `target` where `mask` is 1: inpainting of what is known.

    Args:
        target: (3, H, W), or (B, 3, H, W), in [0, 1].
        mask: (H, W) weights in [0, 1], not all zero.
    """

    def __init__(self, target: torch.Tensor, mask: torch.Tensor):
        if not bool((mask >= 0).all()) or float(mask.sum()) <= 0:
            raise InputError("The mask must be non-negative and not all zero; 1 marks pixels that are known.")
        self.target = target
        self.mask = mask

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        one_each = self.target.ndim == 3 or (self.target.ndim == 4 and len(self.target) in (1, len(images)))
        if self.target.shape[-3:] != images.shape[-3:] or self.mask.shape != images.shape[-2:] or not one_each:
            raise InputError(
                f"Target {tuple(self.target.shape)} and mask {tuple(self.mask.shape)} do not fit images of "
                f"{tuple(images.shape)}; allowed: one target, or one an image, and one mask, of the images' size."
            )
        weights = self.mask.to(images) / (self.mask.sum() * images.shape[1])
        return -((images - self.target.to(images)) ** 2 * weights).flatten(1).sum(1)
