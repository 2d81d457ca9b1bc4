"""Runs examples/likelihood on the embedded checkpoint; writes likelihood_examples.json and .png.

python examples/benchmarks/likelihood_examples.py

Needs Fashion-MNIST (see examples/fashion_mnist.py). It takes ten minutes on one core, and a killed run is resumed.
"""

import shutil
import sys
from pathlib import Path

from common import FOLDER, PICTURES, save

sys.path.insert(0, str(FOLDER.parent / "likelihood"))
import out_of_distribution
import sample_ranking

IMAGES = 500
SAMPLES = 500


def main() -> None:
    folder = Path("outputs/likelihood_examples")
    result = {
        "out_of_distribution": out_of_distribution.run(IMAGES, folder / "out_of_distribution"),
        "sample_ranking": sample_ranking.run(SAMPLES, folder / "sample_ranking"),
    }
    shutil.copy(folder / "out_of_distribution" / "out_of_distribution.png", PICTURES / "likelihood_examples.png")
    save("likelihood_examples", result)


if __name__ == "__main__":
    main()
