"""Follows clean images through the probability-flow ODE, for trace models of target "jacobian".

A likelihood starts at a clean image, which has none of the noise that its level stands for, and this noise is missing
at the later levels too. The denoiser's Jacobian differs there from the one at noised images, so a trace model must
learn it at these points.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from ..data import Caption
from ..errors import CoarseGridWarning
from ..files import expecting, load_tensors, save_tensors
from ..fisher import DirectFisher, FisherEstimator, FisherOperator
from ..likelihood import Integration, integrate_log_likelihood
from ..noise import DenoisingState, expand
from ..seeds import step_generator
from .changes import change_images
from .pieces import Piece
from .samples import SampleSpace, drop_captions
from .trace_losses import TraceDraw

STEPS = (8, 10, 12)  # numbers of steps of the integrations: different ones, so that many noise levels are met


@dataclasses.dataclass(frozen=True)
class Paths:
    """Points x_t = alpha x_0 + sigma z with the z that the ODE gives.

    Args:
        clean: (images, ...) x_0.
        captions: one caption per image.
        image: (points,) number of the image that a point belongs to.
        noise: (points, ...) z.
        log_noise: (points,) log(sigma/alpha), float64.
    """

    clean: torch.Tensor
    captions: list[Caption]
    image: torch.Tensor
    noise: torch.Tensor
    log_noise: torch.Tensor

    def save(self, path: Path) -> None:
        """Writes one safetensors file, atomically."""
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        save_tensors(path, tensors, {"captions": json.dumps(self.captions)})

    @classmethod
    def load(cls, path: Path) -> "Paths":
        """Reads what `save` wrote. Raises `CheckpointError` for a damaged file."""
        tensors, metadata = load_tensors(path)
        with expecting("paths", path, "delete the file, and the next run makes it again"):
            return cls(**tensors, captions=[*json.loads(metadata["captions"])])

    def mix(
        self,
        draw: TraceDraw,
        samples: torch.Tensor,
        captions: list[Caption],
        fraction: float,
        generator: torch.Generator,
        batch_size: int,
        part: slice,
    ) -> tuple[TraceDraw, torch.Tensor, list[Caption]]:
        """Replaces a fraction of the rows of a global batch by points of the paths; returns the rows `part`.

        The replacements are drawn for the whole batch, so that neither processes nor accumulation change them.
        """
        rows = (torch.rand(batch_size, generator=generator) < fraction)[part]
        points = torch.randint(len(self.image), (batch_size,), generator=generator)[part]
        images = self.image[points]
        mask = rows.view(-1, *[1] * (samples.ndim - 1))
        mixture = dataclasses.replace(
            draw,
            noise=torch.where(mask, self.noise[points], draw.noise),
            log_noise=torch.where(rows, self.log_noise[points], draw.log_noise),
        )
        clean = torch.where(mask.to(samples.device), self.clean[images].to(samples), samples)
        choices = zip(rows.tolist(), images.tolist(), captions, strict=True)
        return mixture, clean, [self.captions[image] if row else caption for row, image, caption in choices]


class _Recorder(FisherEstimator):
    """An estimator that records the states at which it is called."""

    def __init__(self) -> None:
        self.states: list[DenoisingState] = []

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
        self.states.append(state)
        return DirectFisher()(state)


def follow_paths(
    space: SampleSpace, pieces: Iterable[Piece], caption_dropout: float, change: float, seed: int
) -> Paths:
    """Integrates the ODE from the clean samples of `pieces`, each piece on its own grid.

    Args:
        caption_dropout: fraction of captions that are left out.
        change: fraction of images that are changed, in pixels, and of captions that are exchanged.

    Cost: 9 to 13 evaluations of the denoiser per sample.
    """
    images, owners, noises, levels = [], [], [], []
    captions: list[Caption] = []
    count = 0
    for number, piece in enumerate(pieces):
        generator = step_generator(seed, "paths", number)
        clean, texts = _vary(space, piece, change, generator)
        texts = drop_captions(texts, torch.rand(len(clean), generator=generator) < caption_dropout)
        parts = [slice(first, first + space.piece_size) for first in range(0, len(clean), space.piece_size)]
        num_steps = STEPS[number % len(STEPS)]
        groups = [_visit_states(space, texts[part], piece.samples[part], clean[part], num_steps) for part in parts]
        for states in zip(*groups, strict=True):  # level by level: the order is the same for parts of any size
            x, level = torch.cat([state.sample for state in states]), states[0].level
            z = (x - expand(level.alpha, x) * clean) / expand(level.sigma, x)
            noises.append(z.float().cpu())
            levels.append(level.log_noise_to_signal.double().cpu().reshape(1).expand(len(z)))
            owners.append(count + torch.arange(len(z)))
        images.append(clean.cpu())
        count += len(clean)
        captions += texts
    return Paths(torch.cat(images), captions, torch.cat(owners), torch.cat(noises), torch.cat(levels))


def _visit_states(
    space: SampleSpace, captions: list[Caption], data: torch.Tensor, clean: torch.Tensor, num_steps: int
) -> list[DenoisingState]:
    """Returns the states at which a likelihood of `clean` evaluates the trace."""
    recorder = _Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoarseGridWarning)  # the path is used here, not the likelihood
        integration = Integration(num_steps=num_steps, num_probes=None)
        integrate_log_likelihood(space.denoiser(captions, data), clean, recorder, integration)
    return recorder.states


@torch.no_grad()
def _vary(
    space: SampleSpace, piece: Piece, fraction: float, generator: torch.Generator
) -> tuple[torch.Tensor, list[Caption]]:
    """Returns clean samples and captions.

    A fraction of the images is changed, and a fraction of the captions is exchanged.
    """
    pixels, clean = space.pixels(piece.samples), space.pack(piece.samples)
    changes, exchanges = torch.rand(2, len(clean), generator=generator) < fraction
    changed_samples = space.encode(change_images(pixels.cpu(), generator))
    clean = torch.where(changes.to(clean.device).view(-1, *[1] * (clean.ndim - 1)), changed_samples, clean)
    order = torch.randint(len(clean), (len(clean),), generator=generator).tolist()
    rows = zip(piece.captions, order, exchanges.tolist(), strict=True)
    return clean, [piece.captions[index] if exchange else caption for caption, index, exchange in rows]
