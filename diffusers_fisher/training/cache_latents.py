"""Encodes images once, so that training reads latents.

    accelerate launch -m diffusers_fisher.training.cache_latents --config configs/trace_embedded.yaml

The command encodes `data` with the autoencoder of `denoiser` and writes the folder `latents`; all three are entries of
a trace matching config. A killed run is resumed shard by shard. Images that can't be read are left out, counted and
named in the cache's index.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tqdm.auto import tqdm

from ..backbones import backbone_of
from ..console import say
from ..data import LATENT_INDEX, CachedLatents, ImageData, Images, UnreadableImageError, open_images, shard_name
from ..errors import InputError
from ..files import expecting, load_tensors, save_tensors, write_json, writing
from ..jobs.command import config_parser, errors_in_words
from ..jobs.config import load_config
from ..jobs.folder_lock import locked_folder
from ..jobs.identity import autoencoder_note, data_note
from ..jobs.pipelines import load_pipeline
from ..jobs.processes import process_state
from .checkpoints import TrainingFolder
from .pieces import Row, batched
from .samples import SampleSpace
from .trace_config import TraceMatchingConfig

logger = get_logger(__name__)

SHARD_SIZE = 4096  # images per shard
CHANGEABLE_SETTINGS = ("denoiser.compile",)
DISK_ADVICE = "make room and start again, whole shards are kept"


def cache_latents(config: TraceMatchingConfig, batch_size: int = 16) -> int:
    """Writes the missing shards of the cache; returns the number of latents in the cache.

    Args:
        batch_size: number of images that are encoded at once.

    Raises:
        InputError: the config has no `data` or `latents`; the folder has a cache of other settings, or of images that
            have changed since; no image can be read; the images have several sizes, or one that the autoencoder does
            not take.
        CheckpointError: a shard can't be written.
    """
    if config.data is None or config.latents is None:
        raise InputError("Caching needs both `data` (the images) and `latents` (the folder to write) in the config.")
    state, folder = process_state(), Path(config.latents)
    with locked_folder(folder, state):
        return _write_cache(folder, config, config.data, batch_size, state)


def _write_cache(
    folder: Path, config: TraceMatchingConfig, data: ImageData, batch_size: int, state: PartialState
) -> int:
    """Writes the missing shards into a folder that belongs to this launch; returns the number of latents."""
    settings = {"data": dataclasses.asdict(data), "denoiser": dataclasses.asdict(config.denoiser)}
    work = (LATENT_INDEX, "latents-*.safetensors")
    notes = TrainingFolder(folder, settings, CHANGEABLE_SETTINGS, work=work)
    if state.is_main_process:
        notes.check_settings()
    if (folder / LATENT_INDEX).is_file():
        if state.is_main_process and Path(data.path).is_dir():  # other data would have to be downloaded
            notes.check_data(data_note(open_images(data)))
        return len(CachedLatents(str(folder)))
    pipe = load_pipeline(dataclasses.replace(config.denoiser, compile=False)).to(state.device)
    backbone = backbone_of(pipe)
    with state.main_process_first():
        source = open_images(data, backbone.image_channels, backbone.takes_text)
    space = SampleSpace(pipe, latents=False)
    first = _first_readable(source)
    space.moments(first[None])  # refuses sizes that can't be encoded
    if state.is_main_process:
        notes.write_notes(data_note(source))
    number = -1
    for number, rows in enumerate(batched(enumerate(source.undecoded()), SHARD_SIZE)):
        if number % state.num_processes == state.process_index and not (folder / shard_name(number)).is_file():
            progress = tqdm(rows, shard_name(number), disable=not state.is_main_process)
            _write_shard(folder / shard_name(number), progress, source, space, first, batch_size)
    state.wait_for_everyone()
    if state.is_main_process:
        _write_index(folder, number + 1, pipe)
    state.wait_for_everyone()
    return len(CachedLatents(str(folder)))


def _first_readable(source: Images) -> torch.Tensor:
    """Returns the pixels of the first image that can be read. All other images must have its size."""
    position = -1
    for position, row in enumerate(source.undecoded()):
        with contextlib.suppress(UnreadableImageError):
            return source.example(row, position).pixels
    raise InputError(f"None of the {position + 1} images of '{source.data.path}' can be read.")


def _write_shard(
    path: Path, rows: Iterable[Row], source: Images, space: SampleSpace, first: torch.Tensor, batch_size: int
) -> None:
    """Writes one shard. All images must have the size of `first`, the pixels (C, H, W) of the cache's first image."""
    captions, skipped = [], []

    def pixels() -> Iterator[torch.Tensor]:
        for position, row in rows:
            try:
                example = source.example(row, position)
            except UnreadableImageError as error:
                logger.warning(f"{error} It is left out.", main_process_only=False)
                skipped.append(source.row_name(row, position))
                continue
            if example.pixels.shape != first.shape:
                raise InputError(
                    f"Image '{example.name}' has size {tuple(example.pixels.shape)}, the first {tuple(first.shape)}; "
                    "set `data.resolution`, which gives all images one size, and name a new folder for `latents`."
                )
            captions.append(example.caption)
            yield example.pixels

    moments = [space.moments(first[None]).cpu()[:0]]  # a shard of unreadable images is empty
    moments += [space.moments(torch.stack(group)).cpu() for group in batched(pixels(), batch_size)]
    metadata = {"captions": json.dumps(captions), "skipped": json.dumps(skipped)}
    with writing(path, DISK_ADVICE):
        save_tensors(path, {"moments": torch.cat(moments)}, metadata)


def _write_index(folder: Path, number: int, pipe: DiffusionPipeline) -> None:
    counts, skipped, shape = [], [], []
    for shard in range(number):
        tensors, metadata = load_tensors(folder / shard_name(shard))
        with expecting("cached latents", folder / shard_name(shard), "delete the file and start again"):
            counts.append(len(tensors["moments"]))
            shape = list(tensors["moments"].shape[2:])
            skipped += json.loads(metadata["skipped"])
    index = {"shape": shape, "counts": counts, "skipped_images": skipped, "space": autoencoder_note(pipe)}
    with writing(folder / LATENT_INDEX, DISK_ADVICE):
        write_json(folder / LATENT_INDEX, index)


def main() -> None:
    """Runs the command."""
    parser = config_parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=16, help="number of images that are encoded at once")
    arguments = parser.parse_args()
    with errors_in_words():
        cache_latents_of_file(arguments.config, arguments.set, arguments.batch_size)


def cache_latents_of_file(config: str | os.PathLike, changes: Sequence[str], batch_size: int) -> None:
    """Writes the cache that a config file describes, and prints the number of latents.

    Args:
        changes: entries "key.key=value" that replace what the file says.
        batch_size: number of images that are encoded at once.
    """
    count = cache_latents(load_config(config, TraceMatchingConfig, changes), batch_size)
    say(f"{count} latents")


if __name__ == "__main__":
    main()
