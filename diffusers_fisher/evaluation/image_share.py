"""Evaluates the images of one process of a launch, and writes their records from time to time."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import PartialState
from tqdm.auto import tqdm

from ..data import FILE_ROWS, Images, ImageStream, no_images
from ..errors import CheckpointError, InputError
from ..jobs.records import Records
from ..jobs.shards import Shard, share_of_files
from .dataset_likelihood_report import ImageRecords
from .row_evaluator import Evaluated, Row, RowEngine

ATTEMPTS = 64  # number of refused images after which a run stops, if no image could be evaluated
WRITE_SECONDS = (1.0, 60.0)  # shortest and longest time between two files of records
WRITE_FRACTION = 0.01  # time between two files as a fraction of the time so far: a kill loses little
RETRY = "retry-"  # beginning of the names of later attempts' records, which sort after those of the first attempt
END = "end-"  # beginning of the names of the records that say how long a file of a stream is


@dataclasses.dataclass
class ImageShare:
    """The images of one process.

    Args:
        engine: evaluates the images.
        images: the dataset.
        records: gets the records, and may have some already.
        state: accelerate's state of the process.
        shard: the images of all processes; None for all images.
        attempt: number of the attempt at images that failed before.
    """

    engine: RowEngine
    images: Images
    records: Records
    state: PartialState
    shard: Shard | None = None
    attempt: int = 0

    def __post_init__(self) -> None:
        self.method: dict[str, Any] | None = None
        self._pending: list[dict[str, Any]] = []  # records that are in no file yet
        self._refusals: list[str] = []
        self._ends: dict[int, int] = {}  # lengths of files of a stream that are in no record yet
        part = Shard(self.state.process_index, self.state.num_processes)
        self._files, self._rows = share_of_files(self.images.num_files, self.shard or Shard(), part)

    def run(self, before: ImageRecords, positions: frozenset[int]) -> None:
        """Evaluates the images of this process that have no record, and waits for the other processes.

        Args:
            before: the records that are there already.
            positions: positions of the images that are not evaluated again.

        Raises:
            InputError: there are no images, or no image of the whole data could be evaluated.
        """
        is_stream = isinstance(self.images, ImageStream)
        self.method, self._lengths = before.method, {**before.lengths} if is_stream else {0: len(self.images)}
        begin = self._last = time.perf_counter()
        expected = None if is_stream else len(self._rows.positions(len(self.images))) or None
        num_done = sum(position in self._rows for position in positions) if not is_stream else 0
        with tqdm(total=expected, initial=num_done, desc="images", disable=not self.state.is_main_process) as progress:
            for part in self.engine.run(self._read_rows(positions)):
                self._take(part)
                progress.update(len(part.records))
                duration, low, high = time.perf_counter() - self._last, *WRITE_SECONDS
                if duration >= min(high, max(low, WRITE_FRACTION * (self._last - begin))):
                    self._write()
            self._write()
        self.state.wait_for_everyone()
        is_part = self.shard is not None and self.images.num_files > 1  # other shards have other files
        if not is_part and not self._pending and not any(self._lengths.values()) and not self.records.done():
            raise no_images(self.images.data)
        # Another process may have a likelihood, and the images of other shards may be better.
        if self._pending and self.shard is None and not self.records.done():
            first = [*self._refusals, self._pending[0]["error"]][0]  # of the pipeline, if there is one
            raise InputError(f"Not one image could be evaluated. The first: {first}")
        if self._pending or self._ends:
            self._write(failed_only=True)
        self.state.wait_for_everyone()

    def _read_rows(self, known_positions: frozenset[int]) -> Iterator[Row]:
        """Yields positions and undecoded rows of this process that have no record."""
        if not isinstance(self.images, ImageStream):
            positions = self._rows.positions(len(self.images))
            yield from (
                (position, self.images.rows[position]) for position in positions if position not in known_positions
            )
            return
        for file in self._files:
            start, own = file * FILE_ROWS, self._rows
            length = self._lengths.get(file)
            if length is not None and all(start + row in known_positions for row in own.positions(length)):
                continue  # the file is not opened
            own_rows = itertools.count(own.shard_index, own.num_shards)
            missing = next(row for row in own_rows if start + row not in known_positions)
            # The file must be read from the row after the last known one, so that its length is seen.
            number = max(0, missing - own.num_shards + 1)
            for content in self.images.file_rows(file, number):
                if number in own and start + number not in known_positions:
                    yield start + number, content
                number += 1
            if length is None:
                self._lengths[file] = self._ends[file] = number

    def _take(self, part: Evaluated) -> None:
        """Keeps records until they are written.

        Raises:
            InputError: the pipeline has refused many images, and there is no likelihood; the settings are the likely
                cause.
        """
        self.method = self.method or part.method
        self._pending += part.records
        self._refusals += part.refusals
        if len(self._refusals) >= ATTEMPTS and self.method is None and not self.records.done():
            raise InputError(
                f"Not one of {ATTEMPTS} images could be evaluated. The last: {self._refusals[ATTEMPTS - 1]}"
            )

    def _write(self, failed_only: bool = False) -> None:
        """Writes the records since the last file, and the lengths of files of a stream.

        Errors are written after the first likelihood only, so that a folder without a likelihood takes other settings.
        With `failed_only` they are written without a likelihood too.
        """
        end = time.perf_counter()
        if self.method is not None or failed_only:
            if self._pending:
                rows = sorted(self._pending, key=lambda row: row["position"])
                content = {"method": self.method, "seconds": end - self._last, "records": rows}
                attempt = f"{RETRY}{self.attempt:06d}-" if self.attempt else ""
                self.records.write(f"{attempt}{rows[0]['position']:09d}", content)
                self._pending = []
            for file in list(self._ends):  # another thread, which reads ahead, adds to it
                content = {"method": None, "seconds": 0.0, "records": [], "file_number": file}
                self.records.write(f"{END}{file:06d}", {**content, "length": self._ends.pop(file)})
        self._last = end


def share_positions(lengths: Mapping[int, int], num_files: int, shard: Shard) -> frozenset[int]:
    """Returns the positions of the images of a shard.

    Args:
        lengths: numbers of images by the number of the file.

    Raises:
        CheckpointError: the length of a file is missing.
    """
    files, rows = share_of_files(num_files, shard)
    missing = sorted(set(files) - lengths.keys())
    if missing:
        raise CheckpointError(
            f"The records do not say how many images the files {missing[:5]} of the data have; run the same command "
            "again. Processes on several machines need one folder that all of them see."
        )
    return frozenset(file * FILE_ROWS + row for file in files for row in rows.positions(lengths[file]))
