"""A folder of training states: written atomically, the newest few kept, and the loss curve that belongs to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, InputError
from ..files import atomic_path, read_json, write_json
from ..models import fingerprint_differences
from .state import load_training_state, save_training_state

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainingFolder:
    """Checkpoints, loss curve and configuration of one run.

    Args:
        path: of the folder.
        keep: checkpoints that stay; older ones are removed once a newer one is whole.
    """

    path: Path
    keep: int = 2

    @property
    def _states(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.path.glob("checkpoints/step-*.safetensors"))

    @property
    def last_good(self) -> str:
        """In words, where a run may be taken up."""
        states = self._states
        return f"the last good checkpoint is '{states[-1]}'" if states else "no checkpoint was written yet"

    @property
    def skipped(self) -> list[str]:
        """Names of images that could not be read up to the newest checkpoint."""
        path = self.path / "skipped.json"
        return read_json(path) if path.exists() else []

    @skipped.setter
    def skipped(self, names: list[str]) -> None:
        with self.writing("skipped.json"):
            write_json(self.path / "skipped.json", names)

    def writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Around what writes file `name` of the folder. Raises `CheckpointError`: the disk is full, say."""
        return writing(self.path / name, self.last_good)

    def check(self, settings: Mapping[str, Any], free: tuple[str, ...]) -> None:
        """Refuses to go on with a run of other settings.

        Args:
            settings: of the run, what JSON can say; sections nested.
            free: keys "section.key", or sections, that may change.

        Raises:
            InputError: names the settings that differ.
        """
        path = self.path / "config.json"
        if not path.exists():
            return
        before, now = (
            {key: value for key, value in flat_settings(found).items() if not key.startswith(free)}
            for found in (read_json(path), settings)
        )
        differing = {key: (before.get(key), now.get(key)) for key in now | before if before.get(key) != now.get(key)}
        if differing:
            words = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in sorted(differing.items()))
            raise InputError(
                f"'{self.path}' holds a run with other settings: {words}. Resume with those, or name another output "
                "folder."
            )

    def claim(self, settings: Mapping[str, Any], fingerprint: Mapping[str, Any] | None = None) -> None:
        """Notes what the run is, once all of it was found to be right: settings, and the denoiser's fingerprint.

        Raises:
            InputError: the run was begun with another denoiser; says what differs.
        """
        path = self.path / "fingerprint.json"
        if fingerprint is not None and path.exists():
            differing = fingerprint_differences(read_json(path), fingerprint)
            if differing:
                raise InputError(
                    f"'{self.path}' holds a run of another denoiser. What differs: {'; '.join(differing)}. Resume "
                    "with that denoiser, or name another output folder."
                )
        elif fingerprint is not None:
            with self.writing(path.name):
                write_json(path, fingerprint)
        with self.writing("config.json"):
            write_json(self.path / "config.json", settings)

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


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with keys "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
