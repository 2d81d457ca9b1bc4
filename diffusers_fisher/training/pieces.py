"""Cuts training data into pieces of global batches, which do not depend on the number of processes."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..data import CachedLatents, Caption, Example, Images, ImageStream, UnreadableImageError
from ..errors import InputError
from .schedule import Optimisation, batch_indices

SHUFFLE_BUFFER = 1000  # undecoded images of a stream
Entry = tuple[torch.Tensor, Caption, tuple[str, ...]]  # a sample, its caption, names of the images it replaces
Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a global batch.

    Args:
        samples: (n, ...) pixels in [0, 1], or cached latents.
        captions: one caption per sample.
        skipped: names of images that could not be read and are replaced by others.
    """

    samples: torch.Tensor
    captions: list[Caption]
    skipped: list[str]

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> "Piece":
        """Stacks samples of one size. Raises `InputError` for samples of several sizes."""
        samples, captions, skipped = zip(*entries, strict=True)
        shapes = sorted({tuple(sample.shape) for sample in samples})
        if len(shapes) > 1:
            raise InputError(f"The data has images of sizes {shapes}; set `data.resolution`, which makes them one.")
        return cls(torch.stack(samples), list(captions), [name for names in skipped for name in names])


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """The part of every global batch that one process takes.

    Args:
        batch_size: samples of the global batch.
        accumulation: number of pieces into which the part is cut.
    """

    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    accumulation: int = 1

    @property
    def slices(self) -> list[slice]:
        """The pieces of the process, in order, as slices of the global batch."""
        size = self.batch_size // (self.num_processes * self.accumulation)
        first = self.process_index * self.accumulation
        return [slice(size * number, size * (number + 1)) for number in range(first, first + self.accumulation)]


class TrainingData:
    """Training and held-out samples of a source.

    Args:
        source: images, a stream of images, or cached latents.
        settings: gives the batch size and the number of steps.
        held_out: number of samples that are kept for validation: the last of the data, of a stream the first.

    Raises:
        InputError: there are too few samples for the held-out ones and one batch.
    """

    def __init__(self, source: Images | CachedLatents, settings: Optimisation, held_out: int, seed: int):
        self.source, self.settings, self.num_held_out, self.seed = source, settings, held_out, seed
        self.streaming = isinstance(source, ImageStream)
        if not self.streaming and len(source) < held_out + settings.batch_size:
            raise InputError(
                f"The data has {len(source)} samples; {held_out} are held out and a batch takes "
                f"{settings.batch_size}. Give more data, a smaller batch or fewer held-out samples."
            )

    def held_out(self) -> Piece:
        """Returns the held-out samples. Raises `InputError` if a stream has too few, or none can be read."""
        count = self.num_held_out
        if isinstance(self.source, ImageStream):
            rows = list(itertools.islice(self.source.undecoded(), count))
            if len(rows) < count:
                raise InputError(
                    f"The stream '{self.source.data.path}' has {len(rows)} images; {count} are to be held out. Give "
                    "more data or fewer held-out samples."
                )
            readable = _Readable(_StreamRows(self.source, iter(rows)), count)
        else:
            readable = _Readable(self.source, count, first=len(self.source) - count)
        return Piece.of([readable[index] for index in range(count)])

    def some(self, count: int, size: int) -> Iterator[Piece]:
        """Yields about `count` training samples, `size` at a time.

        They are spread over the data. Of a stream they are the first samples that can be read.
        """
        if isinstance(self.source, ImageStream):
            rows = itertools.islice(self.source.undecoded(self.num_held_out), count)
            entries = _readable_rows(self.source, enumerate(rows, self.num_held_out))
            yield from map(Piece.of, batched(entries, size))
            return
        readable = _Readable(self.source, len(self.source) - self.num_held_out)
        indices = torch.linspace(0, len(readable) - 1, min(count, len(readable))).long().tolist()
        for group in batched(iter(indices), size):
            yield Piece.of([readable[index] for index in group])

    def pieces(self, share: BatchShare, start: int, workers: int) -> Iterable[Piece]:
        """Returns the process's pieces of every step from `start` to the last."""
        if isinstance(self.source, ImageStream):
            stream = _StreamPieces(self.source, share, self.num_held_out, start, self.settings.steps, self.seed)
            return torch.utils.data.DataLoader(stream, batch_size=None, num_workers=min(workers, 1))
        count = len(self.source) - self.num_held_out

        def indices() -> Iterator[list[int]]:
            for step in range(start, self.settings.steps):
                batch = batch_indices(count, self.settings, step, self.seed).tolist()
                yield from (batch[part] for part in share.slices)

        return torch.utils.data.DataLoader(
            _Readable(self.source, count), batch_sampler=indices(), collate_fn=Piece.of, num_workers=workers,
            generator=torch.Generator(),  # it seeds the workers, which would otherwise draw from the global one
        )  # fmt: skip


