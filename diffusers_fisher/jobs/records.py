"""Keeps the work over many items through a kill: one JSON record per item, written whole or not at all."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from ..errors import CheckpointError, InputError
from ..files import atomic_path, check_writable, read_json, read_table, write_json, writing
from .identity import note_differences, refuse_differences
from .run_folder import RemoteFolder

Item = TypeVar("Item")

SETTINGS = "settings.json"
RECORDS = "records"
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


class Records:
    """Records of a run over many items, in `FOLDER/records/KEY.json`, and its settings in `FOLDER/settings.json`.

    A run that starts again in the same folder continues it: `missing` says which items are left. Several
    processes may share the folder; each writes its own items. Other files of an item (a picture, tensors) are written
    before its record, so that a record says that the whole item is there.

    Args:
        folder: folder of the run; it is made where it is absent.
        settings: everything that the records depend on, as JSON. Records of other settings are never mixed in.
        kind: type of a record, which pydantic checks.
        remote: the folder at a URL of which `folder` is a copy; None for a folder of this machine alone.

    Raises:
        InputError: the folder can't be written, or holds records of other settings.
        CheckpointError: the folder's settings are damaged.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        settings: Mapping[str, Any],
        kind: Any = dict[str, Any],
        remote: RemoteFolder | None = None,
    ):
        self._remote = remote
        self.folder, self._kind = Path(folder), pydantic.TypeAdapter[Any](kind)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings, allow_nan=False))
        for folder in (self.folder, self.folder / RECORDS):
            check_writable(folder)
        file = self.folder / SETTINGS
        if not self.done():  # other settings may take the folder of a run that failed before its first record
            self.write_settings(self.settings)
            return
        if not file.is_file():
            raise CheckpointError(f"'{self.folder}' has records but no {SETTINGS}; name another folder.")
        differences = note_differences(read_table(file), self.settings)
        advice = "Take the same settings to go on, or another folder."
        refuse_differences(self.folder, "holds records of other settings", differences, advice)

    def done(self) -> set[str]:
        """Returns the keys of the items that have a record."""
        if self._remote is not None:  # other machines write there too
            self._remote.pull(RECORDS)
        return {file.stem for file in (self.folder / RECORDS).glob("*.json") if not file.name.startswith(".")}

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Writes `settings.json` anew."""
        write_json(self.folder / SETTINGS, settings)
        self._push(self.folder / SETTINGS)

    def _push(self, file: Path) -> None:
        if self._remote is not None:
            self._remote.push(file)

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Returns the keys that have no record yet, in the order of `keys`."""
        done = self.done()
        return [key for key in keys if key not in done]

    def write(self, key: str, record: Mapping[str, Any]) -> None:
        """Writes the record of item `key`, atomically.

        Raises:
            ValueError: the record has numbers that are not finite.
            CheckpointError: the file can't be written; the disk is full, for example.
        """
        file = self.file(key)
        with writing(file, "make room and run the same command again, all other records are kept"):
            write_json(file, record)
            self._push(file)

    def copy(self, key: str, source: "Records") -> None:
        """Takes over the record of item `key` from another folder, atomically."""
        with atomic_path(self.file(key)) as temporary:
            shutil.copyfile(source.file(key), temporary)
        self._push(self.file(key))

    def read(self, key: str) -> dict[str, Any]:
        """Returns the record of item `key`. Raises `CheckpointError` if it is missing, damaged or of another kind."""
        file = self.file(key)
        record: dict[str, Any] = read_json(file)
        try:
            self._kind.validate_python(record, strict=True)
        except pydantic.ValidationError as error:
            mistake = error.errors(include_url=False)[0]
            place = "".join(f"`{part}` " for part in mistake["loc"])
            raise CheckpointError(
                f"'{file}' is no record of this run: {place}{mistake['msg']}. It is damaged or another program's; "
                "delete it and run again."
            ) from error
        return record

    def collected(self, keys: Iterable[str]) -> list[dict[str, Any]]:
        """Returns the records of all `keys`, in the order of `keys`."""
        return [self.read(key) for key in keys]

    def file(self, key: str) -> Path:
        """Returns the file of the record of item `key`. Raises `InputError` for a key that is no file name."""
        if not _KEY.fullmatch(key):
            raise InputError(
                f"The item's key is {key!r}; allowed: up to 200 letters, digits, '.', '_' and '-', not beginning with "
                "a point or a dash."
            )
        return self.folder / RECORDS / f"{key}.json"


def item_keys(count: int) -> list[str]:
    """Returns the keys of numbered items: "00000", "00001", ..."""
    return [f"{index:05d}" for index in range(count)]


def shard(items: Sequence[Item], process_index: int, num_processes: int) -> Sequence[Item]:
    """Returns the items of one process: every `num_processes`-th.

    The shard does not depend on what is done already, so no item is processed twice or left out.
    """
    return items[process_index::num_processes]
