"""Lists the images of a folder, or of a folder at a URL, with their captions and splits. No path is a pattern."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from .errors import InputError
from .remote import is_url, list_url, open_url

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CONTAINERS = (".parquet", ".arrow", ".tar", ".zip")  # files of datasets that hold images in themselves
FILE_NAME = "file_name"
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}
"""The words in a folder's name that name its split. They are those of the library `datasets`."""


@dataclasses.dataclass(frozen=True)
class ImageList:
    """The images of one split of a folder.

    Args:
        paths: absolute paths of the files, or their URLs.
        columns: columns of the data: the images, and what the metadata have, or "label" for names of subfolders.
        captions: one caption per image, from the caption column; None where there is no such column.
        keys: one key per image, from the key column; None where there is no such column.
        left_out: names of the files and folders that are not among the images, relative to the folder.
    """

    paths: list[str]
    columns: list[str]
    captions: Sequence[str | int | None] | None
    keys: Sequence[str | int | None] | None
    left_out: list[str]


def list_images(
    folder: str,
    split: str,
    endings: Iterable[str],
    image_column: str,
    caption_column: str | None,
    text_labels: bool,
    key_column: str | None = None,
) -> ImageList | None:
    """Lists the images of one split of a folder, in the order of their names or of the metadata.

    Links to folders are followed. A folder to which several links lead is listed once. The splits of a folder are
    named by its subfolders, such as "train" and "test". The images of a folder without them are the split "train".

    Args:
        folder: absolute path, or a URL.
        endings: endings of image files, in small letters and with the point.
        text_labels: names of subfolders as texts, where they are the captions; otherwise their numbers.

    Returns:
        The images; None if the folder holds a dataset of another kind, or nothing.

    Raises:
        InputError: the folder has no such split, or its metadata can't be read.
    """
    suffixes = set(endings)
    files, unreadable = (_list_remote(folder), []) if is_url(folder) else _list_files(folder)
    metadata = [name for name in files if os.path.basename(name) in METADATA]
    images = [name for name in files if any(end.lower() in suffixes for end in Path(name).suffixes[-2:])]
    containers = [name for name in files if name.endswith(CONTAINERS) and name not in metadata]
    if not metadata and len(images) <= len(containers):
        return None
    split_of = _splits(folder, [*images, *metadata], split)
    rows = [row for name in metadata for row in _read_metadata(folder, name, image_column)]
    rows = [(name, row) for name, row in rows if split_of(name) == split]
    captions: list[str | int | None] | None = None
    keys: list[str | int | None] | None = None
    if rows:
        image_names = [name for name, _ in rows]
        columns = list(dict.fromkeys(_column(key) for _, row in rows for key in row))
        if caption_column in columns:
            captions = _texts_or_numbers("caption", folder, image_names, [row.get(caption_column) for _, row in rows])
        if key_column in columns:
            keys = _texts_or_numbers("key", folder, image_names, [row.get(key_column) for _, row in rows])
    else:
        image_names, columns = [name for name in images if split_of(name) == split], ["image"]
        in_splits = [name for name in images if split_of(name)]
        labels = sorted({_folder_name(name) for name in in_splits})
        if len(labels) > 1 and len({name.count("/") for name in in_splits}) == 1:
            columns.append("label")
        if caption_column == "label" and caption_column in columns:
            names = [_folder_name(name) for name in image_names]
            captions = [name if text_labels else labels.index(name) for name in names]
    others = {name for name in files if split_of(name) in (split, None)} - set(image_names) - set(metadata)
    left_out = sorted(map(printable_name, [*others, *unreadable]))
    return ImageList([os.path.join(folder, name) for name in image_names], columns, captions, keys, left_out)


def printable_name(name: str) -> str:
    """Returns a file's name as text: bytes that are not UTF-8 are shown as \\xNN, because no report can hold them."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _folder_name(name: str) -> str:
    return os.path.basename(os.path.dirname(name))


def _list_files(folder: str) -> tuple[list[str], list[str]]:
    """Returns the names of all files that are not hidden, and of what can't be read or is listed already.

    The folders that links lead to come after all others, so that a link never takes a file's own name from it.
    """
    files: list[str] = []
    skipped: list[str] = []
    visited_folders: set[str] = set()
    starts = [folder]
    for start in starts:  # the list grows in the loop
        for place, folders, names in os.walk(start, onerror=lambda error: skipped.append(str(error.filename))):
            real_path = os.path.realpath(place)
            if real_path in visited_folders:
                skipped.append(place)
                folders.clear()
                continue
            visited_folders.add(real_path)
            folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
            starts += filter(os.path.islink, (os.path.join(place, name) for name in folders))
            paths = [os.path.join(place, name) for name in names if not name.startswith(".")]
            for path in paths:
                (files if os.path.isfile(path) else skipped).append(path)  # no pipes, which would wait for a writer
    return sorted(os.path.relpath(path, folder) for path in files), [os.path.relpath(path, folder) for path in skipped]


def _list_remote(url: str) -> list[str]:
    """Returns the names of all files of a folder at a URL that are not hidden."""
    return [name for name in list_url(url) if not re.search(r"(^|/)\.|(^|/)__[^/]*/", name)]


def split_files(url: str, split: str, endings: tuple[str, ...]) -> list[str]:
    """Returns the URLs of the files with some endings in a folder at a URL that belong to a split.

    The names of folders and of the files themselves name the splits, as those of folders do in `list_images`.

    Raises:
        InputError: the folder has no such split, or can't be listed.
    """
    names = [name for name in _list_remote(url) if name.endswith(endings)]
    if not names:
        return []
    split_of = _splits(url, [f"{name}/" for name in names], split)
    return [os.path.join(url, name) for name in names if split_of(f"{name}/") == split]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Opens a file, or a file at a URL, for reading bytes."""
    with open_url(path) if is_url(path) else open(path, "rb") as file:
        yield file


