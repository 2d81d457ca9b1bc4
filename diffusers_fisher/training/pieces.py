"""Cuts training data into pieces of global batches, which do not depend on the number of processes."""

import copy
import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..data import CachedLatents, Caption, Images, ImageStream, UnreadableImageError
from ..errors import InputError
from .schedule import Optimisation, batch_indices

SHUFFLE_BUFFER = 1000  # undecoded images of a stream
Entry = tuple[torch.Tensor, Caption, tuple[str, ...]]  # a sample, its caption, names of the images it replaces
Row = tuple[int, dict[str, Any]]  # the position of an image and its undecoded row
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
        held_out: number of samples for the validation: the last of the data, or the first of a stream.

    Raises:
        InputError: there are too few samples for the held-out ones and one batch.
    """

    def __init__(self, source: Images | CachedLatents, settings: Optimisation, held_out: int, seed: int):
        self.source, self.settings, self.num_held_out, self.seed = source, settings, held_out, seed
        if not isinstance(source, ImageStream) and len(source) < held_out + settings.batch_size:
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
            readable = _Readable(self.source, range(count), rows)
        else:
            readable = _Readable(self.source, range(len(self.source) - count, len(self.source)))
        return Piece.of([readable[index] for index in range(count)])

    def some(self, count: int, size: int) -> Iterator[Piece]:
        """Yields about `count` training samples, `size` at a time.

        The samples are spread over the data. For a stream they are the first samples that can be read.
        """
        if isinstance(self.source, ImageStream):
            rows = itertools.islice(self.source.undecoded(self.num_held_out), count)
            entries = _readable_rows(self.source, enumerate(rows, self.num_held_out))
        else:
            readable = _Readable(self.source, range(len(self.source) - self.num_held_out))
            indices = torch.linspace(0, len(readable) - 1, min(count, len(readable))).long().tolist()
            entries = (readable[index] for index in indices)
        yield from map(Piece.of, batched(entries, size))

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
            _Readable(self.source, range(count)), batch_sampler=indices(), collate_fn=Piece.of, num_workers=workers,
            generator=torch.Generator(),  # else the workers' seeds come from torch's own
        )  # fmt: skip


def batched(entries: Iterator[Item], size: int) -> Iterator[list[Item]]:
    """Yields lists of `size` entries; the last list has the rest."""
    while group := list(itertools.islice(entries, size)):
        yield group


def _readable_rows(images: Images, rows: Iterable[Row]) -> Iterator[Entry]:
    """Yields the rows that can be read, each with the names of the unreadable rows before it.

    Raises:
        InputError: there are rows, but none of them can be read.
    """
    skipped: list[str] = []
    any_readable = False
    for position, row in rows:
        try:
            example = images.example(row, position)
        except UnreadableImageError:
            skipped.append(images.row_name(row, position))
        else:
            yield example.pixels, example.caption, tuple(skipped)
            skipped, any_readable = [], True
    if skipped and not any_readable:
        raise InputError(f"None of {len(skipped)} images in a row can be read; the first is '{skipped[0]}'.")


class _Readable(torch.utils.data.Dataset):
    """Gives the samples at `positions`. The next readable one of them takes the place of an unreadable one.

    Args:
        rows: undecoded rows by position; None means that the source has them by position.
    """

    def __init__(self, source: Images | CachedLatents, positions: range, rows: list[dict[str, Any]] | None = None):
        self.source, self.positions, self.rows = source, positions, rows

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Entry:
        if isinstance(self.source, CachedLatents):
            return *self.source[self.positions[index]], ()
        rows = self.source.rows if self.rows is None else self.rows
        order = itertools.chain(self.positions[index:], self.positions[:index])
        return next(_readable_rows(self.source, ((position, rows[position]) for position in order)))


class _StreamPieces(torch.utils.data.IterableDataset):
    """The pieces of a stream for one process, which decodes only its own samples and their replacements."""

    def __init__(self, stream: ImageStream, share: BatchShare, skip: int, start: int, steps: int, seed: int):
        self.stream, self.share, self.skip, self.start, self.steps, self.seed = stream, share, skip, start, steps, seed

    def __iter__(self) -> Iterator[Piece]:
        (rows,) = itertools.tee(enumerate(self._endless()), 1)  # its copies read ahead, and its own position stays
        position = 0
        for step in range(self.start, self.steps):
            for part in self.share.slices:
                first = step * self.share.batch_size + part.start
                for _ in range(first - position):
                    next(rows)
                position = first
                candidates_by_row = [
                    itertools.islice(copy.copy(rows), i, i + SHUFFLE_BUFFER) for i in range(part.stop - part.start)
                ]
                yield Piece.of([next(_readable_rows(self.stream, candidates)) for candidates in candidates_by_row])

    def _endless(self) -> Iterator[dict[str, Any]]:
        """Yields undecoded rows, shuffled within a buffer, epoch after epoch."""
        if next(self.stream.undecoded(self.skip), None) is None:
            raise InputError(
                f"The stream '{self.stream.data.path}' has no images apart from the {self.skip} held-out ones. Give "
                "more data or fewer held-out samples."
            )
        rows = self.stream.rows.skip(self.skip).shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            yield from rows
