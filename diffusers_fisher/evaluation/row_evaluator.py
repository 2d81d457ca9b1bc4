"""Evaluates rows of a dataset: threads decode them ahead, images of one size are evaluated together."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from ..data import Example, Images, UnreadableImageError, without_pillow_warnings
from ..jobs.identity import row_digest
from .dataset_likelihood_report import FILE
from .execution import BatchSize, BatchSizeTrial
from .image_evaluator import ImageEvaluator

Item = TypeVar("Item")
Result = TypeVar("Result")
Row = tuple[int, dict[str, Any]]
"""The position and the undecoded row of an image."""

WINDOW = 4  # decoded images wait for others of their size: this many batches


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """Images that have been evaluated.

    Args:
        records: one record per image.
        method: description of the likelihoods; None without a likelihood so far.
        refusals: errors of those images that the pipeline has refused before the first likelihood.
    """

    records: list[dict[str, Any]]
    method: dict[str, Any] | None
    refusals: list[str]


class RowEngine(Protocol):
    """Evaluates rows, in whatever order."""

    def run(self, rows: Iterator[Row]) -> Iterator[Evaluated]:
        """Yields the records of rows, which it reads as it needs them."""


@dataclasses.dataclass(frozen=True)
class DecodedRow:
    """A row whose image is decoded, or can't be.

    Args:
        entries: position, name and hash of the image, and its key if it has one.
        example: the image; None if it can't be read.
        error: why it can't be read, or empty.
    """

    entries: dict[str, Any]
    example: Example | None
    error: str = ""


class RowEvaluator:
    """Evaluates rows in this process.

    Args:
        evaluator: evaluates the decoded images.
        images: decodes the rows; it needs no rows of its own.
        batch_size: number of images that are evaluated at once, or "auto".
        threads: number of threads that decode.
    """

    def __init__(self, evaluator: ImageEvaluator, images: Images, batch_size: BatchSize, threads: int):
        self.evaluator, self.images, self.threads = evaluator, images, threads
        self.batch = BatchSizeTrial(batch_size)
        self._limit = images.data.pixel_limit

    def run(self, rows: Iterator[Row]) -> Iterator[Evaluated]:
        """Yields the records of rows, batch by batch. The next rows are read and decoded in the meantime."""
        with without_pillow_warnings():
            decoded = run_ahead(rows, self.decode, self.threads, lambda: max(self.batch.size, 2 * self.threads))
            for batch in self._batches(decoded):
                yield self.evaluate(batch)

    def decode(self, row: Row) -> DecodedRow:
        """Reads and decodes the image of a row, within a block `without_pillow_warnings()`."""
        position, content = row
        key = self.images.row_key(content, position)
        entries = {
            "position": position, "name": self.images.row_name(content, position),
            **({} if key is None else {"key": key}), FILE: row_digest(self.images, content, position),
        }  # fmt: skip
        try:
            return DecodedRow(entries, self.images.decode(content, position))
        except UnreadableImageError as error:
            return DecodedRow(entries, None, str(error))

    def evaluate(self, batch: Sequence[DecodedRow]) -> Evaluated:
        """Returns the records of a batch."""
        entries = {row.entries["position"]: row.entries for row in batch}
        examples = [(row.entries["position"], row.example) for row in batch if row.example is not None]
        records = [{**row.entries, "error": row.error} for row in batch if row.example is None]
        refusals, shortages = len(self.evaluator.refusals), self.evaluator.memory_shortages
        begin = time.perf_counter()
        records += [{**record, **entries[record["position"]]} for record in self.evaluator.evaluate(examples)]
        seconds = time.perf_counter() - begin
        self.batch.note(len(examples), seconds, self.evaluator.memory_shortages > shortages)
        return Evaluated(records, self.evaluator.method, self.evaluator.refusals[refusals:])

    def _batches(self, rows: Iterable[DecodedRow]) -> Iterator[list[DecodedRow]]:
        """Yields batches of images of one size, or of rows that can't be read. Few images wait for others."""
        groups: dict[tuple[int, ...], list[DecodedRow]] = {}
        num_waiting, pixels_waiting = 0, 0
        for row in rows:
            size = () if row.example is None else tuple(row.example.pixels.shape[-2:])
            group = groups.setdefault(size, [])
            group.append(row)
            pixels = _pixels(size)
            num_waiting, pixels_waiting = num_waiting + 1, pixels_waiting + pixels
            is_full = len(group) >= self.batch.size or (len(group) + 1) * pixels > self._limit
            if num_waiting > WINDOW * self.batch.size or pixels_waiting > WINDOW * self._limit:
                size, is_full = max(groups, key=lambda size: len(groups[size])), True
            if is_full:
                group = groups.pop(size)
                num_waiting, pixels_waiting = num_waiting - len(group), pixels_waiting - len(group) * _pixels(size)
                yield group
        yield from groups.values()


def _pixels(size: tuple[int, ...]) -> int:
    return size[0] * size[1] if size else 0


def run_ahead(
    items: Iterator[Item], function: Callable[[Item], Result], threads: int, ahead: Callable[[], int]
) -> Iterator[Result]:
    """Yields `function(item)` of all items, in their order. Threads are ahead of what has been yielded.

    Args:
        items: one thread reads them, so that the caller does not wait for a disk or a network.
        threads: number of threads that call the function.
        ahead: returns the number of items to be ahead.
    """
    with ThreadPoolExecutor(threads) as callers, ThreadPoolExecutor(1) as reader:

        def read() -> Future[Result] | None:
            for item in items:
                return callers.submit(function, item)
            return None

        pending: collections.deque[Future[Future[Result] | None]] = collections.deque()
        try:
            while True:
                while len(pending) < max(1, ahead()):
                    pending.append(reader.submit(read))
                future = pending.popleft().result()
                if future is None:
                    return
                yield future.result()
        finally:
            reader.shutdown(cancel_futures=True)
            callers.shutdown(cancel_futures=True)
