"""Marks the folders of shards of a likelihood as finished, and merges them, for `diffusers-fisher merge`."""

import dataclasses
import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..console import say
from ..data import ImageData, Images, open_images
from ..errors import InputError
from ..files import atomic_path, expecting, read_table, write_json
from ..jobs.folder_lock import FolderLock
from ..jobs.identity import Note, images_digest, note_differences, refuse_differences
from ..jobs.records import SETTINGS, Records
from ..jobs.shards import Shard, shard_note
from ..settings import Positive
from .dataset_likelihood_report import ImageGroup, ImageRecords, write_results

SHARD = "shard.json"
NAMES = 5  # a message names this many positions or folders at most


class FinishedShard(BaseModel):
    """What the merge reads of `shard.json`.

    Args:
        images: number of images of all shards.
        max_pixels: setting of the images.
        channels, text_captions: arguments of `open_images`.
    """

    images: Positive
    max_pixels: Positive | None
    channels: Positive
    text_captions: bool


@dataclasses.dataclass
class ShardFolder:
    """The folder of a shard.

    Raises:
        InputError: it is no folder of a shard, or the shard is unfinished.
        CheckpointError: a file is damaged.
    """

    folder: Path

    def __post_init__(self) -> None:
        file = self.folder / SETTINGS
        if not file.is_file():
            raise InputError(
                f"'{self.folder}' holds no shard: it has no {SETTINGS}. Name folders that `diffusers-fisher "
                "likelihood --num-shards` has written."
            )
        self.settings = read_table(file)
        names = shard_note(Shard())
        if not names.keys() <= self.settings.keys():
            raise InputError(
                f"'{self.folder}' holds a run over all images, and has its own report; allowed: folders of "
                "`diffusers-fisher likelihood --num-shards`. Leave it out."
            )
        self.shard = Shard(**{name: self.settings[name] for name in names})
        self.common = {name: value for name, value in self.settings.items() if name not in names}
        if not (self.folder / SHARD).is_file():
            raise self._unfinished("it has not come to its end")
        with expecting("the end of a shard", self.folder / SHARD, "delete it and run the shard's command again"):
            self.end = FinishedShard.model_validate(read_table(self.folder / SHARD), strict=True)
        self.records = Records(self.folder, self.settings, ImageGroup)
        self.images = ImageRecords(self.records)
        missing = set(self.shard.positions(self.end.images)) - self.images.positions
        if missing:
            raise self._unfinished(f"it lacks the images at positions {_first(missing)}")

    def _unfinished(self, reason: str) -> InputError:
        return InputError(
            f"'{self.folder}' holds an unfinished shard, {self.shard.shard_index} of {self.shard.num_shards}: "
            f"{reason}. Run its command again."
        )


def write_shard(records: Records, images: Images, total: int, run: Note) -> dict[str, Any]:
    """Writes `shard.json`, which says that the shard in the folder of `records` is finished; returns its content.

    Args:
        images: the dataset.
        total: number of images of all shards.
        run: entries of the file about the run that has ended.
    """
    results, shard = ImageRecords(records), Shard(**{name: records.settings[name] for name in shard_note(Shard())})
    results.check(shard.positions(total))
    end = FinishedShard(
        images=total, max_pixels=images.data.max_pixels, channels=images.channels, text_captions=images.text_captions
    )
    left_out = len(results.failed_positions)
    content = {**end.model_dump(), "evaluated": len(results.positions) - left_out, "left_out": left_out, **run}
    write_json(records.folder / SHARD, content)
    say(
        f"Shard {shard.shard_index} of {shard.num_shards} is finished: {len(results.positions)} of {total} images, "
        f"{left_out} of them left out. `diffusers-fisher merge` makes the report of all shards."
    )
    return content


