"""A folder of training states: written atomically, the newest few kept, and the loss curve that belongs to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, InputError
from ..files import atomic_path, read_json, write_json
from ..jobs.config import flat_settings
from ..models import fingerprint_differences
from .state import load_training_state, save_training_state

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints/step-*.safetensors"
DATA_NOTE = "data.json"
PREPARED = ("paths.safetensors", "loss.jsonl", "validation.jsonl", "validation.png", "skipped.json")
"""What depends on settings, denoiser and data, and may be there before the first checkpoint."""


@dataclasses.dataclass
class TrainingFolder:
    """Checkpoints, loss curve and configuration of one run.

    Args:
        path: of the folder.
        keep: checkpoints that stay; older ones are removed once a newer one is whole.
        work: patterns of files that bind the folder to a run's settings, denoiser and data; before there is one of
            them, others may have it.
    """

    path: Path
    keep: int = 2
    work: tuple[str, ...] = (CHECKPOINTS, "trace_model")

    @property
    def _states(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.path.glob(CHECKPOINTS))

    @property
    def last_good(self) -> str:
        """In words, where a run may be taken up."""
        states = self._states
        return f"the last good checkpoint is '{states[-1]}'" if states else "no checkpoint was written yet"

    @property
    def skipped(self) -> list[str]:
        """Names of images that could not be read up to the newest checkpoint."""
        path = self.path / "skipped.json"
        return read_json(path) if path.exists() and self._states else []

    @skipped.setter
    def skipped(self, names: list[str]) -> None:
        with self.writing("skipped.json"):
            write_json(self.path / "skipped.json", names)

    def writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Around what writes file `name` of the folder. Raises `CheckpointError`: the disk is full, say."""
        return writing(self.path / name, self.last_good)

    @property
    def begun(self) -> bool:
        """Whether there is work that other settings would spoil."""
        return any(True for pattern in self.work for _ in self.path.glob(pattern))

    def check(self, settings: Mapping[str, Any], free: tuple[str, ...]) -> None:
        """Refuses to go on with a run of other settings, once it has written anything of its work.

        Args:
            settings: of the run, what JSON can say; sections nested.
            free: keys "section.key", or sections, that may change.

        Raises:
            InputError: names the settings that differ.
        """
        differing = self._other_settings(settings, free)
        if differing and self.begun:
            raise InputError(
                f"'{self.path}' holds a run with other settings: {'; '.join(differing)}. Resume with those, or name "
                "another output folder."
            )

    def check_data(self, data: Mapping[str, Any] | None) -> None:
        """Refuses to go on with data that have changed, once the run has written anything of its work.

        Args:
            data: what `data_note` says; None: nothing is known of the data. Folders without a note take any.

        Raises:
            InputError: says what differs.
        """
        differing = self._other_data(data)
        if differing and self.begun:
            raise InputError(
                f"'{self.path}' was made of other data: {'; '.join(differing)}. Images were added, removed or renamed "
                "since: put them back as they were, or name another folder."
            )

    def claim(
        self,
        settings: Mapping[str, Any],
        free: tuple[str, ...],
        fingerprint: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes what the run is, once all of it was found to be right: settings, the denoiser's fingerprint, the data.

        Where another run wrote nothing of its work, what it prepared is removed.

        Raises:
            InputError: as `check` and `check_data`, or the run was begun with another denoiser; says what differs.
        """
        self.check(settings, free)
        self.check_data(data)
        path = self.path / "fingerprint.json"
        other_denoiser: list[str] = []
        if fingerprint is not None and path.exists():
            other_denoiser = fingerprint_differences(read_json(path), fingerprint)
        if other_denoiser and self.begun:
            raise InputError(
                f"'{self.path}' holds a run of another denoiser. What differs: {'; '.join(other_denoiser)}. Resume "
                "with that denoiser, or name another output folder."
            )
        if other_denoiser or self._other_settings(settings, free) or self._other_data(data):
            for name in (*PREPARED, path.name, DATA_NOTE):
                with self.writing(name):
                    (self.path / name).unlink(missing_ok=True)
        for name, note in ((path.name, fingerprint), (DATA_NOTE, data)):
            if note is not None and not (self.path / name).exists():
                with self.writing(name):
                    write_json(self.path / name, note)
        with self.writing("config.json"):
            write_json(self.path / "config.json", settings)

    def _other_settings(self, settings: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
        """In words, those in which the folder's run has others."""
        path = self.path / "config.json"
        if not path.exists():
            return []
        before, now = (
            {key: value for key, value in flat_settings(found).items() if not key.startswith(free)}
            for found in (read_json(path), settings)
        )
        return _differences(before, now, sorted(now | before))

    def _other_data(self, data: Mapping[str, Any] | None) -> list[str]:
        """In words, what of the data has changed, of what was noted."""
        path = self.path / DATA_NOTE
        before = read_json(path) if path.exists() else {}
        return _differences(before, data or {}, [key for key in data or {} if key in before])

    def save(
        self,
        modules: dict[str, torch.nn.Module],
        optimizer: torch.optim.Optimizer,
        averages: list[torch.Tensor],
        step: int,
    ) -> None:
        """Writes the state after `step` steps, then removes the oldest beyond `keep`.

        Raises:
            CheckpointError: the disk is full, say; what was there before stays.
        """
        name = f"checkpoints/step-{step:09d}.safetensors"
        with self.writing(name):
            (self.path / "checkpoints").mkdir(exist_ok=True)
            save_training_state(self.path / name, modules, optimizer, averages, step)
            for old in self._states[: -self.keep]:
                old.unlink(missing_ok=True)

    def resume(
        self, modules: dict[str, torch.nn.Module], optimizer: torch.optim.Optimizer, averages: list[torch.Tensor]
    ) -> int:
        """Restores the newest checkpoint that can be read; returns its number of steps, 0 without one."""
        states = self._states
        for path in reversed(states):
            try:
                return load_training_state(path, modules, optimizer, averages)
            except CheckpointError as error:
                if path == states[0]:
                    raise
                logger.warning("%s Going on with the one before.", error)
        return 0

    def append(self, curve: str, record: Mapping[str, Any]) -> None:
        """Adds a line to a curve, such as "loss"."""
        name = f"{curve}.jsonl"
        with self.writing(name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut(self, curve: str, step: int) -> None:
        """Removes what a killed run wrote to a curve after `step`, a half line too."""
        path = self.path / f"{curve}.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                whole = line.endswith("\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                whole = False
            if whole:
                kept.append(line)
        with self.writing(path.name), atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


@contextlib.contextmanager
def writing(path: Path, advice: str) -> Iterator[None]:
    """Around what writes `path`. Raises `CheckpointError`, with the advice: the disk is full, say."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"'{path}' can't be written: {error}; {advice}.") from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """In words, entries that differ; missing ones are None."""
    pairs = ((key, before.get(key), now.get(key)) for key in keys)
    return [f"{key} was {old!r}, is {new!r}" for key, old, new in pairs if old != new]
