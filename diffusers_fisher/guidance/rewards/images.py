"""From images in [0, 1] to what a vision model is fed, on tensors: image processors go by PIL and cut gradients."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import UnsupportedError

RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""torch's names of PIL's filters, by PIL's numbers. Both libraries' are antialiased and the same function."""


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """Resize, centre crop and normalisation, differentiable.

    Args:
        size: (height, width) that the model is fed.
        mean, std: normalisation of a channel, for images in [0, 1].
        resampling: "bilinear" or "bicubic", antialiased.
        shortest_edge: the shorter side is made this long, and `size` cropped from the centre; None: resized to `size`
            whatever the proportions.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resampling: str = "bilinear"
    shortest_edge: int | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> ImageInput:
        """Reads the settings of a checkpoint's transformers image processor; `kwargs` go to its loading."""
        from transformers.image_processing_utils import BaseImageProcessor

        settings, _ = BaseImageProcessor.get_image_processor_dict(path, **kwargs)
        return cls.from_settings(settings)

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImageInput:
        """From the content of a `preprocessor_config.json`.

        A shortest edge without a crop is taken for both sides: the models have one size.

        Raises:
            UnsupportedError: a filter or a form of size that is not known.
        """
        resample = settings.get("resample", 3 if "crop_size" in settings else 2)
        size = settings.get("size", 224)
        size = {"shortest_edge": size} if isinstance(size, int) else dict(size)  # a plain number in older files
        if resample not in RESAMPLING or not ({"height", "width"} <= size.keys() or "shortest_edge" in size):
            raise UnsupportedError(
                f"The image processor has resample={resample}, size={size}; supported: filters 2 (bilinear) and 3 "
                "(bicubic), sizes by height and width or by the shortest edge. Make an ImageInput by hand."
            )
        edge = size.get("shortest_edge")
        fed = (edge, edge) if edge is not None else (size["height"], size["width"])
        shortest = None
        if settings.get("do_center_crop", False):
            crop = settings["crop_size"]
            fed = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            shortest = edge
        elif settings.get("crop_pct") is not None and edge is not None and edge < 384:  # ConvNeXt's rule
            shortest = int(edge / settings["crop_pct"])
        mean, std = settings.get("image_mean", (0.5,) * 3), settings.get("image_std", (0.5,) * 3)
        if not settings.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        return cls(fed, tuple(mean), tuple(std), RESAMPLING[resample], shortest)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [0, 1] to pixel values (B, 3, *size)."""
        height, width = self._resized(images.shape[-2], images.shape[-1])
        resized = images
        for size in ((images.shape[-2], width), (height, width)):  # in PIL's order
            if tuple(resized.shape[-2:]) != size:
                resized = F.interpolate(resized, size, mode=self.resampling, antialias=True, align_corners=False)
                resized = resized.clamp(0, 1)  # the bicubic filter overshoots at edges, where 8-bit images can't
        mean, std = (images.new_tensor(values).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return (_centre_crop(resized, self.size) - mean) / std

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest_edge is None:
            return self.size
        short, long = sorted((height, width))
        other = int(self.shortest_edge * long / short)
        return (self.shortest_edge, other) if height <= width else (other, self.shortest_edge)


def _centre_crop(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of the images, padded with black where they are smaller."""
    missing = [max(0, wanted - have) for wanted, have in zip(size, images.shape[-2:], strict=True)]
    if any(missing):  # transformers puts the odd pixel of padding first
        (top, left) = ((gap + 1) // 2 for gap in missing)
        images = F.pad(images, (left, missing[1] - left, top, missing[0] - top))
    top, left = ((have - wanted) // 2 for have, wanted in zip(images.shape[-2:], size, strict=True))
    return images[..., top : top + size[0], left : left + size[1]]
