"""Folders of cached latents."""

from __future__ import annotations

import bisect
import itertools
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import expecting, open_tensors, read_table
from .source import Caption

LATENT_INDEX = "index.json"


class CachedLatents(torch.utils.data.Dataset):
    """Scaled latents and captions that `diffusers_fisher.training.cache_latents` wrote.

    Args:
        folder: folder of the cache.

    Attributes:
        skipped_images: names of the images that could not be read.
        space: note of the autoencoder that made the latents.

    Raises:
        InputError: the folder has no finished cache.
        CheckpointError: the cache's index is damaged.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        if not (self.folder / LATENT_INDEX).is_file():
            raise InputError(
                f"'{folder}' holds no finished cache of latents; make it with "
                "`accelerate launch -m diffusers_fisher.training.cache_latents --config ...`."
            )
        index = read_table(self.folder / LATENT_INDEX)
        with expecting("an index of cached latents", self.folder / LATENT_INDEX, "delete it and make the cache again"):
            self._starts = [0, *itertools.accumulate(map(int, index["counts"]))]
            self.skipped_images: list[str] = [*index["skipped_images"]]
            self.space: dict[str, Any] = {**index["space"]}
        self._shards: dict[int, tuple[torch.Tensor, list[Caption]]] = {}

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> tuple[torch.Tensor, Caption]:
        """Returns mean and deviation of the autoencoder's posterior, (2, C, h, w) float32, and the caption."""
        shard = bisect.bisect_right(self._starts, position) - 1
        moments, captions = self._shard(shard)
        row = position - self._starts[shard]
        return moments[row].float(), captions[row]

    def name(self, position: int) -> str:
        """Returns the name of one sample: its position, since the cache has no other names."""
        return str(position)

    def _shard(self, number: int) -> tuple[torch.Tensor, list[Caption]]:
        if number not in self._shards:
            path = self.folder / shard_name(number)
            with open_tensors(path) as file, expecting("cached latents", path, "delete it and make them again"):
                # The tensor is mapped from the file, not read.
                self._shards[number] = file.get_tensor("moments"), [*json.loads(file.metadata()["captions"])]
        return self._shards[number]


def shard_name(number: int) -> str:
    """Returns the file name of one shard of a latent cache."""
    return f"latents-{number:05d}.safetensors"
