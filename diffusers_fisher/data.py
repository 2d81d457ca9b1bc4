"""Reads images with captions, from an image folder or a `datasets` dataset, and folders of cached latents.

Everything is read lazily. The error of an image that can't be read names it; nothing is replaced silently.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging

from .errors import InputError
from .files import expecting, open_tensors, read_table
from .image_folders import ImageList, list_images, printable_name
from .images import read_pixels
from .settings import Positive, settings_class

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from PIL.Image import Image

logger = logging.get_logger(f"diffusers.{__name__}")

Caption = str | int | None
"""A text, a class label, or neither."""

LATENT_INDEX = "index.json"
MAX_PIXELS = 2**22  # of an image that is not resized: networks need kilobytes of memory per pixel


class UnreadableImageError(InputError):
    """An image file can't be decoded. The message names the file."""


@settings_class
class ImageData:
    """The source of images.

    Args:
        path: a folder of images (captions in its metadata.jsonl or metadata.csv, as `datasets`' ImageFolder reads
            them), a folder written by `save_to_disk`, or the name of a dataset on the Hub.
        name, split, revision: configuration, split and revision of the dataset.
        image_column: column of the images.
        caption_column: column of captions or of class labels; None means that there are no captions.
        resolution: length in pixels to which the shorter side is resized before the centre is cropped to a square;
            None leaves the images as they are.
        streaming: read the images one after the other, without downloading the whole dataset.
        limit: number of images that are used, the first of the data; None means all.
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


class Images(torch.utils.data.Dataset):
    """Images by position. See `open_images`.

    Attributes:
        files_left_out: names of the files in the data's folder that are in no row; empty for streams, whose files are
            not known.
    """

    def __init__(self, rows: Dataset | IterableDataset, data: ImageData, channels: int, text_captions: bool):
        self.files_left_out: list[str] = []
        self.rows, self.data, self.channels = rows, data, channels
        self.text_captions = text_captions
        self._has_transparency = False  # of the images so far; one warning is enough
        feature = (rows.features or {}).get(data.caption_column)
        self.names: list[str] | None = getattr(feature, "names", None) if text_captions else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Decodes one image. Raises `UnreadableImageError` if it can't be decoded."""
        return self.example(self.rows[index], index)

    def name(self, index: int) -> str:
        """Returns the name of one image, without decoding the image."""
        return self.row_name(self.rows[index], index)

    def row_name(self, row: dict[str, Any], position: int) -> str:
        """Returns the name of the image in a row of the dataset."""
        path = Path(os.fsdecode((row[self.data.image_column] or {}).get("path") or ""))
        folder = _folder(self.data)
        if not path.is_absolute() or not path.is_relative_to(folder):
            return str(position)
        return printable_name(path.relative_to(folder).as_posix())

    def row_caption(self, row: dict[str, Any]) -> Caption:
        """Returns the caption or class label of a row, or None without one (the library `datasets` says -1)."""
        caption = row[self.data.caption_column] if self.data.caption_column else None
        if not self.text_captions and isinstance(caption, str) and caption.isdecimal():
            return int(caption)
        if self.names is None or not isinstance(caption, int):
            return caption
        return self.names[caption] if caption >= 0 else None

    def undecoded(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows from position `start` on; `example` decodes them."""
        yield from self.rows.skip(start) if start else self.rows

    def example(self, row: dict[str, Any], position: int) -> Example:
        """Decodes a row of the dataset."""
        name = self.row_name(row, position)
        pixels, transparent = read_image(row[self.data.image_column], name, self.data, self.channels)
        if transparent and not self._has_transparency:
            logger.warning("Image '%s' has transparent pixels, which are composed on black, as in all images.", name)
            self._has_transparency = True
        return Example(name, pixels, self.row_caption(row), transparent)


class ImageStream(Images):
    """Images one after the other, of datasets that are not downloaded as a whole."""

    def __len__(self) -> int:
        raise TypeError("A stream of images has no length.")

    def __getitem__(self, index: int) -> Example:
        raise TypeError("A stream of images has no positions; iterate over `undecoded()`.")


def open_images(data: ImageData, channels: int = 3, text_captions: bool = True) -> Images | ImageStream:
    """Opens image data without reading it.

    Args:
        channels: 3 for colour, 1 for grey.
        text_captions: replace class labels by the names that the dataset has for them.

    Raises:
        InputError: the data do not exist, have no such column or split, or are empty.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Reading images needs the package `datasets`: pip install 'diffusers_fisher[training]'."
        ) from error
    listing = _list_folder(data, text_captions)
    rows = _load(datasets, data) if listing is None else _table_of(datasets, data, listing)
    columns = (rows.column_names or []) if listing is None else listing.columns  # a stream may not know its columns
    named_columns = {"image_column": data.image_column, "caption_column": data.caption_column}
    missing = {key: column for key, column in named_columns.items() if column is not None and column not in columns}
    if missing and columns:
        raise InputError(f"The data '{data.path}' has no columns {missing}; it has: {', '.join(columns)}.")
    kind = (rows.features or {}).get(data.image_column)
    if listing is None and kind is not None and not isinstance(kind, datasets.Image):
        raise InputError(f"Column '{data.image_column}' of '{data.path}' holds no images: {kind}.")
    if listing is None:
        rows = rows.cast_column(data.image_column, datasets.Image(decode=False))
    skipped_files = [] if listing is None else listing.left_out
    if skipped_files:
        logger.warning(
            "%d files of '%s' are not among its images, such as '%s': its metadata do not list them, their ending is "
            "not known, they belong to no split, or a link leads to them a second time.",
            len(skipped_files), printable_name(data.path), skipped_files[0],
        )  # fmt: skip
    if data.limit is not None:
        rows = rows.take(data.limit)
    if not data.streaming and not len(rows):
        raise no_images(data)
    images = (ImageStream if data.streaming else Images)(rows, data, channels, text_captions)
    images.files_left_out = skipped_files
    return images


