"""Computes log-likelihoods of a dataset's images over many processes, for `diffusers-fisher likelihood`."""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..data import Example, Images, ImageStream, UnreadableImageError, no_images, open_images
from ..errors import InputError
from ..files import read_table, write_json
from ..jobs.folder_lock import locked_folder
from ..jobs.identity import images_digest, pipeline_digests, row_digest
from ..jobs.pipelines import load_pipeline
from ..jobs.processes import process_state
from ..jobs.records import SETTINGS, Records
from ..jobs.shards import Shard, shard_note
from .dataset_likelihood_report import FILE, ImageGroup, ImageRecords, write_results
from .dataset_settings import DatasetSettings, settings_note
from .image_evaluator import ImageEvaluator
from .likelihood_shards import refuse_output_in_data, write_shard

ATTEMPTS = 64  # number of refused images after which a run stops, if no image could be evaluated
WRITE_SECONDS = (1.0, 60.0)  # shortest and longest time between two files of records
WRITE_FRACTION = 0.01  # time between two files as a fraction of the time so far: a kill loses little
RETRY = "retry-"  # beginning of the names of later attempts' records, which sort after those of the first attempt


def evaluate_dataset(
    output: Path,
    settings: DatasetSettings,
    batch_size: int = 16,
    retry_failed: bool = False,
    shard: Shard | None = None,
) -> dict[str, Any] | None:
    """Computes the log-likelihoods of all images of a dataset and writes one record per image, a summary and a report.

    With `accelerate launch`, each of n processes evaluates every n-th image, on the same grid. Records are written
    from time to time, so that the next run continues a killed one. A kill loses at most a hundredth of the run's time,
    a minute or one batch. In float32 the number of an image is the same to 1e-5 bits/dim for every batch size and
    every number of processes; with finite differences, which divide the rounding by their step, to 1e-3. An image that
    can't be read, does not fit the pipeline or has no finite likelihood gets a record with the error.

    Args:
        output: folder of `likelihoods.jsonl` (one line per image, in the order of the data), `summary.json`,
            `histogram.png` and `index.html`, and of `records/` and `settings.json`, from which a run is resumed. All
            processes must see it.
        batch_size: number of images that are evaluated at once.
        retry_failed: evaluate the images whose record is an error again, because their files have been repaired.
            All other images must be unchanged. For a stream, only the number of images is compared.
        shard: the part of the images that this launch evaluates, into a folder of its own. The folder gets
            `shard.json` at the end instead of a report, which `merge_likelihoods` makes of the folders of all shards.
            No number depends on the shard. None means all images.

    Returns:
        The content of `summary.json` (of a shard, of `shard.json`) on the main process, None on the others.

    Cost: `num_inference_steps` + 1 evaluations of the denoiser per image, each with one backward pass per probe, or
    with one evaluation of the trace model.

    Raises:
        InputError: the data or the pipeline can't be opened, there are no images, the output lies in the folder of the
            data, `output` belongs to another run that has not ended or has records of other settings, or no image
            could be evaluated (a run stops after 64 refused images).
        UnsupportedError: the pipeline has no likelihood.
        CheckpointError: a checkpoint or record is damaged.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")
    refuse_output_in_data(output, settings.data.path)
    state = process_state()
    with locked_folder(output, state):
        return _evaluate(output, settings, batch_size, retry_failed, shard, state)


def _evaluate(
    output: Path,
    settings: DatasetSettings,
    batch_size: int,
    retry_failed: bool,
    shard: Shard | None,
    state: PartialState,
) -> dict[str, Any] | None:
    """Evaluates the images of a dataset in a folder that belongs to this launch."""
    pipe = load_pipeline(settings.denoiser).to(state.device)
    evaluator = ImageEvaluator(pipe, settings)
    backbone, name = evaluator.backbone, evaluator.settings.estimator
    with state.main_process_first():  # the other processes use the files that the main process has downloaded
        images = open_images(settings.data, backbone.image_channels, backbone.takes_text)
        note = {**settings_note(settings), **shard_note(shard), "estimator": name, "images": images_digest(images)}
        records = _open_records(output, {**note, **pipeline_digests(pipe)}, images, retry_failed)
        before = ImageRecords(records)
    begin = time.perf_counter()
    share = ImageShare(evaluator, images, records, batch_size, state, shard)
    positions = before.positions
    if retry_failed and before.failed_positions:
        positions -= before.failed_positions
        share.attempt = 1 + sum(key.startswith(RETRY) for key in records.done())
    total = share.run(positions, before.method)
    if not state.is_main_process:
        return None
    seconds = time.perf_counter() - begin
    count = len((shard or Shard()).positions(total)) - len(positions)
    run = {"processes": state.num_processes, "batch_size": batch_size, "seconds": seconds, "images": count}
    last_run = {"last_run": {**run, "images_per_second": count / max(seconds, 1e-9)}}
    if shard is None:
        return write_results(records, images, total, last_run)
    return write_shard(records, images, total, last_run)


def _open_records(output: Path, note: dict[str, Any], images: Images, retry_failed: bool) -> Records:
    """Opens the records of a run. With `retry_failed`, files of the images may have changed, but not their number."""
    file = output / SETTINGS
    before = read_table(file).get("images") if file.is_file() else None
    same_number = before is not None and before.split(",")[0] == note["images"].split(",")[0]
    if retry_failed and same_number:
        records = Records(output, {**note, "images": before}, ImageGroup)
        _refuse_changed_images(records, images)
        write_json(file, note)
        return records
    try:
        return Records(output, note, ImageGroup)
    except InputError as error:
        if not same_number or before == note["images"]:
            raise
        raise InputError(
            f"{error} Some files of the data have changed; if they have been repaired, --retry-failed takes them."
        ) from error


def _refuse_changed_images(records: Records, images: Images) -> None:
    """Refuses images that have changed since their likelihood was recorded. Images that failed may have changed."""
    if isinstance(images, ImageStream):
        return
    for record in ImageRecords(records):
        position = record["position"]
        if "error" not in record and record[FILE] != row_digest(images, images.rows[position], position):
            raise InputError(
                f"Image '{record['name']}' has changed since its likelihood was recorded in '{records.folder}'; only "
                "images that failed are tried again. Name another folder."
            )


@dataclasses.dataclass
class ImageShare:
    """Evaluates the images of one process.

    Args:
        batch_size: number of images that are evaluated at once.
        state: accelerate's state of the process.
        shard: the images of all processes; None for all images.
        attempt: number of the attempt at images that failed before.
    """

    evaluator: ImageEvaluator
    images: Images
    records: Records
    batch_size: int
    state: PartialState
    shard: Shard | None = None
    attempt: int = 0

    def __post_init__(self) -> None:
        self.pending: list[dict[str, Any]] = []  # records that are in no file yet
        self.total = 0 if isinstance(self.images, ImageStream) else len(self.images)
        self.own = (self.shard or Shard()).part(self.state.process_index, self.state.num_processes)

    def run(self, positions: frozenset[int], method: dict[str, Any] | None) -> int:
        """Evaluates the images of this process that have no record, and waits for the other processes.

        Args:
            positions: positions of the images that have a record.
            method: method in these records; None without records.

        Returns:
            The number of images of the whole data.

        Raises:
            InputError: there are no images, or no image of the whole data could be evaluated.
        """
        self.evaluator.method = method
        begin = self.last = time.perf_counter()
        rows = self._read_rows(positions)
        expected = len(self.own.positions(self.total)) or None  # a stream has no known length
        num_done = sum(position in self.own for position in positions)
        with tqdm(total=expected, initial=num_done, desc="images", disable=not self.state.is_main_process) as progress:
            for batch in iter(lambda: list(itertools.islice(rows, self.batch_size)), []):
                self.pending += self._evaluate(batch)
                progress.update(len(batch))
                duration, low, high = time.perf_counter() - self.last, *WRITE_SECONDS
                if duration >= min(high, max(low, WRITE_FRACTION * (self.last - begin))):
                    self._write()
            self._write()
        self.state.wait_for_everyone()
        if not self.total:
            raise no_images(self.images.data)
        if self.pending:  # this process has evaluated no image, but another process may have
            if self.shard is None and not self.records.done():  # the images of other shards may be better
                first = [*self.evaluator.refusals, self.pending[0]["error"]][0]  # of the pipeline, if there is one
                raise InputError(f"Not one image could be evaluated. The first: {first}")
            self._write(failed_only=True)
        self.state.wait_for_everyone()
        return self.total

    def _read_rows(self, known_positions: frozenset[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields positions and undecoded rows of this process that have no record."""
        if isinstance(self.images, ImageStream):
            for position, row in enumerate(self.images.undecoded()):
                self.total = position + 1
                if position in self.own and position not in known_positions:
                    yield position, row
        else:
            positions = self.own.positions(self.total)
            yield from (
                (position, self.images.rows[position]) for position in positions if position not in known_positions
            )

    def _evaluate(self, batch: Sequence[tuple[int, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Returns the records of a batch.

        Raises:
            InputError: the pipeline has refused many images, and there is no likelihood; the settings are the likely
                cause.
        """
        records: list[dict[str, Any]] = []
        examples: list[tuple[int, Example]] = []
        for position, row in batch:
            try:
                examples.append((position, self.images.example(row, position)))
            except UnreadableImageError as error:
                name = self.images.row_name(row, position)
                records.append({"position": position, "name": name, "error": str(error)})
        for record in self.evaluator.evaluate(examples):
            records.append(record)
            refusals = self.evaluator.refusals
            if len(refusals) == ATTEMPTS and self.evaluator.method is None and not self.records.done():
                raise InputError(f"Not one of {ATTEMPTS} images could be evaluated. The last: {refusals[-1]}")
        rows = dict(batch)
        for record in records:
            record[FILE] = row_digest(self.images, rows[record["position"]], record["position"])
        return records

    def _write(self, failed_only: bool = False) -> None:
        """Writes the records since the last file.

        Errors are written after the first likelihood only, so that a folder without a likelihood takes other settings.
        With `failed_only` they are written without a likelihood too.
        """
        end = time.perf_counter()
        if self.pending and (self.evaluator.method is not None or failed_only):
            rows = sorted(self.pending, key=lambda row: row["position"])
            content = {"method": self.evaluator.method, "seconds": end - self.last, "records": rows}
            attempt = f"{RETRY}{self.attempt:06d}-" if self.attempt else ""
            self.records.write(f"{attempt}{rows[0]['position']:09d}", content)
            self.pending = []
        self.last = end
