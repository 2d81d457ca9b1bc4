"""Describes the machine, times tasks and writes the JSON, for every benchmark."""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_fisher.demo import versions
from diffusers_fisher.files import write_json

FOLDER = Path(__file__).parent
PICTURES = FOLDER.parents[1] / "docs" / "images"


def machine() -> dict[str, Any]:
    """Returns the device, processor, versions and threads that figures depend on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": device, "processor": _processor(), "python": platform.python_version(), **versions()}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def paired_seconds(tasks: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of every task in every round. All tasks run in turn; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_index in range(rounds + 1):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if round_index:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(seconds: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Returns median, smallest and largest of the ratios `over`/`under` of all rounds."""
    ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def save(name: str, result: dict[str, Any]) -> None:
    """Writes `result` with the machine's description to NAME.json beside the benchmarks."""
    path = FOLDER / f"{name}.json"
    write_json(path, {"machine": machine(), **result})
    print(f"wrote {path}")
