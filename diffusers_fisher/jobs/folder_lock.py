"""Reserves a folder for one run: a second run that would write into it is refused with a message."""

import contextlib
import datetime
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from accelerate import Accelerator, PartialState

from ..errors import InputError
from ..files import SILENT_SECONDS, check_writable, machine_name

LOCK = ".lock.json"
PATIENCE_SECONDS = 3.0
"""A process that was killed needs a moment to end. A run that starts again at once waits this long for it."""
TURN = ".lock-turn"
TURN_SECONDS = 10.0
"""The file `TURN` exists for milliseconds. If it is older than this, the process that made it must be dead."""
BEAT_SECONDS = 30.0
"""Time between two touches of the lock, by which its owner shows processes of other machines that it is alive."""


class FolderLock:
    """The lock of a folder: a file that names its owner's machine, process and start.

    The lock relies on two operations that network file systems do atomically, unlike `flock`: making a hard link and
    renaming. A lock whose owner is dead is taken over. Whether it is dead is read from the table of processes where
    the owner ran on this machine, and from the age of the lock's last touch otherwise.

    Use it as a context manager: it is taken at the start of the block and removed at its end.

    Args:
        folder: folder of the run; it is made where it is absent.

    Raises:
        InputError: the folder can't be written, or a living process owns it, which the message names.
    """

    def __init__(self, folder: Path):
        self.path = folder / LOCK
        self._owner = lock_owner()
        self._end = threading.Event()

    def __enter__(self) -> "FolderLock":
        check_writable(self.path.parent)
        patience = time.monotonic() + PATIENCE_SECONDS
        while not self._take():
            owner = _read(self.path)
            if owner is not None and self._is_alive(owner):
                if time.monotonic() < patience:
                    time.sleep(0.05)
                    continue
                raise InputError(
                    f"'{self.path.parent}' belongs to a run that has not ended: process {owner.get('process')} on "
                    f"{owner.get('host')}, since {owner.get('since')}. Name another folder, or wait for that run. If "
                    f"the process no longer exists, delete '{self.path}'."
                )
            if owner is not None and self._take_over(owner):
                break
        threading.Thread(target=self._beat, daemon=True, name="folder lock").start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        if _read(self.path) == self._owner:
            self.path.unlink(missing_ok=True)

    def _take(self) -> bool:
        """Makes the lock with its content in one operation; returns whether this run has it now."""
        with _temporary(self.path, self._owner) as file:
            try:
                os.link(file, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                with contextlib.suppress(FileExistsError), open(self.path, "x", encoding="utf-8") as lock:
                    lock.write(file.read_text(encoding="utf-8"))
                    return True
                return False
        return True

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        is_here = is_running(owner)
        return self._age(self.path) < SILENT_SECONDS if is_here is None else is_here

    def _age(self, path: Path) -> float:
        """Returns the seconds since the last touch of a file, by the clock of the file system; infinite without it."""
        with _temporary(self.path, {}) as file, contextlib.suppress(FileNotFoundError):
            return file.stat().st_mtime - path.stat().st_mtime
        return math.inf

    def _take_over(self, owner: dict[str, Any]) -> bool:
        """Replaces the lock of a dead owner; returns whether this run has it now.

        Of several runs that found the same dead owner, the one that makes a second file replaces the lock, in one
        operation and after it has read the lock again. The folder has a lock at every moment.
        """
        turn_file = self.path.with_name(TURN)
        try:
            os.close(os.open(turn_file, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            if self._age(turn_file) > TURN_SECONDS:  # its run was killed at this point
                turn_file.unlink(missing_ok=True)
            time.sleep(0.05)
            return False
        try:
            if _read(self.path) != owner:
                return False
            with _temporary(self.path, self._owner) as file:
                os.replace(file, self.path)
            return True
        finally:
            turn_file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self.path)


def lock_owner() -> dict[str, Any]:
    """Returns what a lock says of its owner, this process."""
    return {
        "machine": machine_name(), "host": socket.gethostname(), "process": os.getpid(),
        "started": psutil.Process().create_time(), "since": datetime.datetime.now().isoformat(" ", "seconds"),
        "key": secrets.token_hex(8),
    }  # fmt: skip


def is_running(owner: dict[str, Any]) -> bool | None:
    """Returns whether the owner of a lock is running, by the table of processes; None on another machine."""
    if owner.get("machine") != machine_name() or not isinstance(owner.get("process"), int):
        return None
    try:
        process = psutil.Process(owner["process"])
        start_time, is_zombie = process.create_time(), process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True
    # A zombie's parent has not noticed its end yet. If the start differs, a new process has got the number.
    return not is_zombie and abs(start_time - owner.get("started", start_time)) < 2


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the owner that a lock names, empty for a damaged lock; None without a lock."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


@contextlib.contextmanager
def locked_folder(folder: Path, state: PartialState | Accelerator) -> Iterator[None]:
    """Reserves a folder for the processes of one launch during the block.

    Args:
        state: accelerate's state of this process. The main process takes the lock, and the others wait until then.

    Raises:
        InputError: the folder can't be written, or a living process of another launch owns it.
    """
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                stack.enter_context(FolderLock(folder))
        yield


@contextlib.contextmanager
def _temporary(path: Path, content: dict[str, Any]) -> Iterator[Path]:
    """Yields a temporary file beside `path`, with `content`."""
    file = path.with_name(f".lock-{secrets.token_hex(8)}.json")
    try:
        file.write_text(json.dumps(content), encoding="utf-8")
        yield file
    finally:
        file.unlink(missing_ok=True)
