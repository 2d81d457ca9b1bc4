"""Finds the examples and configurations that are installed with the package, and copies them."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import InputError

FOLDERS = ("configs", "examples")
SHARE = "share/diffusers_fisher/"


def example_files() -> dict[str, Path]:
    """Returns the installed files by their paths in the repository, such as "configs/trace_embedded.yaml".

    In a copy of the repository these are its own files.

    Raises:
        InputError: the installation has no such files.
    """
    files = dict(_installed_files())
    root = Path(__file__).parents[1]
    if not files and (root / "pyproject.toml").is_file():
        files = {
            str(path.relative_to(root)): path
            for folder in FOLDERS
            for path in sorted((root / folder).rglob("*"))
            if path.suffix in (".py", ".yaml") and "benchmarks" not in path.parts
        }
    if not files:
        raise InputError(
            "This installation has no examples. Install the package from its wheel, or take the folders 'configs' and "
            "'examples' of the repository."
        )
    return files


def _installed_files() -> Iterator[tuple[str, Path]]:
    """Yields the files that the wheel put into `share`: their paths in the repository, and where they are."""
    try:
        records = importlib.metadata.files("diffusers_fisher") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for record in records:
        _, found, name = record.as_posix().partition(SHARE)
        if not found:
            continue
        beside_package = Path(__file__).parents[1] / SHARE / name  # where `pip install --target` moves it
        for path in (Path(str(record.locate())), beside_package):
            if path.is_file():
                yield name, path
                break


def copy_examples(output: Path) -> list[str]:
    """Copies the examples and configurations into the folder `output`, and returns their paths there.

    Raises:
        InputError: a file of that name is there already; nothing is copied then.
    """
    files = example_files()
    for name in files:
        if (output / name).exists():
            raise InputError(f"'{output / name}' exists already. Give --output another folder.")
    for name, path in files.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, output / name)
    return list(files)
