"""Fits a Fisher that knows the noise level alone to mean squared errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.level import LevelFisher
from ..likelihood.draws import ImageDraws
from ..likelihood.problem import check_samples
from ..likelihood.schemes import noise_grid
from ..noise import expand, log_noise_to_signal_range, timestep_at
from .draws import antithetic_noise


@check_kinds
def fit_level_fisher(
    denoiser: Denoiser, samples: torch.Tensor, num_levels: int = 40, num_pairs: int = 1,
    generator: Generators = None, keys: Sequence[str] | None = None,
) -> LevelFisher:  # fmt: skip
    """Makes a `LevelFisher` of the denoiser's mean squared errors |eps - eps_theta|^2/d over `samples` (B, ...).

    For a perfect denoiser they are r. Cost: `num_levels` * 2 `num_pairs` evaluations.

    Args:
        samples: clean samples in the model's coordinates, other ones than those that the table shall serve for,
            but of the same kind. For `likelihood_bound` these are the means of the encoder's posterior; around
            latents that are drawn from it there is more noise to explain.
        num_levels: number of levels, at least 2.
        num_pairs: number of pairs of a noise and its negative, per level and sample.

        generator: gives the seed of the noise, which is a function of the seed and of the sample's key alone.
        keys: one key per sample; None: a key of its values.

    Raises:
        InputError: samples that are not finite; fewer than two levels or one pair.
        NumericalError: squared errors that are not finite.
    """
    if num_levels < 2 or num_pairs < 1:
        raise InputError(f"`num_levels` is {num_levels}, `num_pairs` {num_pairs}; allowed: at least 2, at least 1.")
    samples = check_samples(samples)
    draws, start = ImageDraws(samples, generator, keys), samples.cpu().double()
    grid = noise_grid(*log_noise_to_signal_range(denoiser.scheduler), num_levels - 1)
    errors = torch.zeros(num_levels, dtype=torch.float64)
    for index, timestep in enumerate(timestep_at(denoiser.scheduler, grid)):
        for noise in antithetic_noise(draws, 2 * num_pairs, f"{float(grid[index]):.9f}"):
            with torch.no_grad():
                level = denoiser.level(timestep)
                x = expand(level.alpha, start) * start + expand(level.sigma, start) * noise
                state = denoiser.state(x.to(samples.dtype).to(samples.device), timestep.to(torch.float32))
            errors[index] += (noise - state.epsilon.cpu().double()).square().mean() / (2 * num_pairs)
    if not torch.isfinite(errors).all():
        raise NumericalError(f"Squared errors by level are not finite: {errors.tolist()}.")
    return LevelFisher(grid.exp(), errors)
