"""Opens image folders, datasets and files of datasets, on this machine and at URLs, as rows of `datasets`."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..errors import InputError
from ..image_folders import ImageList, list_images, split_files
from ..remote import is_url
from .parquet_rows import ParquetRows
from .source import ImageData

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

BUILDERS = {".parquet": "parquet", ".tar": "webdataset"}
"""Builders of `datasets` for the files at a URL, by their ending."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of image data.

    Args:
        table: the rows, whose images are undecoded.
        listing: the list of the images of a folder; None for data of another kind.
        parquet: names the rows of Parquet files; None for data of another kind.
    """

    table: Dataset | IterableDataset
    listing: ImageList | None = None
    parquet: ParquetRows | None = None


def load_rows(datasets: ModuleType, data: ImageData, text_captions: bool) -> Rows:
    """Opens image data without reading it. Raises `InputError` if they can't be opened."""
    listing = _list_folder(data, text_captions)
    if listing is not None:
        return Rows(_table_of(datasets, data, listing), listing)
    table, files = _load(datasets, data)
    return Rows(table, parquet=ParquetRows(files) if files and all(map(_is_parquet, files)) else None)


def _is_parquet(file: str) -> bool:
    return file.endswith(".parquet")


def data_folder(data: ImageData) -> str:
    """Returns the absolute path of the data's folder, as it was given (links stay), or its URL."""
    return data.path.rstrip("/") if is_url(data.path) else os.path.abspath(data.path)


def _load(datasets: ModuleType, data: ImageData) -> tuple[Dataset | IterableDataset, Sequence[str]]:
    """Returns the rows of a dataset and the files that they lie in; no files where these are not known."""
    folder = Path(data.path)
    options = {"split": data.split, "streaming": data.streaming}
    try:
        with _quiet(datasets):
            if is_url(data.path):
                files = _files_of(data)
                builder = BUILDERS[Path(files[0]).suffix]
                options["split"] = "train"
                return datasets.load_dataset(builder, data_files={"train": files}, **options), files
            if _is_saved(folder):
                dataset = datasets.load_from_disk(str(folder))
                rows = dataset[data.split] if isinstance(dataset, dict) else dataset
                return (rows.to_iterable_dataset() if data.streaming else rows), []
            if set(data.path) & set("*?[]"):
                raise ValueError("`datasets` reads the characters * ? [ ] as a pattern; rename the folder")
            rows = datasets.load_dataset(data.path, data.name, revision=data.revision, **options)
            if rows.info.builder_name != "parquet":
                return rows, []
            builder = datasets.load_dataset_builder(data.path, data.name, revision=data.revision)
            return rows, [*(builder.config.data_files or {}).get(data.split, [])]
    except InputError:
        raise
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


def _files_of(data: ImageData) -> list[str]:
    """Returns the URLs of the Parquet files or webdatasets of one split at a URL.

    Raises:
        InputError: there are none, or of both kinds.
    """
    url = data_folder(data)
    files = split_files(url, data.split, tuple(BUILDERS))
    endings = sorted({Path(file).suffix for file in files})
    if len(endings) != 1:
        found = f"it has {' and '.join(endings)}" if endings else "it has none of them, or does not exist"
        raise InputError(
            f"The data '{data.path}' can't be opened: {found}. Allowed at a URL: a folder of images, of Parquet files "
            "(.parquet) or of webdatasets (.tar)."
        )
    return files


def _is_saved(folder: Path) -> bool:
    """Returns whether `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _list_folder(data: ImageData, text_captions: bool) -> ImageList | None:
    """Lists the images of a folder. Returns None for data of another kind."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    folder = data_folder(data)
    is_folder = is_url(folder) or (data.name is None and os.path.isdir(folder) and not _is_saved(Path(folder)))
    if not is_folder:
        return None
    return list_images(
        folder, data.split, ImageFolder.EXTENSIONS, data.image_column, data.caption_column, text_captions,
        data.key_column,
    )  # fmt: skip


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
    if listing.keys is not None and data.key_column is not None:
        table[data.key_column] = pyarrow.array(listing.keys)
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
