"""Differentiable preparation of images in [0, 1] for vision models. Image processors use PIL and cut gradients."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from ...arguments import check_kinds
from ...errors import UnsupportedError

RESAMPLING = {2: "bilinear", 3: "bicubic"}
"""The torch name of each PIL filter, by the filter's number in PIL. Both libraries compute the same filters."""


@check_kinds
@dataclasses.dataclass(frozen=True)
class ImageInput:
    """Resizes, crops and normalises images for a vision model, with gradients.

    Args:
        size: (height, width) in pixels that the model takes.
        mean, std: mean and standard deviation per channel, for images in [0, 1].
        resampling: "bilinear" or "bicubic"; both filters are antialiased.
        shortest_edge: length of the shorter side in pixels after the resize; `size` is then cropped from the centre.
            None: images are resized to `size`, and their proportions may change.
    """

    size: tuple[int, int]
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    resampling: str = "bilinear"
    shortest_edge: int | None = None

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, **kwargs: Any) -> ImageInput:
        """Reads the settings of a checkpoint's transformers image processor.

        Args:
            path: folder or Hub name of the checkpoint.
            **kwargs: arguments of transformers' `get_image_processor_dict`.
        """
        from transformers.image_processing_utils import BaseImageProcessor

        return cls.from_settings(BaseImageProcessor.get_image_processor_dict(path, **kwargs)[0])

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> ImageInput:
        """Makes an `ImageInput` from the content of a `preprocessor_config.json`.

        A shortest edge without a crop becomes the length of both sides, because the models take one size.

        Raises:
            UnsupportedError: the filter or the form of the size is not supported.
        """
        resample = settings.get("resample", 3 if "crop_size" in settings else 2)
        size = settings.get("size", 224)
        size = {"shortest_edge": size} if isinstance(size, int) else dict(size)  # older files hold a number
        if resample not in RESAMPLING or not ({"height", "width"} <= size.keys() or "shortest_edge" in size):
            raise UnsupportedError(
                f"The image processor has resample={resample}, size={size}; supported: filters 2 (bilinear) and 3 "
                "(bicubic), sizes by height and width or by the shortest edge. Pass your own ImageInput."
            )
        edge = size.get("shortest_edge")
        model_size = (edge, edge) if edge is not None else (size["height"], size["width"])
        shortest_edge = None
        if settings.get("do_center_crop", False):
            crop = settings["crop_size"]
            model_size = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
            shortest_edge = edge
        elif settings.get("crop_pct") is not None and edge is not None and edge < 384:  # the rule of ConvNeXt
            shortest_edge = int(edge / settings["crop_pct"])
        mean, std = settings.get("image_mean", (0.5,) * 3), settings.get("image_std", (0.5,) * 3)
        if not settings.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        return cls(model_size, tuple(mean), tuple(std), RESAMPLING[resample], shortest_edge)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Turns images (B, 3, H, W) in [0, 1] into pixel values (B, 3, *size)."""
        height, width = self._resize_shape(images.shape[-2], images.shape[-1])
        pixels = images
        for size in ((images.shape[-2], width), (height, width)):  # PIL resizes the width first
            if tuple(pixels.shape[-2:]) != size:
                pixels = F.interpolate(pixels, size, mode=self.resampling, antialias=True, align_corners=False)
                pixels = pixels.clamp(0, 1)  # the bicubic filter overshoots at edges; 8-bit images are clipped there
        mean, std = (images.new_tensor(values).reshape(1, -1, 1, 1) for values in (self.mean, self.std))
        return (_centre_crop(pixels, self.size) - mean) / std

    def _resize_shape(self, height: int, width: int) -> tuple[int, int]:
        if self.shortest_edge is None:
            return self.size
        short, long = sorted((height, width))
        other = int(self.shortest_edge * long / short)
        return (self.shortest_edge, other) if height <= width else (other, self.shortest_edge)


def _centre_crop(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Returns the middle of the images, with black padding where the images are smaller than `size`."""
    height, width = (target - length for target, length in zip(size, images.shape[-2:], strict=True))
    # Negative padding crops. Of an odd number, transformers pads one pixel more and crops one pixel less at the start.
    top, left = (height + 1) // 2, (width + 1) // 2
    return F.pad(images, (left, width - left, top, height - top))
