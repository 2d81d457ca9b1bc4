"""Images as users give them (PIL, arrays, tensors), as checked tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch

from .errors import InputError

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

ImageLike: TypeAlias = "Image | numpy.ndarray | torch.Tensor | list[Image] | list[numpy.ndarray] | list[torch.Tensor]"
"""One image or several: PIL, arrays (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W)."""

UNIT_RANGE = (0.0, 1.0)


def image_tensor(
    images: ImageLike | None, multiple: int, channels: int = 3, data_range: tuple[float, float] = UNIT_RANGE
) -> torch.Tensor:
    """Brings images into the form (B, channels, H, W) float32 in [0, 1], checked; nothing is resized.

    Arrays and tensors have values in `data_range`. Integers need a range other than [0, 1]. PIL images have a range of
    their own.

    Raises:
        InputError: images of another kind, shape, size or range.
    """
    import numpy
    from PIL.Image import Image

    if isinstance(images, Image):
        images = [images]
    low, high = data_range
    if not -math.inf < low < high < math.inf:
        raise InputError(f"`data_range` is {data_range}; allowed: two finite numbers, the lower first.")
    if isinstance(images, (list, tuple)) and any(isinstance(image, Image) for image in images):
        low, high = UNIT_RANGE
    batch = _stack(images, channels) if isinstance(images, (list, tuple)) and images else images
    if isinstance(batch, (numpy.ndarray, torch.Tensor)) and batch.ndim == 3:
        batch = batch[None]  # one image without a batch
    tensor = batch
    if isinstance(batch, numpy.ndarray) and batch.dtype.kind in "biuf":
        tensor = torch.from_numpy(numpy.ascontiguousarray(batch))  # flipped arrays have negative strides
        tensor = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or tensor.shape[1] != channels or not len(tensor):
        got = f"a {type(batch).__name__} {batch!r:.40}"
        if isinstance(tensor, torch.Tensor) and isinstance(batch, (numpy.ndarray, torch.Tensor)):
            got = f"of shape {tuple(batch.shape)}"
        kind = "RGB as" if channels == 3 else "grey" if channels == 1 else "no"
        raise InputError(
            f"Images are {got}; allowed: {kind} PIL, array (B, H, W, {channels}) or tensor (B, {channels}, H, W)."
        )
    return _scale_to_unit_range(tensor, low, high, multiple)


def _stack(images: list | tuple, channels: int) -> numpy.ndarray | torch.Tensor:
    """Stacks several images of one kind and size to one array or tensor."""
    import numpy
    from PIL.Image import Image

    arrays = list(images)
    for index, image in enumerate(images):
        if isinstance(image, Image):
            array = numpy.asarray(eight_bit(image, channels), dtype=numpy.float32) / 255
            arrays[index] = array[..., None] if channels == 1 else array
    kinds = sorted({type(array).__name__ for array in arrays})
    if len(kinds) != 1 or not isinstance(arrays[0], (numpy.ndarray, torch.Tensor)):
        raise InputError(
            f"Images are a list of {', '.join(kinds)}; allowed: PIL images, arrays or tensors, of one kind."
        )
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) != 1:
        raise InputError(f"Images of one call must have one size, got {shapes}; call once per size.")
    return torch.stack(arrays) if isinstance(arrays[0], torch.Tensor) else numpy.stack(arrays)


def _scale_to_unit_range(tensor: torch.Tensor, low: float, high: float, multiple: int) -> torch.Tensor:
    """Scales images (B, C, H, W) with values from `low` to `high` to float32 in [0, 1].

    Raises:
        InputError: a value is outside the range, the dtype does not fit the range, or a side is no multiple.
    """
    scaled = (low, high) != UNIT_RANGE
    if not (tensor.is_floating_point() or scaled) or not bool(((tensor >= low) & (tensor <= high)).all()):
        allowed = f"numbers in [{low}, {high}]" if scaled else "floating point in [0, 1]"
        advice = "Declare the range they are in" + ("." if scaled else ", such as `data_range=(0, 255)` or (-1, 1).")
        raise InputError(
            f"Images have dtype {tensor.dtype} and values from {float(tensor.min()):.4g} to "
            f"{float(tensor.max()):.4g}; allowed: {allowed}, without NaN. {advice}"
        )
    if scaled:
        tensor = (tensor.double() - low) / (high - low)
    if tensor.shape[2] % multiple or tensor.shape[3] % multiple:
        raise InputError(
            f"Images are {tensor.shape[2]}x{tensor.shape[3]} pixels; this checkpoint takes heights and widths that "
            f"are multiples of {multiple}. Resize or pad them first."
        )
    # One layout, so that every form of images gives the same bits: each layout has its own kernels. `contiguous` would
    # keep any layout of one channel.
    return tensor.float().clone(memory_format=torch.contiguous_format)


def eight_bit(image: Image, channels: int) -> Image:
    """Converts a PIL image to grey (`channels` 1) or RGB. Raises `InputError` for modes of more than 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputError(
            f"The PIL image has mode '{image.mode}' (16 or 32 bits per pixel), whose values have no range of their "
            "own; allowed: 8-bit modes, such as L and RGB. Scale it to 8 bits first."
        )
    return image.convert("L" if channels == 1 else "RGB")