def no_images(data: ImageData) -> InputError:
    """Returns the error for empty data. Only the end of a stream shows that it is empty."""
    return InputError(f"The data '{data.path}' (split '{data.split}') has no images.")


def _load(datasets: ModuleType, data: ImageData) -> Dataset | IterableDataset:
    folder = Path(data.path)
    options = {"split": data.split, "streaming": data.streaming}
    try:
        with _quiet(datasets):
            if _is_saved(folder):
                dataset = datasets.load_from_disk(str(folder))
                rows = dataset[data.split] if isinstance(dataset, dict) else dataset
                return rows.to_iterable_dataset() if data.streaming else rows
            if set(data.path) & set("*?[]"):
                raise ValueError("`datasets` reads the characters * ? [ ] as a pattern; rename the folder")
            return datasets.load_dataset(data.path, data.name, revision=data.revision, **options)
    # Of damaged files `datasets` lets the errors of its parsers out; a folder with a loading script is a RuntimeError.
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, datasets.exceptions.DatasetsError,
    ) as error:  # fmt: skip
        # `datasets` hides a full disk behind an error of its own.
        reason = error if error.__cause__ is None else f"{error} {error.__cause__}"
        raise InputError(
            f"The data '{data.path}' (name {data.name}, split '{data.split}') can't be opened: {reason}. Give a "
            "folder of images, a folder written by `save_to_disk`, or the name of a dataset."
        ) from error


def _folder(data: ImageData) -> Path:
    """Returns the absolute path of the data's folder, as it was given: links stay."""
    return Path(os.path.abspath(data.path))


