"""The random draws of a likelihood."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch

from ..fisher.estimate import Generators
from ..seeds import content_key, step_generator


class ImageDraws:
    """Makes the random draws of a batch. Each is a function of the seed, of the image and of its purpose alone.

    So an image's draws are the same in every batch, order, process and on every device.

    Args:
        samples: (B, ...) samples, for the shape of the draws.
        generator: gives the seed by one draw; a list gives one seed per image. None: torch's default generator.
        keys: one key per image; None: a key of each sample's values.
    """

    def __init__(self, samples: torch.Tensor, generator: Generators, keys: Sequence[str] | None = None):
        generators = generator if isinstance(generator, list) else [generator]
        seeds = [_seed(each) for each in generators]
        self._seeds = seeds if isinstance(generator, list) else seeds * len(samples)
        self._keys = [content_key(sample) for sample in samples] if keys is None else list(keys)
        self._shape = samples.shape[1:]

    def select_samples(self, rows: torch.Tensor) -> ImageDraws:
        """Returns the draws of some of the images; `rows` (n,) int64 are their places in the batch."""
        selected = copy.copy(self)
        selected._seeds, selected._keys = (
            [entries[row] for row in rows.tolist()] for entries in (self._seeds, self._keys)
        )
        return selected

    def generators(self, *purpose: str | int) -> list[torch.Generator]:
        """Returns one generator per image for the draws of one purpose."""
        return [step_generator(seed, key, *purpose) for seed, key in zip(self._seeds, self._keys, strict=True)]

    def signs(self, count: int, *purpose: str | int) -> torch.Tensor:
        """Returns `count` vectors of random signs per image, (count, B, ...) int8 on the CPU."""
        return torch.stack([self.signs_of_probe(probe, *purpose) for probe in range(count)])

    def signs_of_probe(self, probe: int, *purpose: str | int) -> torch.Tensor:
        """Returns the vector number `probe` of `signs`, (B, ...) int8 on the CPU."""
        return torch.stack([_signs(self._shape, generator) for generator in self.generators(*purpose, probe)])

    def normal(self, *purpose: str | int) -> torch.Tensor:
        """Returns standard normal noise, (B, ...) float64 on the CPU."""
        return torch.stack([
            torch.randn(self._shape, generator=generator, dtype=torch.float64)
            for generator in self.generators(*purpose)
        ])  # fmt: skip


@contextlib.contextmanager
def unchanged_states(generator: Generators) -> Iterator[None]:
    """Restores the states of the generators after the block, so that the next draws are those without the block."""
    generators = generator if isinstance(generator, list) else [generator or torch.default_generator]
    states = [each.get_state() for each in generators]
    try:
        yield
    finally:
        for each, state in zip(generators, states, strict=True):
            each.set_state(state)


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def _signs(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return 2 * torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) - 1
