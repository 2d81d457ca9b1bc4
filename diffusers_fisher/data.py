"""Images with captions, from an image folder or a `datasets` dataset, and folders of cached latents.

Everything is read lazily. What can't be read is named, never silently replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, InputError
from .files import read_json
from .images import eight_bit

logger = logging.getLogger(__name__)

LATENT_INDEX = "index.json"


class UnreadableImageError(InputError):
    """An image file that can't be decoded; the message names it."""


@dataclasses.dataclass
class ImageData:
    """Where images come from.

    Args:
        path: a folder of images (captions in its metadata.jsonl or metadata.csv, as `datasets`' ImageFolder reads
            them), a folder written by `save_to_disk`, or the name of a dataset on the Hub.
        name, split, revision: of the dataset.
        image_column: column of the images.
        caption_column: column of captions, or of class labels; None: no captions.
        resolution: the shorter side is resized to it and the centre cropped to a square; None: images as they are.
        streaming: read one after the other, never downloading the whole.
        limit: only the first so many images.
    """

    path: str
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str | None = None
    resolution: int | None = None
    streaming: bool = False
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """One image.

    Args:
        name: path relative to the data's folder, or the position in the dataset.
        pixels: (C, H, W) float32 in [0, 1].
        caption: text or class label; None without captions.
    """

    name: str
    pixels: torch.Tensor
    caption: Any


class Images(torch.utils.data.Dataset):
    """Images by position. See `open_images`.

    Attributes:
        files_left_out: names of files in the data's folder that are in no row; of streams not known.
    """

    def __init__(self, rows: Any, data: ImageData, channels: int, text_captions: bool):
        self.files_left_out: list[str] = []
        self.rows, self.data, self.channels = rows, data, channels
        self.names = _class_names(rows, data) if text_captions else None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Raises `UnreadableImageError` for an image that can't be decoded."""
        return self.example(self.rows[index], index)

    def name(self, index: int) -> str:
        """Name of one image, without decoding it."""
        return self.row_name(self.rows[index], index)

    def row_name(self, row: dict[str, Any], position: int) -> str:
        """The same for a row of the dataset."""
        path = (row[self.data.image_column] or {}).get("path")
        folder = Path(self.data.path).resolve()
        if path and Path(path).is_relative_to(folder):
            return Path(path).relative_to(folder).as_posix()
        return str(position)

    def row_caption(self, row: dict[str, Any]) -> Any:
        """The caption or class label of a row; None without (-1 is the datasets library's word for that)."""
        caption = row[self.data.caption_column] if self.data.caption_column else None
        if self.names is None or not isinstance(caption, int):
            return caption
        return self.names[caption] if caption >= 0 else None

    def example(self, row: dict[str, Any], position: int) -> Example:
        """A row of the dataset, decoded."""
        name = self.row_name(row, position)
        pixels = _decode(row[self.data.image_column], name, self.data, self.channels)
        return Example(name, pixels, self.row_caption(row))


class ImageStream(Images):
    """The same one after the other, for datasets that are not downloaded as a whole."""

    def __len__(self) -> int:
        raise TypeError("A stream of images has no length.")

    def __getitem__(self, index: int) -> Example:
        raise TypeError("A stream of images has no positions; iterate over `undecoded()`.")

    def undecoded(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """Rows from position `start` on, not decoded; see `example`."""
        yield from self.rows.skip(start) if start else self.rows


def open_images(data: ImageData, channels: int = 3, text_captions: bool = True) -> Images | ImageStream:
    """Opens image data without reading it.

    Args:
        channels: 3 for colour, 1 for grey.
        text_captions: give class labels by the names that the dataset has for them.

    Raises:
        InputError: data that is not there, has no such column or split, or is empty.
    """
    if (data.resolution is not None and data.resolution < 1) or (data.limit is not None and data.limit < 1):
        raise InputError(f"`resolution` is {data.resolution}, `limit` {data.limit}; allowed: positive, or none.")
    datasets = _datasets()
    rows = _load(datasets, data)
    columns = rows.column_names or []  # a stream may not know them
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
    if data.streaming:
        return ImageStream(rows, data, channels, text_captions)
    if not len(rows):
        raise no_images(data)
    images = Images(rows, data, channels, text_captions)
    images.files_left_out = left_out
    return images


def no_images(data: ImageData) -> InputError:
    """The error of data that are empty, which of a stream is found out at its end."""
    return InputError(f"The data '{data.path}' (split '{data.split}') has no images.")


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "Reading images needs the package `datasets`: pip install 'diffusers_fisher[training]'."
        ) from error
    return datasets


