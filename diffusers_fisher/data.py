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
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .errors import InputError
from .files import expecting, open_tensors, read_table
from .images import eight_bit
from .settings import Positive, settings_class

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.getLogger(__name__)

Caption = str | int | None
"""A text, a class label, or neither."""

LATENT_INDEX = "index.json"


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


@dataclasses.dataclass(frozen=True)
class Example:
    """One image.

    Args:
        name: path relative to the data's folder, or the position in the dataset.
        pixels: (C, H, W) float32 in [0, 1].
        caption: text or class label; None if there is none.
    """

    name: str
    pixels: torch.Tensor
    caption: Caption


class Images(torch.utils.data.Dataset):
    """Images by position. See `open_images`.

    Attributes:
        files_left_out: names of the files in the data's folder that are in no row; empty for streams, whose files are
            not known.
    """

    def __init__(self, rows: Dataset | IterableDataset, data: ImageData, channels: int, text_captions: bool):
        self.files_left_out: list[str] = []
        self.rows, self.data, self.channels = rows, data, channels
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
        path = (row[self.data.image_column] or {}).get("path")
        folder = Path(self.data.path).resolve()
        if path and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return str(position)

    def row_caption(self, row: dict[str, Any]) -> Caption:
        """Returns the caption or class label of a row, or None without one (the library `datasets` says -1)."""
        caption = row[self.data.caption_column] if self.data.caption_column else None
        if self.names is None or not isinstance(caption, int):
            return caption
        return self.names[caption] if caption >= 0 else None

    def undecoded(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows from position `start` on; `example` decodes them."""
        yield from self.rows.skip(start) if start else self.rows

    def example(self, row: dict[str, Any], position: int) -> Example:
        """Decodes a row of the dataset."""
        name = self.row_name(row, position)
        pixels = _decode(row[self.data.image_column], name, self.data, self.channels)
        return Example(name, pixels, self.row_caption(row))


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
    rows = _load(datasets, data)
    columns = rows.column_names or []  # a stream may not know its columns
    wanted = {"image_column": data.image_column, "caption_column": data.caption_column}
    missing = {key: column for key, column in wanted.items() if column is not None and column not in columns}
    if missing and columns:
        raise InputError(f"The data '{data.path}' has no columns {missing}; it has: {', '.join(columns)}.")
    kind = (rows.features or {}).get(data.image_column)
    if kind is not None and not isinstance(kind, datasets.Image):
        raise InputError(f"Column '{data.image_column}' of '{data.path}' holds no images: {kind}.")
    rows = rows.cast_column(data.image_column, datasets.Image(decode=False))
    left_out = [] if data.streaming or not _is_flat(Path(data.path), data) else _files_left_out(rows, data)
    if left_out:
        logger.warning(
            "%d files of '%s' are not among its images, such as '%s': its metadata do not list them, or `datasets` "
            "does not know their ending.", len(left_out), data.path, left_out[0],
        )  # fmt: skip
    if data.limit is not None:
        rows = rows.take(data.limit)
    if not data.streaming and not len(rows):
        raise no_images(data)
    images = (ImageStream if data.streaming else Images)(rows, data, channels, text_captions)
    images.files_left_out = left_out
    return images


def no_images(data: ImageData) -> InputError:
    """Returns the error for empty data. Only the end of a stream shows that it is empty."""
    return InputError(f"The data '{data.path}' (split '{data.split}') has no images.")


def _load(datasets: ModuleType, data: ImageData) -> Dataset | IterableDataset:
    folder = Path(data.path)
    options = {"split": data.split, "streaming": data.streaming}
    try:
        with _quiet(datasets):
            if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):
                loaded = datasets.load_from_disk(str(folder))
                rows = loaded[data.split] if isinstance(loaded, dict) else loaded
                return rows.to_iterable_dataset() if data.streaming else rows
            if _is_flat(folder, data):
                # Without `data_files`, ImageFolder takes "train" or "test" in a file's name for the file's split, and
                # leaves out all other files.
                return datasets.load_dataset("imagefolder", data_files={data.split: f"{folder}/**"}, **options)
            return datasets.load_dataset(data.path, data.name, revision=data.revision, **options)
    # Of damaged files `datasets` lets the errors of its parsers out; a folder with a loading script is a RuntimeError.
    except (
        OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, datasets.exceptions.DatasetsError,
    ) as error:  # fmt: skip
        reason = error if error.__cause__ is None else f"{error} {error.__cause__}"  # `datasets` hides a full disk
        raise InputError(
            f"The data '{data.path}' (name {data.name}, split '{data.split}') can't be opened: {reason}. Give a "
            "folder of images, a folder written by `save_to_disk`, or the name of a dataset."
        ) from error


def _is_flat(folder: Path, data: ImageData) -> bool:
    """Returns whether a folder has images or their metadata on its top level, and not one folder per split."""
    from PIL import Image

    if data.name is not None or not folder.is_dir():
        return False
    known, files = Image.registered_extensions(), (path for path in folder.iterdir() if path.is_file())
    return any(path.name.startswith("metadata.") or path.suffix.lower() in known for path in files)


def _files_left_out(rows: Dataset, data: ImageData) -> list[str]:
    """Returns the files of a folder of images that are in no row, without hidden files and the metadata.

    The metadata do not list them, or `datasets` does not know their ending.
    """
    folder = Path(data.path).resolve()
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        names = [name for name in names if not name.startswith((".", "__", "metadata."))]
        files += [Path(place, name).relative_to(folder).as_posix() for name in names]
    if len(files) == len(rows):
        return []
    paths = [Path(row[data.image_column]["path"]) for row in rows.select_columns(data.image_column)]
    return sorted(set(files) - {path.relative_to(folder).as_posix() for path in paths})


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


def _decode(entry: dict[str, Any] | None, name: str, data: ImageData, channels: int) -> torch.Tensor:
    """Returns pixels (C, H, W), float32 in [0, 1]."""
    import numpy
    from PIL import Image, ImageOps

    try:
        entry = entry or {}
        with Image.open(io.BytesIO(entry["bytes"]) if entry.get("bytes") else entry["path"]) as opened:
            image = eight_bit(ImageOps.exif_transpose(opened), channels)
    except (OSError, SyntaxError, ValueError, KeyError, RuntimeError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(f"Image '{name}' of '{data.path}' can't be read: {error}") from error
    if data.resolution is not None and image.size != (data.resolution, data.resolution):
        image = ImageOps.fit(image, (data.resolution, data.resolution), Image.Resampling.LANCZOS)
    array = numpy.asarray(image, dtype=numpy.float32) / 255
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())


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
