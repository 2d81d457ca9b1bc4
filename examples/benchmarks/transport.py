"""The transport study, as `diffusers-fisher transport` runs it; keeps table and plots.

    python examples/benchmarks/transport.py

Writes transport.json, transport_maps.png and transport_index_by_steps.png. About a minute on two cores.
"""

import json
import shutil
import tempfile
from pathlib import Path

from common import FOLDER, save

from diffusers_fisher.evaluation.transport_study import run_study


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_study(Path(folder))
        save("transport", json.loads(Path(folder, "transport.json").read_text()))
        for name in ("maps", "index_by_steps"):
            shutil.copyfile(Path(folder, f"{name}.png"), FOLDER / f"transport_{name}.png")


if __name__ == "__main__":
    main()
