"""A folder of training states: written atomically, the newest few kept, and the loss curve that belongs to them."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..errors import CheckpointError, InputError
from ..files import atomic_path, read_json, write_json
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

    def claim(self, settings: Mapping[str, Any], free: tuple[str, ...]) -> None:
        """Notes the settings of a new run; refuses to go on with a run of others.

        Args:
            settings: of the run, what JSON can say; sections nested.
            free: keys "section.key", or sections, that may change.

        Raises:
            InputError: names the settings that differ.
        """
        path = self.path / "config.json"
        now = {key: value for key, value in flat_settings(settings).items() if not key.startswith(free)}
        if path.exists():
            before = {key: value for key, value in flat_settings(read_json(path)).items() if not key.startswith(free)}
            differing = {
                key: (before.get(key), now.get(key)) for key in now | before if before.get(key) != now.get(key)
            }
            if differing:
                words = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in sorted(differing.items()))
                raise InputError(
                    f"'{self.path}' holds a run with other settings: {words}. Resume with those, or name another "
                    "output folder."
                )
        write_json(path, settings)

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
        path = self.path / "checkpoints" / f"step-{step:09d}.safetensors"
        try:
            path.parent.mkdir(exist_ok=True)
            save_training_state(path, modules, optimizer, averages, step)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"The checkpoint '{path}' can't be written: {error}; {self.last_good}.") from error
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
        with open(self.path / f"{curve}.jsonl", "a", encoding="utf-8") as file:
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
        with atomic_path(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with keys "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
