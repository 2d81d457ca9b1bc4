"""Training data as pieces of global batches, the same whatever the number of processes, from any step on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from ..data import CachedLatents, Example, Images, ImageStream, UnreadableImageError
from ..errors import InputError
from .schedule import Optimisation, batch_indices

SHUFFLE_BUFFER = 1000  # images of a stream, undecoded


@dataclasses.dataclass(frozen=True)
class Piece:
    """Args:
    samples: (n, ...) pixels in [0, 1], or cached latents.
    captions: one for each.
    skipped: names of images that could not be read; others stand in their places.
    """

    samples: torch.Tensor
    captions: list[Any]
    skipped: list[str]

    @classmethod
    def of(cls, entries: Sequence[tuple[torch.Tensor, Any, tuple[str, ...]]]) -> Piece:
        """Raises `InputError` for samples of several sizes."""
        samples, captions, skipped = zip(*entries, strict=True)
        shapes = sorted({tuple(sample.shape) for sample in samples})
        if len(shapes) > 1:
            raise InputError(f"The data has images of sizes {shapes}; set `data.resolution`, which makes them one.")
        return cls(torch.stack(samples), list(captions), [name for names in skipped for name in names])


@dataclasses.dataclass(frozen=True)
class Share:
    """A process's part of every global batch: its pieces, in order."""

    batch_size: int
    num_processes: int = 1
    process_index: int = 0
    accumulation: int = 1

    @property
    def slices(self) -> list[slice]:
        size = self.batch_size // (self.num_processes * self.accumulation)
        first = self.process_index * self.accumulation
        return [slice(size * number, size * (number + 1)) for number in range(first, first + self.accumulation)]


class TrainingData:
    """Training and held-out samples of a source.

    Args:
        source: images, a stream of them, or cached latents.
        held_out: how many samples are kept for validation: the last, of a stream the first.

    Raises:
        InputError: fewer samples than are held out and fill a batch.
    """

    def __init__(self, source: Images | ImageStream | CachedLatents, settings: Optimisation, held_out: int, seed: int):
        self.source, self.settings, self.num_held_out, self.seed = source, settings, held_out, seed
        self.streaming = isinstance(source, ImageStream)
        if not self.streaming and len(source) < held_out + settings.batch_size:
            raise InputError(
                f"The data has {len(source)} samples; {held_out} are held out and a batch takes "
                f"{settings.batch_size}. Give more data, a smaller batch or fewer held-out samples."
            )

    def held_out(self) -> Piece:
        """The held-out samples."""
        return self._first(self.num_held_out) if self.streaming else self._taken(len(self.source) - self.num_held_out)

    def some(self, count: int, size: int) -> Iterator[Piece]:
        """About `count` training samples, `size` at a time, spread over the data (of a stream its first)."""
        if isinstance(self.source, ImageStream):
            rows = itertools.islice(self.source.undecoded(self.num_held_out), count)
            for number, group in enumerate(_batched(rows, size)):
                yield _of_rows(self.source, group, self.num_held_out + size * number)
            return
        readable = _Readable(self.source, len(self.source) - self.num_held_out)
        indices = torch.linspace(0, len(readable) - 1, min(count, len(readable))).long().tolist()
        for group in _batched(iter(indices), size):
            yield Piece.of([readable[index] for index in group])

    def pieces(self, share: Share, start: int, workers: int) -> Iterable[Piece]:
        """The process's pieces of every step from `start` to the last."""
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
            generator=torch.Generator(),  # it seeds the workers, and would else draw from the global one
        )  # fmt: skip

    def _first(self, count: int) -> Piece:
        assert isinstance(self.source, ImageStream)
        return _of_rows(self.source, list(itertools.islice(self.source.undecoded(), count)), 0)

    def _taken(self, start: int) -> Piece:
        readable = _Readable(self.source, len(self.source))
        return Piece.of([readable[index] for index in range(start, len(self.source))])


class _Readable(torch.utils.data.Dataset):
    """The first `count` samples; in the place of one that can't be read stands the next that can."""

    def __init__(self, source: Images | CachedLatents, count: int):
        self.source, self.count = source, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any, tuple[str, ...]]:
        skipped: list[str] = []
        for position in itertools.islice(itertools.cycle(range(self.count)), index, index + self.count):
            try:
                entry = self.source[position]
            except UnreadableImageError:
                skipped.append(self.source.name(position))  # type: ignore[union-attr]
                continue
            if isinstance(entry, Example):
                return entry.pixels, entry.caption, tuple(skipped)
            return *entry, tuple(skipped)
        raise InputError(f"None of the {self.count} images can be read; the first is '{skipped[0]}'.")


class _StreamPieces(torch.utils.data.IterableDataset):
    def __init__(self, stream: ImageStream, share: Share, skip: int, start: int, steps: int, seed: int):
        self.stream, self.share, self.skip, self.start, self.steps, self.seed = stream, share, skip, start, steps, seed

    def __iter__(self) -> Iterator[Piece]:
        rows, size = self._endless(), self.share.batch_size
        for _ in range(self.start * size):
            next(rows)
        for step in range(self.start, self.steps):
            batch = list(itertools.islice(rows, size))
            for part in self.share.slices:
                yield _of_rows(self.stream, batch[part], step * size + part.start)

    def _endless(self) -> Iterator[dict[str, Any]]:
        """Undecoded rows, shuffled within a buffer, epoch after epoch."""
        rows = self.stream.rows.skip(self.skip).shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)
        for epoch in itertools.count():
            rows.set_epoch(epoch)
            empty = True
            for row in rows:
                empty = False
                yield row
            if empty:
                raise InputError(
                    f"The stream '{self.stream.data.path}' has no images beside the {self.skip} held out."
                )


def _batched(entries: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while group := list(itertools.islice(entries, size)):
        yield group


def _of_rows(stream: ImageStream, rows: list[dict[str, Any]], position: int) -> Piece:
    """Decoded rows; those that can be read stand, in turn, for those that can't."""
    entries, skipped = [], []
    for offset, row in enumerate(rows):
        try:
            example = stream.example(row, position + offset)
            entries.append((example.pixels, example.caption, ()))
        except UnreadableImageError:
            skipped.append(stream.row_name(row, position + offset))
    if not entries:
        raise InputError(f"None of {len(rows)} images from position {position} on can be read: {skipped[:5]}.")
    piece = Piece.of([entries[number % len(entries)] for number in range(len(rows))])
    return dataclasses.replace(piece, skipped=skipped)
