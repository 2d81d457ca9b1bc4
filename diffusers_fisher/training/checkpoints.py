"""Keeps the training states of a run in a folder, with the loss curve and the notes that belong to them."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from ..errors import CheckpointError
from ..files import expecting, read_json, read_table, write_json, write_text, writing
from ..jobs.config import flat_settings
from ..jobs.identity import DATA_NOTE, Note, note_differences, refuse_differences
from ..models import fingerprint_differences
from .state import Modules, load_training_state, save_training_state

logger = logging.get_logger(f"diffusers.{__name__}")

CHECKPOINTS = "checkpoints/step-*.safetensors"
SETTINGS_NOTE = "config.json"
DENOISER_NOTE = "fingerprint.json"
EARLY_FILES = ("paths.safetensors", "loss.jsonl", "validation.jsonl", "validation.png", "skipped.json")
"""Files that depend on settings, denoiser and data and may be there before the first checkpoint."""


@dataclasses.dataclass
class TrainingFolder:
    """Checkpoints, loss curve and notes of one run.

    Args:
        path: the folder.
        settings: the run's settings as JSON, with nested sections.
        changeable: keys "section.key", or sections, that a resumed run may change.
        keep: number of checkpoints that are kept; older ones are removed after a newer one is written.
        work: patterns of files that reserve the folder for a run's settings, denoiser and data. Before one of these
            files is there, another run may take the folder.
    """

    path: Path
    settings: Note
    changeable: tuple[str, ...]
    keep: int = 2
    work: tuple[str, ...] = (CHECKPOINTS, "trace_model")

    @property
    def _states(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.path.glob(CHECKPOINTS))

    @property
    def last_good(self) -> str:
        """The place from which a run can go on, in words."""
        states = self._states
        return f"the last good checkpoint is '{states[-1]}'" if states else "no checkpoint was written yet"

    @property
    def skipped(self) -> list[str]:
        """Names of images that could not be read up to the newest checkpoint."""
        path = self.path / "skipped.json"
        if not path.exists() or not self._states:
            return []
        with expecting("a list of names", path, "delete the file"):
            return [*read_json(path)]

    @skipped.setter
    def skipped(self, names: list[str]) -> None:
        with self.writing("skipped.json"):
            write_json(self.path / "skipped.json", names)

    def writing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Encloses code that writes the file `name` of the folder; see `diffusers_fisher.files.writing`."""
        return writing(self.path / name, self.last_good)

    def check_settings(self) -> list[str]:
        """Says in words which settings of the folder's run differ.

        Raises:
            InputError: settings differ, and the run has written some of its work.
        """
        before, now = flat_settings(self._note(SETTINGS_NOTE)), flat_settings(self.settings)
        differences = note_differences(before, now, self.changeable, absent_is_null=True) if before else []
        advice = "Resume with those, or name another output folder."
        return self._refuse("holds a run with other settings", differences, advice)

    def check_data(self, data: Note | None) -> list[str]:
        """Says in words what of the data has changed, as far as both notes say it.

        Args:
            data: the result of `data_note`; None means that nothing is known of the data. Folders without a note take
                any data.

        Raises:
            InputError: data have changed, and the run has written some of its work.
        """
        before, now = self._note(DATA_NOTE), data or {}
        keys = before.keys() & now.keys()
        differences = note_differences({key: before[key] for key in keys}, {key: now[key] for key in keys})
        advice = (
            "Images were added, removed or renamed since, or captions changed: put them back, or name another folder."
        )
        return self._refuse("was made of other data", differences, advice)

    def write_notes(self, data: Note | None, fingerprint: Note | None = None) -> None:
        """Writes the settings, the data and the denoiser's fingerprint of a run whose input has been checked.

        If another run wrote none of its work here, its other files are removed.

        Raises:
            InputError: for the reasons of `check_settings` and `check_data`, or because the folder's run has another
                denoiser; the message says what differs.
        """
        differences = self.check_settings() + self.check_data(data)
        with expecting("a fingerprint", self.path / DENOISER_NOTE, "delete the file"):
            other_denoiser = fingerprint_differences(self._note(DENOISER_NOTE), fingerprint or {})
        advice = "Resume with that denoiser, or name another output folder."
        if differences + self._refuse("holds a run of another denoiser", other_denoiser, advice):
            for name in (*EARLY_FILES, DENOISER_NOTE, DATA_NOTE):
                with self.writing(name):
                    (self.path / name).unlink(missing_ok=True)
        for name, note in ((DENOISER_NOTE, fingerprint), (DATA_NOTE, data), (SETTINGS_NOTE, self.settings)):
            if note is not None and (name == SETTINGS_NOTE or not (self.path / name).exists()):
                with self.writing(name):
                    write_json(self.path / name, note)

    def _refuse(self, relation: str, differences: list[str], advice: str) -> list[str]:
        """Returns the differences. Raises `InputError` if there are any and the folder has work of its run."""
        if any(any(self.path.glob(pattern)) for pattern in self.work):
            refuse_differences(self.path, relation, differences, advice)
        return differences

    def _note(self, name: str) -> dict[str, Any]:
        """Returns the content of a note; empty if there is none."""
        path = self.path / name
        return read_table(path) if path.exists() else {}

    def save(
        self, modules: Modules, optimizer: torch.optim.Optimizer, averages: list[torch.Tensor], step: int
    ) -> None:
        """Writes the state after `step` steps, then removes all checkpoints but the newest `keep`.

        Raises:
            CheckpointError: the file can't be written (the disk is full, for example). Older files are kept.
        """
        name = f"checkpoints/step-{step:09d}.safetensors"
        with self.writing(name):
            (self.path / "checkpoints").mkdir(exist_ok=True)
            save_training_state(self.path / name, modules, optimizer, averages, step)
            for path in self._states[: -self.keep]:
                path.unlink(missing_ok=True)

    def resume(self, modules: Modules, optimizer: torch.optim.Optimizer, averages: list[torch.Tensor]) -> int:
        """Restores the newest checkpoint that can be read; returns its number of steps, or 0 without a checkpoint."""
        states = self._states
        for path in reversed(states):
            try:
                return load_training_state(path, modules, optimizer, averages)
            except CheckpointError as error:
                if path == states[0]:
                    raise
                logger.warning("%s The checkpoint before it is used.", error)
        return 0

    def append(self, curve: str, record: Note) -> None:
        """Adds a line to a curve, such as "loss"."""
        name = f"{curve}.jsonl"
        with self.writing(name), open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cut(self, curve: str, step: int) -> None:
        """Removes the lines that a killed run wrote to a curve after `step`, and an incomplete last line."""
        path = self.path / f"{curve}.jsonl"
        if not path.exists():
            return
        lines = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    lines.append(line)
        with self.writing(path.name):
            write_text(path, "".join(lines))
