"""Where images come from, and how one image is read: nothing is replaced silently, and errors name the image."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import InputError
from ..images import read_pixels
from ..remote import is_url, open_url
from ..settings import Positive, settings_class

if TYPE_CHECKING:
    from PIL.Image import Image

Caption = str | int | None
"""A text, a class label, or neither."""

MAX_PIXELS = 2**22  # of an image that is not resized: networks need kilobytes of memory per pixel


class UnreadableImageError(InputError):
    """An image file can't be decoded. The message names the file."""


@settings_class
class ImageData:
    """The source of images.

    Args:
        path: a folder of images (captions in its metadata.jsonl or metadata.csv, as `datasets`' ImageFolder reads
            them), a folder written by `save_to_disk`, the name of a dataset on the Hub, or the URL of a folder of
            images, Parquet files or webdatasets (s3://bucket/folder).
        name, split, revision: configuration, split and revision of the dataset.
        image_column: column of the images.
        caption_column: column of captions or of class labels; None means that there are no captions.
        resolution: length in pixels to which the shorter side is resized before the centre is cropped to a square;
            None leaves the images as they are.
        streaming: read the images one after the other, without downloading the whole dataset.
        limit: number of images that are used, the first of the data; None means all.
        key_column: column of keys, which records keep. None means the key of a webdataset, or for Parquet files
            "FILE/ROW_GROUP/ROW"; records of other data have no keys.
        max_pixels: largest number of pixels (width times height) of an image, which its file states before its pixels
            are read. An image with more counts as unreadable. None means 2**22 pixels, or as many as Pillow reads with
            `resolution`, because the resized image needs little memory.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    resolution: Positive | None = None
    streaming: bool = False
    limit: Positive | None = None
    key_column: str | None = None
    max_pixels: Positive | None = None

    @property
    def pixel_limit(self) -> float:
        """The largest number of pixels of an image file: `max_pixels`, or its default."""
        return self.max_pixels or (MAX_PIXELS if self.resolution is None else math.inf)


@dataclasses.dataclass(frozen=True)
class Example:
    """One image.

    Args:
        name: path relative to the data's folder, or the position in the dataset.
        pixels: (C, H, W) float32 in [0, 1].
        caption: text or class label; None if there is none.
        transparent: whether the image had transparent pixels, which are composed on black.
    """

    name: str
    pixels: torch.Tensor
    caption: Caption
    transparent: bool = False


def read_image(image: object, name: str, data: ImageData, channels: int) -> tuple[torch.Tensor, bool]:
    """Returns pixels (C, H, W), float32 in [0, 1], and whether the image had transparent pixels.

    Pillow warns of damaged tags, which are not needed, and of many pixels: see `without_pillow_warnings`.

    Args:
        image: PIL, the bytes, the path or the URL of a file, a mapping with "bytes" or "path" as `datasets` has
            undecoded images, or a uint8 array (H, W, 3) or (H, W).
        name: the name of the image in messages.

    Raises:
        UnreadableImageError: whatever goes wrong with this image.
    """
    size = None if data.resolution is None else (data.resolution, data.resolution)
    try:
        with _opened(image) as picture:
            _check_size(*picture.size, data.pixel_limit)
            pixels, transparent = read_pixels(picture, channels, size)
            _, height, width = pixels.shape  # icons state one size and have another
            _check_size(width, height, data.pixel_limit)
            return pixels, transparent
    except Exception as error:  # Pillow and its decoders raise errors of many kinds over damaged files
        text = "there is not enough memory for it" if isinstance(error, MemoryError) else str(error)
        raise UnreadableImageError(
            f"Image '{name}' of '{data.path}' can't be read: {text or type(error).__name__}"
        ) from error


@contextlib.contextmanager
def without_pillow_warnings() -> Iterator[None]:
    """Encloses what reads images, in threads of its own too, and silences the warnings of Pillow.

    The filters of warnings belong to the whole process, so threads must not change them each for itself.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=rf"PIL\.|{__package__}|{read_pixels.__module__}")
        yield


@contextlib.contextmanager
def _opened(image: object) -> Iterator[Image]:
    """Yields an image of any kind that `read_image` takes as a PIL image; a file is read lazily."""
    import numpy
    from PIL import Image

    if isinstance(image, Mapping):
        image = image.get("bytes") or os.fsdecode(image["path"])
    match image:
        case Image.Image():  # it is the caller's, and stays open
            yield image
        case numpy.ndarray():
            if image.dtype != numpy.uint8:
                raise InputError(f"it is an array of {image.dtype}; allowed: uint8, of shape (H, W, 3) or (H, W).")
            yield Image.fromarray(image)
        case bytes() | bytearray() | memoryview():
            with Image.open(io.BytesIO(image)) as picture:
                yield picture
        case str() if is_url(image):
            with open_url(image) as file:
                content = io.BytesIO(file.read())  # a decoder's many small reads would be as many requests
            with Image.open(content) as picture:
                yield picture
        case str() | os.PathLike():
            with open(image, "rb") as file, Image.open(file) as picture:
                yield picture
        case _:
            raise InputError(
                f"it is a {type(image).__name__}; allowed: PIL, the bytes or the path of a file, or a uint8 array."
            )


def _check_size(width: int, height: int, limit: float) -> None:
    """Raises `InputError` if an image has no pixels, or more than `limit`."""
    if min(width, height) < 1 or width * height > limit:
        raise InputError(
            f"it has {width}x{height} pixels; allowed: 1 to {limit} pixels. Set `resolution`, which makes images "
            "smaller, or a larger `max_pixels`."
        )
