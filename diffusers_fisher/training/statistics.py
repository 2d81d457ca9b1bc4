"""Sets what a trace model knows before training: statistics of the data and of the denoiser's features."""

from collections.abc import Iterable, Iterator

import torch

from ..fisher.gaussian_data import GaussianFisher
from ..models import FisherTraceModel
from ..models.encoders import FEATURE_LEVELS
from ..noise import log_noise_to_signal_range
from ..seeds import step_generator
from .pieces import Piece
from .samples import SampleSpace
from .trace_config import TraceMatchingConfig
from .trace_losses import TraceDraw, noised_state


def fit_prior(
    model: FisherTraceModel, config: TraceMatchingConfig, pieces: Iterable[Piece], space: SampleSpace
) -> None:
    """Sets the trace model's prior to the statistics of training data, which are the same in every process.

    Raises:
        InputError: the data have no variance.
    """

    def samples() -> Iterator[torch.Tensor]:
        for number, piece in enumerate(pieces):
            yield space.draw(piece.samples, step_generator(config.seed, "prior", number)).cpu()

    gaussian = GaussianFisher.fit_diagonal(samples(), dct=config.model.basis == "dct")
    mean, variance = gaussian.mean, gaussian.covariance.variances.view(gaussian.mean.shape)
    if model.prior.mean.shape != mean.shape:  # one number per channel
        axes = (1, 2) if mean.ndim == 3 else (0,)
        variance = variance.mean(axes, keepdim=True) + mean.var(axes, correction=0, keepdim=True)
        mean = mean.mean(axes, keepdim=True)
    model.set_prior(mean, variance)


def fit_features(
    model: FisherTraceModel, config: TraceMatchingConfig, pieces: Iterable[Piece], space: SampleSpace
) -> None:
    """Sets mean and deviation of the denoiser's features at levels equally spaced in log(sigma/alpha).

    They are the same in every process. A sample has one noise for all levels, so that the statistics are smooth in the
    level.

    Cost: 48 evaluations of the denoiser per sample.

    Raises:
        NumericalError: the denoiser's output is not finite.
    """
    low, high = log_noise_to_signal_range(space.pipe.scheduler)
    levels = torch.linspace(low, high, FEATURE_LEVELS, dtype=torch.float64)
    features_by_level: list[list[torch.Tensor]] = [[] for _ in levels]
    for number, piece in enumerate(pieces):
        generator = step_generator(config.seed, "features", number)
        clean, denoiser = space.draw(piece.samples, generator), space.denoiser(piece.captions, piece.samples)
        noise = torch.randn(clean.shape, generator=generator)
        for level, rows in zip(levels, features_by_level, strict=True):
            features = noised_state(denoiser, clean, TraceDraw(level.expand(len(clean)), noise)).features
            assert features is not None  # a model with features is made by a denoiser that has some
            rows.append(features.double().cpu())
    values = torch.stack([torch.cat(rows) for rows in features_by_level])  # (levels, samples, features)
    model.set_feature_statistics(levels, values.mean(1), values.std(1, correction=0))
