"""Atomic writing and checked reading of files: a file is either complete or absent."""

import contextlib
import hashlib
import json
import math
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, FisherError, InputError
from .remote import refuse_url

if TYPE_CHECKING:
    from matplotlib.figure import Figure


SILENT_SECONDS = 600.0
"""What another machine's process has not touched for so long is that of a dead process."""
_TEMPORARY = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}(\.\w+)?")
_LINE_ENDS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}
"""Line ends of Unicode, which JSON allows within a string, with their escapes."""
_JSON_ERRORS = (ValueError, RecursionError)
"""Errors of Python's JSON parser: no JSON, no UTF-8, numbers of too many digits; lists within lists without end."""


class WriteError(CheckpointError):
    """A file can't be written: the disk is full, for example. Its cause is the error of the operating system."""


@contextlib.contextmanager
def writing(
    path: Path, advice: str = "make room there and run the same command again, all complete files are kept"
) -> Iterator[None]:
    """Encloses what writes `path`, and turns errors of the disk into `WriteError`.

    Args:
        advice: what to do, without a full stop. It replaces the advice of a block inside this one.
    """
    reason: BaseException | None
    try:
        yield
        return
    except WriteError as error:
        reason = error.__cause__
    except FisherError:
        raise
    except (OSError, SafetensorError) as error:
        reason = error
    words = reason.strerror if isinstance(reason, OSError) and reason.strerror else reason
    raise WriteError(f"'{path}' can't be written: {words}; {advice}.") from reason


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`. It is renamed to `path` if the block succeeds, and removed otherwise.

    Raises:
        WriteError: the file can't be written. An older file stays as it was.
    """
    target = Path(path)
    temporary = _temporary(target)
    with writing(target):
        try:
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)


def machine_name() -> str:
    """Names the table of processes that this process is in: containers of one host have tables of their own."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(names)


def check_writable(folder: Path) -> None:
    """Makes `folder` and writes a trial file into it, so that an error appears before any long work.

    Temporary files that killed processes left in the folder, or in a folder in it, are removed.

    Raises:
        InputError: the folder can't be made, or a file can't be written into it, or it is a URL.
    """
    refuse_url(folder)
    trial = _temporary(folder / "trial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*folder.glob(".*"), *folder.glob("*/.*")):
            if _is_left_over(file):
                file.unlink(missing_ok=True)
        try:
            trial.write_bytes(bytes(4096))  # a full disk still takes empty files
        finally:
            trial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"The folder '{folder}' can't be written: {error}. Name another folder.") from error


def _temporary(target: Path) -> Path:
    """Returns a new name beside `target`, which names the process that writes the file."""
    return target.with_name(
        f".{target.name}.{_digest(machine_name())}-{os.getpid()}-{secrets.token_hex(4)}{target.suffix}"
    )


def _is_left_over(file: Path) -> bool:
    """Returns whether a file is a temporary one of `atomic_path` whose process has ended."""
    match = _TEMPORARY.fullmatch(file.name)
    if match is None:
        return False
    try:
        last_change = file.stat().st_mtime
        if match["machine"] != _digest(machine_name()):
            return time.time() - last_change > SILENT_SECONDS
        # A process that began after the last touch has got the number of the one that wrote the file.
        return psutil.Process(int(match["process"])).create_time() > last_change
    except psutil.NoSuchProcess:
        return True
    except (OSError, psutil.Error):
        return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def json_line(content: Any) -> str:  # Any: every JSON value
    """Returns `content` as one line of JSON, with letters of all scripts, that no reader takes for several lines.

    Raises:
        ValueError: a number is not finite.
    """
    return json.dumps(content, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS) + "\n"


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` in UTF-8, atomically. Parts of file names that are not Unicode become escapes."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | os.PathLike, content: Any) -> None:  # Any: every JSON value
    """Writes `content` as indented JSON, atomically. NaN and infinity raise `ValueError`."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def finite_number(value: float) -> float | None:
    """Returns the number, or None where it is not finite: JSON has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def save_figure(figure: "Figure", path: Path) -> None:
    """Writes a matplotlib figure to `path`, atomically."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)


def save_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, metadata=metadata)


def load_tensors(path: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Reads one safetensors file and returns `(tensors, metadata)`.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"Checkpoint file '{path}' does not exist.")
    with open_tensors(path) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def check_safetensors(path: str | os.PathLike) -> None:
    """Reads the header of a safetensors file and compares it with the length of the file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    with open_tensors(path) as file:
        file.keys()


@contextlib.contextmanager
def open_tensors(path: str | os.PathLike) -> Iterator[safe_open]:
    """Opens a safetensors file, whose tensors are read one by one.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        size = f"{path.stat().st_size} bytes" if path.exists() else "missing"
        raise CheckpointError(
            f"Checkpoint file '{path}' ({size}) can't be read as safetensors: {error}. It may be truncated; write or "
            "download the file again."
        ) from error


def read_json(path: str | os.PathLike) -> Any:  # Any: every JSON value
    """Returns the content of a checkpoint's JSON file.

    Raises:
        CheckpointError: the file is missing, truncated or not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, *_JSON_ERRORS) as error:
        raise CheckpointError(
            f"Checkpoint file '{path}' is not valid JSON: {error}. It may be truncated; write or download the file "
            "again."
        ) from error


def read_table(path: str | os.PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises `CheckpointError` for anything else."""
    table = read_json(path)
    if not isinstance(table, dict):
        raise CheckpointError(
            f"Checkpoint file '{path}' holds a {type(table).__name__}; it must hold a JSON object. Write or download "
            "the file again."
        )
    return table


@contextlib.contextmanager
def expecting(content: str, path: str | os.PathLike, advice: str) -> Iterator[None]:
    """Encloses what takes the content of a readable file apart: entries may be missing or have other types.

    Args:
        content: what the file should hold, such as "a record of likelihoods".
        advice: what to do, without a full stop.

    Raises:
        CheckpointError: the file holds something else.
    """
    try:
        yield
    except FisherError:
        raise
    except (LookupError, TypeError, AttributeError, RuntimeError, *_JSON_ERRORS) as error:
        raise CheckpointError(
            f"'{path}' does not hold {content} ({type(error).__name__}: {error}). It is damaged or another program's; "
            f"{advice}."
        ) from error
