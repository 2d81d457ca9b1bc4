"""Work over many items that a kill does not undo: one JSON record an item, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, InputError
from ..files import check_writable, read_json, write_json

Item = TypeVar("Item")

SETTINGS = "settings.json"
RECORDS = "records"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class Records:
    """Records of a run over many items, in `FOLDER/records/KEY.json`, and its settings in `FOLDER/settings.json`.

    A run that begins again over the same folder takes up what is there: `missing` says which items are left. Several
    processes may share the folder; each writes its own items. What belongs to a record (a picture, tensors) is
    written before it, so that a record stands for all of its item.

    Args:
        folder: made where it is absent.
        settings: everything the records depend on, as JSON. Records of other settings are never mixed in.

    Raises:
        InputError: the folder can't be written, or holds records of other settings. CheckpointError: its settings
            are damaged.
    """

    def __init__(self, folder: str | os.PathLike, settings: Mapping[str, Any]):
        self.folder = Path(folder)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        check_writable(self.folder / RECORDS)
        file = self.folder / SETTINGS
        if not self.done():  # a run that failed before its first record binds nobody
            write_json(file, self.settings)
        elif file.is_file():
            self._compare(read_json(file))
        else:
            raise CheckpointError(f"'{self.folder}' has records but no {SETTINGS}; name another folder.")

    def done(self) -> set[str]:
        """Keys of the items that have a record."""
        return {file.stem for file in (self.folder / RECORDS).glob("*.json") if not file.name.startswith(".")}

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that have no record yet, in their order."""
        done = self.done()
        return [key for key in keys if key not in done]

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Writes the record of item `key`, atomically. Non-finite numbers are refused by `json`."""
        write_json(self._file(key), record)

    def read(self, key: str) -> dict[str, Any]:
        """The record of item `key`. Raises `CheckpointError` where it is missing or damaged, naming the file."""
        file = self._file(key)
        record = read_json(file)
        if not isinstance(record, dict):
            raise CheckpointError(f"'{file}' holds a {type(record).__name__}, no record; delete it and run again.")
        return record

    def collected(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """The records of all of `keys`, in their order."""
        return [self.read(key) for key in keys]

    def _file(self, key: str) -> Path:
        if not _KEY.fullmatch(key):
            raise InputError(
                f"The item's key is {key!r}; allowed: up to 200 letters, digits, '.', '_' and '-', not beginning with "
                "a point or a dash."
            )
        return self.folder / RECORDS / f"{key}.json"

    def _compare(self, before: Any) -> None:
        if before == self.settings:
            return
        before = before if isinstance(before, dict) else {}
        nothing = object()
        names = sorted(before.keys() | self.settings.keys())
        changed = [name for name in names if before.get(name, nothing) != self.settings.get(name, nothing)]
        lines = [f"`{name}` was {_said(before, name)}, is {_said(self.settings, name)}" for name in changed]
        raise InputError(
            f"'{self.folder}' holds records of other settings: {'; '.join(lines)}. Take the same settings to go on, "
            "or another folder."
        )


def item_keys(count: int) -> list[str]:
    """Keys of numbered items: "00000", "00001", ..."""
    return [f"{index:05d}" for index in range(count)]


def shard(items: Sequence[Item], process_index: int, num_processes: int) -> Sequence[Item]:
    """The items of one process, every `num_processes`-th: the same for all whatever is done already, so that no item
    is taken twice or by none."""
    return items[process_index::num_processes]


def _said(table: Mapping[str, Any], name: str) -> str:
    text = json.dumps(table[name]) if name in table else "absent"
    return text if len(text) <= 120 else text[:117] + "..."
