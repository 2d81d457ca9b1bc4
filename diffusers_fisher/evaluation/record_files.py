"""Writes the records of a dataset's likelihoods to one file: JSON lines, and Parquet where it is asked for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_path, json_line

if TYPE_CHECKING:
    import pyarrow

ROWS = 1000  # rows of Parquet that are written at once
ROW_GROUP = 100_000

NUMBERS = (
    "bits_per_dim", "log_prob", "prior_log_prob", "trace_log_prob", "bound", "clamped", "total_error",
    "standard_error", "discretisation_error", "trace_error", "prior_error",
)  # fmt: skip
TEXTS = ("name", "key", "caption", "trace_check", "status", "error")
INTEGERS = ("position", "dims", "levels")


def write_lines(records: Iterable[Mapping[str, Any]], folder: Path, parquet: bool) -> Iterator[Mapping[str, Any]]:
    """Writes `likelihoods.jsonl`, and with `parquet` `likelihoods.parquet`; yields the records as they are written.

    Both files are complete or absent. The columns of Parquet are those of the lines: numbers are null where they are
    not known or where an image has an error, captions and keys are texts.
    """
    with contextlib.ExitStack() as stack:
        lines = stack.enter_context(atomic_path(folder / "likelihoods.jsonl"))
        file = stack.enter_context(open(lines, "w", encoding="utf-8", errors="backslashreplace"))
        table = None
        if parquet:
            from pyarrow import parquet as files

            path = stack.enter_context(atomic_path(folder / "likelihoods.parquet"))
            table = stack.enter_context(files.ParquetWriter(path, _schema()))
        groups = iter(records)
        while rows := list(itertools.islice(groups, ROWS)):
            for row in rows:
                file.write(json_line(row))
            if table is not None:
                table.write_batch(_batch(rows), row_group_size=ROW_GROUP)
            yield from rows


def _schema() -> pyarrow.Schema:
    import pyarrow

    kinds: dict[str, Any] = {
        **dict.fromkeys(INTEGERS, pyarrow.int64()), **dict.fromkeys(TEXTS, pyarrow.string()),
        **dict.fromkeys(NUMBERS, pyarrow.float64()),
        "transparent": pyarrow.bool_(), "r": pyarrow.list_(pyarrow.float64()),
    }  # fmt: skip
    return pyarrow.schema(kinds)


def _batch(rows: Iterable[Mapping[str, Any]]) -> pyarrow.RecordBatch:
    import pyarrow

    entries = [
        {**row, **{name: str(row[name]) for name in ("key", "caption") if row.get(name) is not None},
         "transparent": row.get("transparent", False)} for row in rows
    ]  # fmt: skip
    return pyarrow.RecordBatch.from_pylist(entries, _schema())
