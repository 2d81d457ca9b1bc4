"""Measures how long the blocks of README.md take, in seconds of processor time; writes readme_times.json.

Processor time is what a quiet machine with one core needs. A minute.

    python examples/benchmarks/readme_times.py
"""

import contextlib
import os
import re
import tempfile
import time
from pathlib import Path

import torch
from common import FOLDER, save

README = FOLDER.parents[1] / "README.md"


def blocks(text: str) -> list[tuple[str, str]]:
    """Returns the Python blocks, each with the heading above it."""
    return [
        (heading, code)
        for heading, section in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
        for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    ]


def main() -> None:
    torch.set_num_threads(1)
    namespace: dict[str, object] = {}
    sections: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nothing:
        os.chdir(folder)
        for heading, code in blocks(README.read_text(encoding="utf-8")):
            begin = time.process_time()
            with contextlib.redirect_stdout(nothing):
                exec(compile(code, Path(README).name, "exec"), namespace)
            sections.setdefault(heading, []).append(time.process_time() - begin)
    save("readme_times", {"sections": sections})


if __name__ == "__main__":
    main()
