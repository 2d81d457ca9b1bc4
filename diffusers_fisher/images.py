"""Images as users give them (PIL, arrays, tensors), as checked tensors."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

import torch

from .errors import InputError, warn

if TYPE_CHECKING:
    import numpy
    from PIL.Image import Image

ImageLike: TypeAlias = "Image | numpy.ndarray | torch.Tensor | list[Image] | list[numpy.ndarray] | list[torch.Tensor]"
"""One image or several: PIL, arrays (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W)."""

UNIT_RANGE = (0.0, 1.0)


def image_tensor(
    images: ImageLike | None,
    multiple: int,
    channels: int = 3,
    data_range: tuple[float, float] = UNIT_RANGE,
    tolerance: float = 0.0,
) -> torch.Tensor:
    """Brings images into the form (B, channels, H, W) float32 in [0, 1], checked; nothing is resized.

    Arrays and tensors have values in `data_range`, apart from `tolerance`. Integers need a range other than [0, 1].
    PIL images have a range of their own. They are turned as their EXIF orientation says, and their transparent pixels
    are composed on black, with a warning.

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
    return _scale_to_unit_range(tensor, low, high, multiple, tolerance)


def _stack(images: list | tuple, channels: int) -> numpy.ndarray | torch.Tensor:
    """Stacks several images of one kind and size to one array or tensor."""
    import numpy
    from PIL.Image import Image

    arrays, transparent = list(images), 0
    for index, image in enumerate(images):
        if isinstance(image, Image):
            try:
                pixels, is_transparent = read_pixels(image, channels)
            except InputError:
                raise
            except Exception as error:  # Pillow and its decoders raise errors of many kinds over damaged files
                raise InputError(
                    f"Image {index} of the call can't be read: {type(error).__name__}: {error}. Leave it out, or "
                    "write its file again."
                ) from error
            arrays[index] = pixels.permute(1, 2, 0).numpy()
            transparent += is_transparent
    if transparent:
        warn(
            f"{transparent} of {len(arrays)} images have transparent pixels, which were composed on black. Compose "
            "them on another background first if they are shown on one."
        )
    kinds = sorted({type(array).__name__ for array in arrays})
    if len(kinds) != 1 or not isinstance(arrays[0], (numpy.ndarray, torch.Tensor)):
        raise InputError(
            f"Images are a list of {', '.join(kinds)}; allowed: PIL images, arrays or tensors, of one kind."
        )
    shapes = sorted({tuple(array.shape) for array in arrays})
    if len(shapes) != 1:
        raise InputError(f"Images of one call must have one size, got {shapes}; call once per size.")
    return torch.stack(arrays) if isinstance(arrays[0], torch.Tensor) else numpy.stack(arrays)


def _scale_to_unit_range(
    tensor: torch.Tensor, low: float, high: float, multiple: int, tolerance: float
) -> torch.Tensor:
    """Scales images (B, C, H, W) with values from `low` to `high` to float32 in [0, 1].

    Raises:
        InputError: a value is outside the range, the dtype does not fit the range, or a side is no multiple.
    """
    if tensor.is_complex():
        raise InputError(f"Images have dtype {tensor.dtype}; allowed: real numbers. Pass their real part.")
    has_other_range = (low, high) != UNIT_RANGE
    in_range = (tensor >= low - tolerance) & (tensor <= high + tolerance)
    if not (tensor.is_floating_point() or has_other_range) or not bool(in_range.all()):
        allowed = f"numbers in [{low}, {high}]" if has_other_range else "floating point in [0, 1]"
        advice = "Declare the range they are in" + (
            "." if has_other_range else ", such as `data_range=(0, 255)` or (-1, 1)."
        )
        raise InputError(
            f"Images have dtype {tensor.dtype} and values from {float(tensor.min()):.4g} to "
            f"{float(tensor.max()):.4g}; allowed: {allowed}, without NaN. {advice}"
        )
    if has_other_range:
        tensor = (tensor.double() - low) / (high - low)
    if not tensor.numel():
        raise InputError(f"Images are of shape {tuple(tensor.shape)}; allowed: at least one pixel.")
    if tensor.shape[2] % multiple or tensor.shape[3] % multiple:
        raise InputError(
            f"Images are {tensor.shape[2]}x{tensor.shape[3]} pixels; this checkpoint takes heights and widths that "
            f"are multiples of {multiple}. Resize or pad them first."
        )
    # One layout, so that every form of images gives the same bits: each layout has its own kernels. `contiguous` would
    # keep any layout of one channel.
    return tensor.float().clone(memory_format=torch.contiguous_format)


def read_pixels(image: Image, channels: int, size: tuple[int, int] | None = None) -> tuple[torch.Tensor, bool]:
    """Returns the pixels of a PIL image (channels, H, W), float32 in [0, 1], and whether some were transparent.

    The image is turned as its EXIF orientation says, and transparent pixels are composed on black.

    Args:
        channels: 1 for grey, 3 for RGB.
        size: (width, height) to which the image is resized, after its middle has been cropped to these proportions.
            None leaves the image as it is.

    Raises:
        InputError: the image has more than 8 bits per channel.
        Exception: an error of Pillow, if the file of the image is damaged.
    """
    import numpy
    from PIL import Image, ImageOps

    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputError(
            f"The PIL image has mode '{image.mode}' (16 or 32 bits per pixel), whose values have no range of their "
            "own; allowed: 8-bit modes, such as L and RGB. Scale it to 8 bits first."
        )
    transparent = False
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        transparent = 255 not in colours.getchannel("A").getextrema()[:1]
        if transparent:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), colours)
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    array = numpy.asarray(image, dtype=numpy.float32) / 255
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy()), transparent


def _upright(image: Image) -> Image:
    """Returns a PIL image turned as its EXIF orientation says; as it is where the orientation can't be read.

    `ImageOps.exif_transpose` also writes the EXIF data anew, which fails for many that can be read.
    """
    from PIL import ExifTags
    from PIL.Image import Transpose

    try:
        image.load()
    except Exception:
        # A TIFF file is turned after its pixels have been read. If that fails, the second call returns the pixels; if
        # the pixels can't be read, it fails again.
        image.load()
    methods = {
        2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM, 5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE, 8: Transpose.ROTATE_90,
    }  # fmt: skip
    try:
        method = methods.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data raise errors of many kinds
        method = None
    return image if method is None else image.transpose(method)