def batched(entries: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` entries; the last list has the rest."""
    while group := list(itertools.islice(entries, size)):
        yield group


class _StreamRows:
    """Gives images of a stream by position.

    Undecoded rows are kept from the position of the last `drop` to the highest position that was read.
    """

    def __init__(self, stream: ImageStream, rows: Iterator[dict[str, Any]]):
        self.stream, self.rows, self.first = stream, rows, 0
        self.kept: collections.deque[dict[str, Any]] = collections.deque()

    def drop(self, position: int) -> None:
        """Forgets the rows before `position`."""
        while self.first < position:
            if self.kept:
                self.kept.popleft()
            else:
                next(self.rows)
            self.first += 1

    def _row(self, position: int) -> dict[str, Any]:
        while self.first + len(self.kept) <= position:
            self.kept.append(next(self.rows))
        return self.kept[position - self.first]

    def __getitem__(self, position: int) -> Example:
        return self.stream.example(self._row(position), position)

    def name(self, position: int) -> str:
        return self.stream.row_name(self._row(position), position)


def _next_readable(source: Images | CachedLatents | _StreamRows, positions: Iterable[int]) -> Entry:
    """Returns the first sample at `positions` that can be read, with the names of the samples before it."""
    skipped: list[str] = []
    for position in positions:
        try:
            entry = source[position]
        except UnreadableImageError:
            skipped.append(source.name(position))
            continue
        if isinstance(entry, Example):
            return entry.pixels, entry.caption, tuple(skipped)
        return *entry, tuple(skipped)
    raise InputError(f"None of {len(skipped)} images in a row can be read; the first is '{skipped[0]}'.")


def _readable_rows(stream: ImageStream, rows: Iterable[tuple[int, dict[str, Any]]]) -> Iterator[Entry]:
    """Yields the rows that can be read, each with the names of the unreadable rows before it.

    Args:
        rows: positions and undecoded rows.
    """
    skipped: list[str] = []
    for position, row in rows:
        try:
            example = stream.example(row, position)
        except UnreadableImageError:
            skipped.append(stream.row_name(row, position))
        else:
            yield example.pixels, example.caption, tuple(skipped)
            skipped = []


class _Readable(torch.utils.data.Dataset):
    """`count` samples from `first` on. A sample that can't be read is replaced by the next of them that can."""

    def __init__(self, source: Images | CachedLatents | _StreamRows, count: int, first: int = 0):
        self.source, self.count, self.first = source, count, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Entry:
        order = itertools.chain(range(index, self.count), range(index))
        return _next_readable(self.source, (self.first + position for position in order))


class _StreamPieces(torch.utils.data.IterableDataset):
    """The pieces of a stream for one process, which decodes only its own samples and their replacements."""

    def __init__(self, stream: ImageStream, share: BatchShare, skip: int, start: int, steps: int, seed: int):
        self.stream, self.share, self.skip, self.start, self.steps, self.seed = stream, share, skip, start, steps, seed

    def __iter__(self) -> Iterator[Piece]:
        rows, size = _StreamRows(self.stream, self._endless()), self.share.batch_size
        for step in range(self.start, self.steps):
            rows.drop(step * size)
            for part in self.share.slices:
                positions = range(step * size + part.start, step * size + part.stop)
                yield Piece.of([_next_readable(rows, range(first, first + SHUFFLE_BUFFER)) for first in positions])

    def _endless(self) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows, shuffled within a buffer, epoch after epoch."""
        rows = self.stream.rows.skip(self.skip).shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            empty = True
            for row in rows:
                empty = False
                yield row
            if empty:
                raise InputError(
                    f"The stream '{self.stream.data.path}' has no images apart from the {self.skip} held-out ones. "
                    "Give more data or fewer held-out samples."
                )
