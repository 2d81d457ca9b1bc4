"""Images with captions and keys, read lazily from rows of `datasets`."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging

from ..errors import InputError
from ..image_folders import printable_name
from .loading import Rows, data_folder, load_rows
from .source import Caption, Example, ImageData, read_image, without_pillow_warnings

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

logger = logging.get_logger(f"diffusers.{__name__}")

WEBDATASET_KEY = "__key__"
FILE_ROWS = 2**32
"""The position of row `row` in file `file` of a stream is `FILE_ROWS * file + row`."""


class Images(torch.utils.data.Dataset):
    """Images by position. See `open_images`.

    Attributes:
        files_left_out: names of the files in the data's folder that are in no row; empty for streams, whose files are
            not known.
        num_files: number of files that are read separately: 1 for everything but streams of several files.
    """

    def __init__(self, rows: Rows, data: ImageData, channels: int, text_captions: bool):
        self.files_left_out: list[str] = [] if rows.listing is None else rows.listing.left_out
        self.rows: Dataset | IterableDataset = rows.table
        self.data, self.channels, self.text_captions, self.parquet = data, channels, text_captions, rows.parquet
        # With a limit all files are one, because the limit is that of the files together.
        self.num_files: int = self.rows.num_shards if data.streaming and data.limit is None else 1
        self._has_transparency = False  # of the images so far; one warning is enough
        feature = (self.rows.features or {}).get(data.caption_column)
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
        path = os.fsdecode((row[self.data.image_column] or {}).get("path") or "")
        folder = os.path.join(data_folder(self.data), "")
        return printable_name(path.removeprefix(folder)) if path.startswith(folder) else self.place(position)

    def place(self, position: int) -> str:
        """Returns the place of an image without a name: its position, or "FILE-ROW" in a stream's further files."""
        file, row = divmod(position, FILE_ROWS)
        return f"{file}-{row}" if file else str(row)

    def row_key(self, row: dict[str, Any], position: int) -> str | int | None:
        """Returns the key of a row: from the key column, of a webdataset, or its place in Parquet files; or None."""
        column = self.data.key_column or WEBDATASET_KEY
        if column in row:
            key = row[column]
            return key if isinstance(key, (str, int)) else str(key)
        return None if self.parquet is None else self.parquet.key(*divmod(position, FILE_ROWS))

    def row_caption(self, row: dict[str, Any]) -> Caption:
        """Returns the caption or class label of a row, or None without one (the library `datasets` says -1)."""
        caption = row[self.data.caption_column] if self.data.caption_column else None
        if not self.text_captions and isinstance(caption, str) and caption.isdecimal():
            return int(caption)
        if self.names is None or not isinstance(caption, int):
            return caption
        return self.names[caption] if caption >= 0 else None

    def without_rows(self) -> Images:
        """Returns a copy that decodes rows and has none, for processes that get their rows from another one."""
        images = copy.copy(self)
        del images.rows
        return images

    def undecoded(self, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows from position `start` on; `example` decodes them."""
        yield from self.rows.skip(start) if start else self.rows

    def example(self, row: dict[str, Any], position: int) -> Example:
        """Decodes a row of the dataset. Raises `UnreadableImageError` if it can't be decoded."""
        with without_pillow_warnings():
            return self.decode(row, position)

    def decode(self, row: dict[str, Any], position: int) -> Example:
        """Decodes a row as `example` does, within a block `without_pillow_warnings()` of the caller."""
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

    def file_rows(self, file: int, start: int = 0) -> Iterator[dict[str, Any]]:
        """Yields the undecoded rows of one file from row `start` on. No other file is read."""
        rows = self.rows if self.num_files == 1 else self.rows.shard(self.num_files, file)
        yield from rows.skip(start) if start else rows


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
    rows = load_rows(datasets, data, text_captions)
    table, listing = rows.table, rows.listing
    columns = (table.column_names or []) if listing is None else listing.columns  # a stream may not know its columns
    named_columns = {name: getattr(data, name) for name in ("image_column", "caption_column", "key_column")}
    missing = {key: column for key, column in named_columns.items() if column is not None and column not in columns}
    if missing and columns:
        raise InputError(f"The data '{data.path}' has no columns {missing}; it has: {', '.join(columns)}.")
    kind = (table.features or {}).get(data.image_column)
    holds_files = kind == datasets.Value("binary") or (isinstance(kind, dict) and "bytes" in kind)
    if listing is None and kind is not None and not (isinstance(kind, datasets.Image) or holds_files):
        raise InputError(f"Column '{data.image_column}' of '{data.path}' holds no images: {kind}.")
    if listing is None:
        table = table.cast_column(data.image_column, datasets.Image(decode=False))
    if listing is not None and listing.left_out:
        logger.warning(
            "%d files of '%s' are not among its images, such as '%s': its metadata do not list them, their ending is "
            "not known, they belong to no split, or a link leads to them a second time.",
            len(listing.left_out), printable_name(data.path), listing.left_out[0],
        )  # fmt: skip
    if data.limit is not None:
        table = table.take(data.limit)
    if not data.streaming and not len(table):
        raise no_images(data)
    return (ImageStream if data.streaming else Images)(
        dataclasses.replace(rows, table=table), data, channels, text_captions
    )


def no_images(data: ImageData) -> InputError:
    """Returns the error for empty data. Only the end of a stream shows that it is empty."""
    return InputError(f"The data '{data.path}' (split '{data.split}') has no images.")
