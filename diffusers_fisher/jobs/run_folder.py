"""The folder of a run: on this machine, or at a URL, of which every process then keeps a copy on its machine."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..errors import FisherError, InputError
from ..files import SILENT_SECONDS
from ..remote import is_url, list_url, open_filesystem, remote_access
from .folder_lock import BEAT_SECONDS, LOCK, is_running, lock_owner, locked_folder


class RemoteFolder:
    """A folder at a URL, and its copy on this machine.

    Files go up when they are written, and come down when they are asked for.

    Args:
        url: the folder, such as s3://bucket/folder.
        copy: the folder on this machine.

    Raises:
        InputError: no library reads such URLs, or the credentials are missing.
    """

    def __init__(self, url: str, copy: Path):
        self.url, self.copy = url.rstrip("/"), copy
        self._filesystem, self._root = open_filesystem(self.url)

    def pull(self, name: str = "") -> None:
        """Copies the files of the folder `name` at the URL that are not on this machine. Records never change."""
        with remote_access(self.url):
            for file in list_url(f"{self.url}/{name}" if name else self.url):
                target = self.copy / name / file
                if not target.exists() and not target.name.startswith("."):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    self._filesystem.get_file(
                        f"{self._root}/{name}/{file}" if name else f"{self._root}/{file}", target
                    )

    def push(self, file: Path) -> None:
        """Copies a file of this machine's copy to the URL.

        Raises:
            InputError: it can't be written there.
        """
        name = file.relative_to(self.copy).as_posix()
        with remote_access(self.url):
            if "/" in name:
                self._filesystem.makedirs(f"{self._root}/{name.rpartition('/')[0]}", exist_ok=True)
            self._filesystem.put_file(str(file), f"{self._root}/{name}")

    def push_results(self) -> None:
        """Copies the files of the folder itself to the URL, not those of its subfolders, which went up before."""
        for file in sorted(self.copy.iterdir()):
            if file.is_file() and not file.name.startswith("."):
                self.push(file)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Reserves the folder during the block.

        Storage has no operation that makes a lock at once, so two runs that begin in the same second may both get it.

        Raises:
            InputError: the folder can't be written, or another run owns it.
        """
        path, owner = f"{self._root}/{LOCK}", lock_owner()
        with remote_access(self.url):
            self._refuse_owner(path)
            self._filesystem.makedirs(self._root, exist_ok=True)
            self._beat(path, owner)
        end = threading.Event()

        def beat() -> None:
            while not end.wait(BEAT_SECONDS):
                with contextlib.suppress(Exception):  # the network may come back; the run's own files say if not
                    self._beat(path, owner)

        thread = threading.Thread(target=beat, daemon=True, name="remote lock")
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()
            with contextlib.suppress(Exception):  # an error of the run itself must not be hidden
                self._filesystem.rm_file(path)

    def _beat(self, path: str, owner: dict[str, Any]) -> None:
        self._filesystem.pipe_file(path, json.dumps({**owner, "alive": time.time()}).encode())

    def _refuse_owner(self, path: str) -> None:
        """Raises `InputError` if a living run owns the folder."""
        try:
            owner = json.loads(self._filesystem.cat_file(path))
        except (FileNotFoundError, ValueError):
            return
        runs_here = is_running(owner)
        is_alive = time.time() - owner.get("alive", 0.0) < SILENT_SECONDS if runs_here is None else runs_here
        if is_alive:
            raise InputError(
                f"'{self.url}' belongs to a run that has not ended: process {owner.get('process')} on "
                f"{owner.get('host')}, since {owner.get('since')}. Name another folder, or wait for that run. If the "
                f"process no longer exists, delete '{self.url}/{LOCK}'."
            )


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The folder of a run.

    Args:
        path: the folder on this machine.
        remote: the folder at a URL whose copy `path` is; None for a folder of this machine alone.
    """

    path: Path
    remote: RemoteFolder | None = None


@contextlib.contextmanager
def run_folder(output: Path | str, state: PartialState) -> Iterator[RunFolder]:
    """Reserves the folder of a run, a path or a URL, for the processes of one launch during the block.

    Files of the folder itself go up to a URL when the block succeeds.

    Args:
        state: accelerate's state of this process. The main process takes the lock, and the others wait until then.

    Raises:
        InputError: the folder can't be written, or a living process of another launch owns it.
    """
    if not is_url(output):
        with locked_folder(Path(output), state):
            yield RunFolder(Path(output))
        return
    with local_copy(str(output)) as folder, contextlib.ExitStack() as stack:
        with state.main_process_first():
            if state.is_main_process:
                stack.enter_context(folder.locked())
            folder.pull()
        yield RunFolder(folder.copy, folder)
        if state.is_main_process:
            folder.push_results()


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[RemoteFolder]:
    """Yields a folder at a URL with an empty copy on this machine, which is removed at the end of the block.

    Errors name the URL instead of the copy.
    """
    with tempfile.TemporaryDirectory(prefix="diffusers_fisher-") as place:
        try:
            yield RemoteFolder(url, Path(place))
        except FisherError as error:
            if place not in str(error):
                raise
            raise type(error)(str(error).replace(place, url.rstrip("/"))) from error
