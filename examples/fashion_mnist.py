"""Reads Fashion-MNIST (Xiao et al., 2017; MIT) from the IDX files of Debian's package `dataset-fashion-mnist`.

    python examples/fashion_mnist.py --output outputs/fashion_mnist

The command writes the images as a folder with captions, which `datasets` and this package read.
"""

import argparse
import gzip
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_fisher.checkpoints import embedded_prompt

DEFAULT_FOLDER = "/usr/share/datasets/fashion-mnist"
PREFIXES = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """Reads one gzipped IDX file of unsigned bytes."""
    with gzip.open(path, "rb") as file:
        header = file.read(4)
        if header[:3] != b"\x00\x00\x08":
            raise ValueError(f"'{path}' is not an IDX file of unsigned bytes (header {header!r}).")
        shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(header[3]))
        return np.frombuffer(file.read(), dtype=np.uint8).reshape(shape)


def load(split: str, folder: str | os.PathLike = DEFAULT_FOLDER) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the images of `split` (train or test), padded to 32x32, (N, 1, 32, 32) uint8, and labels (N,) int64."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No folder '{folder}'. On Debian or Ubuntu: apt-get install dataset-fashion-mnist; elsewhere put the "
            "four IDX files of Fashion-MNIST into a folder and pass its path."
        )
    images = read_idx(folder / f"{PREFIXES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{PREFIXES[split]}-labels-idx1-ubyte.gz")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return torch.from_numpy(padded)[:, None], torch.from_numpy(labels.astype(np.int64))


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """Converts (N, 1, H, W) uint8 to (N, 3, H, W) float32 in [-1, 1], as `AutoencoderKL` takes images."""
    return (images.float() / 127.5 - 1.0).expand(-1, 3, -1, -1)


def write_folder(output: Path, split: str = "train", folder: str | os.PathLike = DEFAULT_FOLDER) -> int:
    """Writes PNG files and `metadata.jsonl` (file_name, text, label) to `output`; returns the number of images."""
    images, labels = load(split, folder)
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        name = f"{split}-{number:05d}.png"
        Image.fromarray(image[0].numpy()).save(output / name)
        lines.append(json.dumps({"file_name": name, "text": embedded_prompt(label), "label": label}))
    (output / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", choices=sorted(PREFIXES), default="train")
    parser.add_argument("--data", default=DEFAULT_FOLDER)
    arguments = parser.parse_args()
    print(f"{write_folder(arguments.output, arguments.split, arguments.data)} images")


if __name__ == "__main__":
    main()