def _load(datasets: Any, data: ImageData) -> Any:
    folder = Path(data.path)
    saved = folder / "state.json", folder / "dataset_dict.json"
    try:
        with _quiet(datasets):
            if any(path.is_file() for path in saved):
                loaded = datasets.load_from_disk(str(folder))
                rows = loaded[data.split] if isinstance(loaded, dict) else loaded
                return rows.to_iterable_dataset() if data.streaming else rows
            if _is_flat(folder, data):
                # By itself ImageFolder takes "train" or "test" in a file's name for its split, without the others.
                return datasets.load_dataset(
                    "imagefolder", data_files={data.split: f"{folder}/**"}, split=data.split, streaming=data.streaming
                )
            return datasets.load_dataset(
                data.path, data.name, split=data.split, revision=data.revision, streaming=data.streaming
            )
    except (OSError, ValueError, KeyError, IndexError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"The data '{data.path}' (name {data.name}, split '{data.split}') can't be opened: {error}. Give a folder "
            "of images, a folder written by `save_to_disk`, or the name of a dataset."
        ) from error


def _is_flat(folder: Path, data: ImageData) -> bool:
    """Whether it is a folder with images or their metadata on top, all of one split, not one folder a split."""
    from PIL import Image

    if data.name is not None or not folder.is_dir():
        return False
    known, files = Image.registered_extensions(), (path for path in folder.iterdir() if path.is_file())
    return any(path.name.startswith("metadata.") or path.suffix.lower() in known for path in files)


def _files_left_out(rows: Any, data: ImageData) -> list[str]:
    """Files of a folder of images that are in no row: `metadata` does not list them, or `datasets` does not know their
    ending. Hidden files and the metadata are none of them."""
    folder = Path(data.path).resolve()
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        shown = [name for name in names if not name.startswith((".", "__", "metadata."))]
        files += [Path(place, name).relative_to(folder).as_posix() for name in shown]
    if len(files) == len(rows):
        return []
    paths = [Path(row[data.image_column]["path"]) for row in rows.select_columns(data.image_column)]
    return sorted(set(files) - {path.relative_to(folder).as_posix() for path in paths})


@contextlib.contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """`datasets` without its own progress bars."""
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _class_names(rows: Any, data: ImageData) -> list[str] | None:
    feature = (rows.features or {}).get(data.caption_column)
    return getattr(feature, "names", None)


def _decode(entry: dict[str, Any] | None, name: str, data: ImageData, channels: int) -> torch.Tensor:
    """(C, H, W) float32 in [0, 1]."""
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
        folder: of the cache.

    Attributes:
        index: what the cache says of itself: shape, counts, the autoencoder's fingerprint, images left out.

    Raises:
        InputError: a folder without a finished cache.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if not (self.folder / LATENT_INDEX).is_file():
            raise InputError(
                f"'{folder}' holds no finished cache of latents; make it with "
                "`accelerate launch -m diffusers_fisher.training.cache_latents --config ...`."
            )
        self.index = read_json(self.folder / LATENT_INDEX)
        starts = [0]
        for count in self.index["counts"]:
            starts.append(starts[-1] + count)
        self._starts = torch.tensor(starts)
        self._shards: dict[int, tuple[Any, list[Any]]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, position: int) -> tuple[torch.Tensor, Any]:
        """Mean and standard deviation of the autoencoder's posterior, (2, C, h, w) float32, and their caption."""
        shard = int(torch.searchsorted(self._starts, position, right=True)) - 1
        moments, captions = self._shard(shard)
        row = position - int(self._starts[shard])
        return moments[row].float(), captions[row]

    def _shard(self, number: int) -> tuple[Any, list[Any]]:
        from safetensors import SafetensorError, safe_open

        if number not in self._shards:
            path = self.folder / shard_name(number)
            try:
                with safe_open(path, framework="pt") as file:  # the tensor is mapped from the file, not read
                    captions = json.loads(file.metadata()["captions"])
                    self._shards[number] = file.get_tensor("moments"), captions
            except (OSError, SafetensorError, KeyError) as error:
                raise CheckpointError(f"Cached latents '{path}' can't be read: {error}; make them again.") from error
        return self._shards[number]


def shard_name(number: int) -> str:
    """File of one shard of a latent cache."""
    return f"latents-{number:05d}.safetensors"
