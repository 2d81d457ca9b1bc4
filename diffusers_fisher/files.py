"""Atomic writing and checked reading of files: a file is either complete or absent."""

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path beside `path`. It is renamed to `path` if the block succeeds, and removed otherwise."""
    target = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp makes files private; reports must be readable like other files
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Makes `folder` and writes a trial file into it, so that an error appears before any long work.

    Raises:
        InputError: the folder can't be made, or a file can't be written into it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".writable."):
            pass
    except OSError as error:
        raise InputError(f"The folder '{folder}' can't be written: {error}. Name another folder.") from error


def write_json(path: str | os.PathLike, content: Any) -> None:  # Any: every JSON value
    """Writes `content` as indented JSON, atomically. NaN and infinity raise `ValueError`."""
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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
    with _open_safetensors(path) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})


def check_safetensors(path: str | os.PathLike) -> None:
    """Reads the header of a safetensors file and compares it with the length of the file.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    with _open_safetensors(path) as file:
        file.keys()


@contextlib.contextmanager
def _open_safetensors(path: str | os.PathLike) -> Iterator[safe_open]:
    """Opens a safetensors file, and turns errors of the file into `CheckpointError`."""
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
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"Checkpoint file '{path}' is not valid JSON: {error}. It may be truncated; write or download the file "
            "again."
        ) from error
