"""Marks the folders of shards of a likelihood as finished, and merges them, for `diffusers-fisher merge`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from ..console import say
from ..data import ImageData, Images, open_images
from ..errors import InputError
from ..files import expecting, read_table, write_json
from ..jobs.identity import Note, images_digest, note_differences, refuse_differences
from ..jobs.processes import process_state
from ..jobs.records import SETTINGS, Records
from ..jobs.run_folder import local_copy, run_folder
from ..jobs.shards import Shard, shard_note
from ..remote import is_url
from ..settings import NotNegative, Positive
from .dataset_likelihood_report import ImageGroup, ImageRecords, write_results
from .image_share import share_positions

SHARD = "shard.json"
NAMES = 5  # a message names this many positions or folders at most


class FinishedShard(BaseModel):
    """What the merge reads of `shard.json`.

    Args:
        images: number of images of all shards; for streams of several files, of the files of this shard.
        num_files: number of files that are read separately; more than 1 for streams of several files.
        max_pixels: setting of the images.
        channels, text_captions: arguments of `open_images`.
    """

    images: NotNegative
    max_pixels: Positive | None
    channels: Positive
    text_captions: bool
    num_files: Positive = 1


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
        # Streams of one file had no record of its length in earlier versions.
        self.lengths = {0: self.end.images} if self.end.num_files == 1 else self.images.lengths
        missing = share_positions(self.lengths, self.end.num_files, self.shard) - self.images.positions
        if missing:
            raise self._unfinished(f"it lacks the images at positions {_first(missing)}")

    def _unfinished(self, reason: str) -> InputError:
        return InputError(
            f"'{self.folder}' holds an unfinished shard, {self.shard.shard_index} of {self.shard.num_shards}: "
            f"{reason}. Run its command again."
        )


def write_shard(results: ImageRecords, images: Images, total: int, run: Note) -> dict[str, Any]:
    """Writes `shard.json`, which says that the shard in the folder of `results` is finished; returns its content.

    Args:
        results: one record per image of the shard.
        images: the dataset.
        total: number of images of all shards, or of the files of this shard; see `FinishedShard`.
        run: entries of the file about the run that has ended.
    """
    records = results.records
    shard = Shard(**{name: records.settings[name] for name in shard_note(Shard())})
    end = FinishedShard(
        images=total, max_pixels=images.data.max_pixels, channels=images.channels,
        text_captions=images.text_captions, num_files=images.num_files,
    )  # fmt: skip
    left_out = len(results.failed_positions)
    content = {**end.model_dump(), "evaluated": len(results.positions) - left_out, "left_out": left_out, **run}
    write_json(records.folder / SHARD, content)
    of_all = f" of {total}" if images.num_files == 1 else ""
    say(
        f"Shard {shard.shard_index} of {shard.num_shards} is finished: {len(results.positions)}{of_all} images, "
        f"{left_out} of them left out. `diffusers-fisher merge` makes the report of all shards."
    )
    return content


def merge_likelihoods(output: Path | str, folders: Sequence[Path | str], parquet: bool = False) -> dict[str, Any]:
    """Makes one report of the shards of a dataset's likelihood, and returns the content of `summary.json`.

    The output is what one run over all images writes: it may be resumed, for example with `retry_failed`, by the same
    settings without a shard. The folders of the shards stay as they are. A merge that was killed is run again.

    Args:
        output: folder of `likelihoods.jsonl`, `summary.json`, `histogram.png`, `index.html`, `records/` and
            `settings.json`. It may be a URL.
        folders: one folder or URL per shard, each written by `evaluate_dataset`.
        parquet: also write `likelihoods.parquet`, with the columns of the lines.

    Raises:
        InputError: the folders have other settings, an image twice or not at all, or an unfinished shard; the data
            have changed or can't be opened; the output holds other records, or lies in the folder of the data; or
            no image of any shard could be evaluated.
        CheckpointError: a file is damaged.
    """
    if not folders:
        raise InputError("There are no folders of shards; name one per shard.")
    with contextlib.ExitStack() as stack:
        places = []
        for folder in folders:
            if is_url(folder):
                remote = stack.enter_context(local_copy(str(folder)))
                remote.pull()
                folder = remote.copy
            places.append(Path(folder))
        return _merge(output, [ShardFolder(place) for place in places], parquet)


def _merge(output: Path | str, shards: Sequence[ShardFolder], parquet: bool) -> dict[str, Any]:
    """Merges shards that lie in folders of this machine."""
    _check_together(shards)
    first = shards[0]
    images = _open_images(first, [shard.end.max_pixels for shard in shards])
    changed = note_differences(first.common, {**first.common, "images": images_digest(images)})
    refuse_differences(first.folder, "has likelihoods of other images", changed, "Take the images of the shards.")
    if not any(shard.images.method for shard in shards):
        errors = (record["error"] for shard in shards for record in shard.images)
        raise InputError(f"Not one image could be evaluated. The first: {next(errors)}")
    refuse_output_in_data(output, images.data.path)
    with run_folder(output, process_state()) as folder:
        records = Records(folder.path, first.common, ImageGroup, folder.remote)
        sources = {key: shard.records for shard in shards for key in shard.records.done()}
        others = records.done() - sources.keys()
        if others:
            raise InputError(
                f"'{output}' has records that are in no folder of a shard, such as '{min(others)}'. Name another "
                "output."
            )
        for key, source in sources.items():
            records.copy(key, source)
        results = ImageRecords(records)
        results.check(share_positions(first.lengths | results.lengths, first.end.num_files, Shard()))
        return write_results(results, images, {"shards": len(shards)}, parquet)


def refuse_output_in_data(output: Path | str, folder: str) -> None:
    """Raises `InputError` if the output of a likelihood lies in the folder of its data."""
    if is_url(output) or is_url(folder):
        is_inside = f"{output}/".startswith(folder.rstrip("/") + "/")
    else:
        is_inside = Path(folder).is_dir() and Path(output).resolve().is_relative_to(Path(folder).resolve())
    if is_inside:
        raise InputError(
            f"The output '{output}' lies in the folder of the data, '{folder}', so its pictures would become data; "
            "name another folder."
        )


def _check_together(shards: Sequence[ShardFolder]) -> None:
    """Raises `InputError` unless shards have the same settings and together have every image once."""
    first, several_files = shards[0], shards[0].end.num_files > 1
    owners: dict[int, Path] = {}
    for shard in shards:
        differences = note_differences(first.settings, shard.settings, changeable=("shard_index",))
        advice = "Merge shards of the same settings, which have been run over the same images."
        refuse_differences(shard.folder, f"has other settings than '{first.folder}'", differences, advice)
        if shard.end.num_files != first.end.num_files:
            raise InputError(
                f"'{shard.folder}' is a shard of {shard.end.num_files} files, and '{first.folder}' of "
                f"{first.end.num_files}; allowed: the same number. Run the shards over the same images."
            )
        if not several_files and shard.end.images != first.end.images:
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
    absent = sorted(set(range(first.shard.num_shards)) - {shard.shard.shard_index for shard in shards})
    if absent and several_files:
        raise InputError(
            f"No folder has shard {', '.join(map(str, absent))} of {first.shard.num_shards}. Name the folders of all "
            "shards."
        )
    missing = set() if several_files else set(range(first.end.images)) - owners.keys()
    if missing:
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
