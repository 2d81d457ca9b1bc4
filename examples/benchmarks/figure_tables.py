"""Reads the benchmarks' JSON files and writes markdown tables; the files `*_figures.py` share both."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

FOLDER = Path(__file__).parent


def read_result(name: str) -> dict[str, Any]:
    """Returns the content of a benchmark's JSON file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def table(columns: Iterable[object], rows: Iterable[Sequence[object]]) -> str:
    """Returns a markdown table. None is an empty cell."""
    return tabulate(rows, [str(column) for column in columns], tablefmt="github", disable_numparse=True)


def document(*parts: str) -> str:
    """Joins paragraphs and tables with empty lines."""
    return "\n\n".join(parts)


def nearest(noise_to_signal: Sequence[float]) -> list[int]:
    """Returns the indices of the levels nearest to a noise to signal of 10, 1 and 0.1."""
    return [
        min(range(len(noise_to_signal)), key=lambda index: abs(math.log(noise_to_signal[index] / ratio)))
        for ratio in (10, 1, 0.1)
    ]
