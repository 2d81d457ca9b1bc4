"""Runs the transport study, as `diffusers-fisher transport --learned` does, and keeps its table and plots.

    python examples/benchmarks/transport.py

Writes transport.json and transport_maps.png, transport_index_by_steps.png, transport_learned.png. Ten minutes at
most on two cores.
"""

import json
import shutil
import tempfile
from pathlib import Path

from common import PICTURES, save

from diffusers_fisher.studies.transport_study import run_study


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_study(Path(folder), learned=True)
        save("transport", json.loads(Path(folder, "transport.json").read_text()))
        for name in ("maps", "index_by_steps", "learned"):
            shutil.copyfile(Path(folder, f"{name}.png"), PICTURES / f"transport_{name}.png")


if __name__ == "__main__":
    main()