def merge_likelihoods(output: Path, folders: Sequence[Path]) -> dict[str, Any]:
    """Makes one report of the shards of a dataset's likelihood, and returns the content of `summary.json`.

    The output is what one run over all images writes: it may be resumed, for example with `retry_failed`, by the same
    settings without a shard. The folders of the shards stay as they are. A merge that was killed is run again.

    Args:
        output: folder of `likelihoods.jsonl`, `summary.json`, `histogram.png`, `index.html`, `records/` and
            `settings.json`.
        folders: one folder per shard, each written by `evaluate_dataset`.

    Raises:
        InputError: the folders have other settings, an image twice or not at all, or an unfinished shard; the data
            have changed or can't be opened; the output holds other records, or lies in the folder of the data; or
            no image of any shard could be evaluated.
        CheckpointError: a file is damaged.
    """
    if not folders:
        raise InputError("There are no folders of shards; name one per shard.")
    shards = [ShardFolder(folder) for folder in folders]
    _check_together(shards)
    first = shards[0]
    images = _open_images(first, [shard.end.max_pixels for shard in shards])
    changed = note_differences(first.common, {**first.common, "images": images_digest(images)})
    refuse_differences(first.folder, "has likelihoods of other images", changed, "Take the images of the shards.")
    if not any(shard.images.method for shard in shards):
        errors = (record["error"] for shard in shards for record in shard.images)
        raise InputError(f"Not one image could be evaluated. The first: {next(errors)}")
    refuse_output_in_data(output, images.data.path)
    with FolderLock(output):
        records = Records(output, first.common, ImageGroup)
        sources = {key: shard.records for shard in shards for key in shard.records.done()}
        others = records.done() - sources.keys()
        if others:
            raise InputError(
                f"'{output}' has records that are in no folder of a shard, such as '{min(others)}'. Name another "
                "output."
            )
        for key, source in sources.items():
            with atomic_path(records.file(key)) as temporary:
                shutil.copyfile(source.file(key), temporary)
        return write_results(records, images, first.end.images, {"shards": len(shards)})


def refuse_output_in_data(output: Path, folder: str) -> None:
    """Raises `InputError` if the output of a likelihood lies in the folder of its data."""
    if Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
        raise InputError(
            f"The output '{output}' lies in the folder of the data, '{folder}', so its pictures would become data; "
            "name another folder."
        )


def _check_together(shards: Sequence[ShardFolder]) -> None:
    """Raises `InputError` unless shards have the same settings and together have every image once."""
    first = shards[0]
    owners: dict[int, Path] = {}
    for shard in shards:
        differences = note_differences(first.settings, shard.settings, changeable=("shard_index",))
        advice = "Merge shards of the same settings, which have been run over the same images."
        refuse_differences(shard.folder, f"has other settings than '{first.folder}'", differences, advice)
        if shard.end.images != first.end.images:
            raise InputError(
                f"'{shard.folder}' is a shard of {shard.end.images} images, and '{first.folder}' of "
                f"{first.end.images}; allowed: the same number. Run the shards over the same images."
            )
        both = shard.images.positions & owners.keys()
        if both:
            raise InputError(
                f"'{owners[min(both)]}' and '{shard.folder}' both have the images at positions {_first(both)}; "
                "allowed: every image once. Leave one of the two folders out."
            )
        owners |= dict.fromkeys(shard.images.positions, shard.folder)
    missing = set(range(first.end.images)) - owners.keys()
    if missing:
        absent = sorted(set(range(first.shard.num_shards)) - {shard.shard.shard_index for shard in shards})
        raise InputError(
            f"No folder has shard {', '.join(map(str, absent))} of {first.shard.num_shards}, with the images at "
            f"positions {_first(missing)}. Name the folders of all shards."
        )


def _first(positions: set[int] | frozenset[int]) -> str:
    """Returns the first of some positions, in words."""
    names = ", ".join(map(str, itertools.islice(sorted(positions), NAMES)))
    return names if len(positions) <= NAMES else f"{names}, ... ({len(positions)} in all)"


def _open_images(shard: ShardFolder, limits: Sequence[int | None]) -> Images:
    """Opens the images of a shard, those that were allowed to be large too."""
    known = [limit for limit in limits if limit is not None]
    data = {name.removeprefix("data."): value for name, value in shard.settings.items() if name.startswith("data.")}
    source = ImageData(**data, max_pixels=max(known, default=None))
    return open_images(source, shard.end.channels, shard.end.text_captions)