def _splits(folder: str, names: Sequence[str], choice: str) -> Callable[[str], str | None]:
    """Returns the function from a file's name to its split; None for a file that belongs to no split.

    Raises:
        InputError: no image belongs to the split that is wanted.
    """

    def split_by_name(name: str) -> str | None:
        for part in name.split("/")[:-1]:
            words = set(re.split(r"[-._ 0-9]+", part))
            split = choice if part == choice else next((name for name, keys in SPLITS.items() if words & keys), None)
            if split is not None:
                return split
        return None

    split_names = {split_by_name(name) for name in names} - {None}
    # Images beside one folder "train" may be those of other classes.
    is_flat = any("/" not in name for name in names)
    default = "train" if "train" not in split_names or (split_names == {"train"} and is_flat) else None
    if choice not in split_names and choice != default:
        available = ", ".join(sorted(filter(None, {*split_names, default})))
        raise InputError(
            f"The split is '{choice}', but '{folder}' has only: {available}. A folder whose subfolders name no split "
            "has only the split 'train'."
        )
    return lambda name: split_by_name(name) or default


def _column(key: str) -> str:
    """Returns the column of an entry of the metadata: entries with names of files are columns of images."""
    return "image" if key == FILE_NAME else key.removesuffix(f"_{FILE_NAME}")


def _read_metadata(folder: str, name: str, image_column: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns the names of the images in one file of metadata, relative to the folder, each with its row.

    Raises:
        InputError: the file can't be read, has no such column, or names an image outside of its own folder.
    """
    path, images = os.path.join(folder, name), []
    try:
        rows = list(_metadata_rows(path))
        keys = list(dict.fromkeys(key for row in rows for key in row))
        key = next((key for key in keys if key.endswith(FILE_NAME) and _column(key) == image_column), "")
        if rows and not key:
            columns = ", ".join(map(_column, keys))
            raise InputError(f"Column '{image_column}' of '{path}' holds no images; its columns: {columns}.")
        for number, row in enumerate(rows, 1):
            value = row.get(key)
            if not isinstance(value, str) or not value:
                raise ValueError(f"row {number} has no `{key}`")
            image = os.path.normpath(value)
            is_there = not is_url(path) and os.path.exists(os.path.join(os.path.dirname(path), image))
            if "\\" in image and not is_there:
                image = os.path.normpath(image.replace("\\", "/"))
            if os.path.isabs(image) or image.split("/")[0] == "..":
                raise ValueError(f"row {number} names '{value}', which is outside of its folder")
            images.append(os.path.join(os.path.dirname(name), image))
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise InputError(
            f"The metadata '{path}' can't be read: {error}. Allowed: CSV, JSON lines or Parquet in UTF-8, whose "
            f"`{FILE_NAME}` names one image per row, relative to the folder of the metadata."
        ) from error
    return list(zip(images, rows, strict=True))


def _metadata_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a file of metadata. Values of CSV stay texts, and so do fractions in JSON."""
    if path.endswith(".parquet"):
        from pyarrow import parquet

        with _opened(path) as content:
            yield from parquet.read_table(content).to_pylist()
        return
    with _opened(path) as content, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as file:
        if path.endswith(".csv"):
            for row in csv.DictReader(file):
                yield {key: value or None for key, value in row.items() if key is not None}
        else:
            for line in filter(str.strip, file):
                row = json.loads(line, parse_float=str)
                if not isinstance(row, dict):
                    raise ValueError(f"the line {line.strip():.40} is no mapping")
                yield row


def _texts_or_numbers(
    what: str, folder: str, names: Sequence[str], values: Sequence[object]
) -> list[str | int | None]:
    """Returns captions or keys. Numbers among texts are texts, as they were written.

    Args:
        what: what the values are, in the words of the message.

    Raises:
        InputError: a value is neither a text nor a number.
    """
    entries: list[str | int | None] = []
    for name, value in zip(names, values, strict=True):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int))):
            raise InputError(
                f"The {what} of '{name}' in '{folder}' is {value!r:.60}; allowed: a text, a whole number or nothing."
            )
        entries.append(value)
    if any(isinstance(entry, str) for entry in entries):
        entries = [None if entry is None else str(entry) for entry in entries]
    return entries