def _is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _list_folder(data: ImageData, text_captions: bool) -> ImageList | None:
    """Lists the images of a folder. Returns None for data of another kind."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    folder = _folder(data)
    if data.name is not None or not folder.is_dir() or _is_saved(folder):
        return None
    return list_images(
        str(folder), data.split, ImageFolder.EXTENSIONS, data.image_column, data.caption_column, text_captions
    )


def _table_of(datasets: ModuleType, data: ImageData, listing: ImageList) -> Dataset | IterableDataset:
    """Returns the listed images as a dataset whose rows have the form of undecoded images of `datasets`."""
    import pyarrow

    try:
        paths = pyarrow.array(listing.paths, pyarrow.string())
    except UnicodeEncodeError:  # names that are not UTF-8 are no texts
        paths = pyarrow.array([os.fsencode(path) for path in listing.paths], pyarrow.binary())
    empty_bytes = pyarrow.nulls(len(paths), pyarrow.binary())
    table = {data.image_column: pyarrow.StructArray.from_arrays([empty_bytes, paths], ["bytes", "path"])}
    if listing.captions is not None and data.caption_column is not None:
        try:
            table[data.caption_column] = pyarrow.array(listing.captions)
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"The captions '{data.caption_column}' of '{data.path}' can't be kept: {error}. Write them in UTF-8."
            ) from error
    rows = datasets.Dataset(pyarrow.table(table))
    return rows.to_iterable_dataset() if data.streaming else rows


@contextlib.contextmanager
def _quiet(datasets: ModuleType) -> Iterator[None]:
    """Disables the progress bars of `datasets`."""
    enabled = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if enabled:
            datasets.enable_progress_bars()


def read_image(image: object, name: str, data: ImageData, channels: int) -> tuple[torch.Tensor, bool]:
    """Returns pixels (C, H, W), float32 in [0, 1], and whether the image had transparent pixels.

    Args:
        image: PIL, the bytes or the path of a file, a mapping with "bytes" or "path" as `datasets` has undecoded
            images, or a uint8 array (H, W, 3) or (H, W).
        name: the name of the image in messages.

    Raises:
        UnreadableImageError: whatever goes wrong with this image.
    """
    size = None if data.resolution is None else (data.resolution, data.resolution)
    try:
        # Pillow warns of damaged tags, which are not needed, and of many pixels.
        with warnings.catch_warnings(action="ignore"), _opened(image) as picture:
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


class CachedLatents(torch.utils.data.Dataset):
    """Scaled latents and captions that `diffusers_fisher.training.cache_latents` wrote.

    Args:
        folder: folder of the cache.

    Attributes:
        skipped_images: names of the images that could not be read.
        space: note of the autoencoder that made the latents.

    Raises:
        InputError: the folder has no finished cache.
        CheckpointError: the cache's index is damaged.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if not (self.folder / LATENT_INDEX).is_file():
            raise InputError(
                f"'{folder}' holds no finished cache of latents; make it with "
                "`accelerate launch -m diffusers_fisher.training.cache_latents --config ...`."
            )
        index = read_table(self.folder / LATENT_INDEX)
        with expecting("an index of cached latents", self.folder / LATENT_INDEX, "delete it and make the cache again"):
            self._starts = [0, *itertools.accumulate(map(int, index["counts"]))]
            self.skipped_images: list[str] = [*index["skipped_images"]]
            self.space: dict[str, Any] = {**index["space"]}
        self._shards: dict[int, tuple[torch.Tensor, list[Caption]]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> tuple[torch.Tensor, Caption]:
        """Returns mean and deviation of the autoencoder's posterior, (2, C, h, w) float32, and the caption."""
        shard = bisect.bisect_right(self._starts, position) - 1
        moments, captions = self._shard(shard)
        row = position - self._starts[shard]
        return moments[row].float(), captions[row]

    def name(self, position: int) -> str:
        """Returns the name of one sample: its position, since the cache has no other names."""
        return str(position)

    def _shard(self, number: int) -> tuple[torch.Tensor, list[Caption]]:
        if number not in self._shards:
            path = self.folder / shard_name(number)
            with open_tensors(path) as file, expecting("cached latents", path, "delete it and make them again"):
                # The tensor is mapped from the file, not read.
                self._shards[number] = file.get_tensor("moments"), [*json.loads(file.metadata()["captions"])]
        return self._shards[number]


def shard_name(number: int) -> str:
    """Returns the file name of one shard of a latent cache."""
    return f"latents-{number:05d}.safetensors"
