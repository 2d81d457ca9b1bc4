"""Fashion-MNIST (Xiao et al., 2017; MIT) from the IDX files of Debian's package `dataset-fashion-mnist`."""

import gzip
import os
from pathlib import Path

import numpy as np
import torch

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
    """Images padded to 32x32 as (N, 1, 32, 32) uint8 in 0..255, and labels (N,) int64, of `split` train or test."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"No folder '{folder}'. On Debian or Ubuntu: apt-get install dataset-fashion-mnist; elsewhere put the "
            "four IDX files of Fashion-MNIST in a folder and name it."
        )
    images = read_idx(folder / f"{PREFIXES[split]}-images-idx3-ubyte.gz")
    labels = read_idx(folder / f"{PREFIXES[split]}-labels-idx1-ubyte.gz")
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return torch.from_numpy(padded)[:, None], torch.from_numpy(labels.astype(np.int64))


def to_rgb(images: torch.Tensor) -> torch.Tensor:
    """(N, 1, H, W) uint8 to (N, 3, H, W) float32 in [-1, 1], as `AutoencoderKL` takes them."""
    return (images.float() / 127.5 - 1.0).expand(-1, 3, -1, -1)
