"""Likelihood by squared errors of the denoiser alone: no ODE, no trace, no graph.

Notation: s = sigma/alpha, u = log s. By the pointwise I-MMSE relation (Kong et al., 2302.03792, eq. 6, between two
finite noise levels), with x~_s = x + s eps and the perfect denoiser,
E log p~_{s_0}(x~_{s_0}) = E log p~_{s_T}(x~_{s_T}) + integral over u of (d - E|eps - eps_theta(x~_s, s)|^2),
expectations over eps at the given x. It is the ODE's formula with the mean squared error in the place of d r. With a
learned denoiser the two differ by how far it is from the perfect one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..noise import expand, log_noise_to_signal_range, timestep_at
from .bins import dequantised, offset_bits
from .output import SquaredErrorOutput
from .prior import check_prior
from .problem import check_samples, prior_name, standard_noise

CROSSOVER = 0.3
"""Noise-to-signal about which r falls from one to zero for usual data. Below it the squared error is most of the
noise's own |eps|^2, and varies most. It only decides the variance: see `_levels` and `_share`."""


@check_kinds
def squared_error_log_likelihood(
    denoiser: Denoiser,
    samples: torch.Tensor,
    num_levels: int = 64,
    prior_mean: torch.Tensor | float | None = None,
    prior_variance: torch.Tensor | float | None = None,
    generator: torch.Generator | None = None,
    space: str = "latent",
    on_step: Callable[[], object] = lambda: None,
    bins: int | None = None,
    prior_basis: str = "pixel",
) -> SquaredErrorOutput:
    """Estimates the mean log-likelihood of noised `samples` (B, ...), to check that of the ODE with `noised=True`.

    Every level is drawn from its own part of the noise range (stratified, denser where the error varies most); levels
    and noises are the same for all samples of the batch, and for every call with an equal generator, so differences
    have less variance than either side. Accumulated in float64. Cost: `num_levels` evaluations, no graph.

    Args:
        denoiser: denoiser at guidance scale 1.
        samples: clean samples in the model's coordinates, finite; half precision becomes float32.
        num_levels: number of draws, even, at least 4: the standard error comes from pairs of neighbours, and errs
            upwards.
        prior_mean, prior_variance, prior_basis, space, on_step, bins: as in `Integration`.
        generator: draws the levels, the noises, then the places in the bins.

    Raises:
        InputError: an odd or small number of levels; else as `log_likelihood`.
        NumericalError: a result that is not finite.
    """
    if num_levels < 4 or num_levels % 2:
        raise InputError(f"`num_levels` is {num_levels}; allowed: even, at least 4, sensibly 32 or more.")
    samples = check_samples(samples)
    gaussian = check_prior(samples.shape[1:], prior_mean, prior_variance, prior_basis)
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    levels, weights = _levels(num_levels, low, high, generator)
    noises = [standard_noise(samples[:1], generator) for _ in range(num_levels)]
    start = samples.cpu().double() if bins is None else dequantised(samples.cpu(), bins, generator)
    timesteps, before = timestep_at(denoiser.scheduler, levels), denoiser.num_calls
    dimensions, rows = samples[0].numel(), []
    for log_s, timestep, noise in zip(levels, timesteps, noises, strict=True):
        with torch.no_grad():
            level = denoiser.level(timestep)
            sample = expand(level.alpha, start) * start + expand(level.sigma, start) * noise
            sample = sample.to(samples.dtype).to(samples.device)
            epsilon = denoiser.state(sample, timestep.to(torch.float32)).epsilon
        error = (noise - epsilon.cpu().double()).square().flatten(1).sum(1)
        # A control variate: |eps|^2 - d has mean zero, and r^2 of it is in the squared error.
        rows.append(dimensions - error + _share(log_s).square() * (noise.square().sum() - dimensions))
        on_step()
    end = gaussian.mean_log_density(start, math.exp(high))
    contributions = end + weights[:, None] * torch.stack(rows)  # the mean of the latter is the integral
    if not torch.isfinite(contributions).all():
        raise NumericalError(f"Squared errors are not finite; contributions by level: {contributions.tolist()}.")
    return SquaredErrorOutput(
        log_prob=contributions.mean(0), standard_error=stratified_error(contributions), contributions=contributions,
        noise_to_signal=levels.exp(), smoothing=math.exp(low), dims=dimensions,
        num_denoiser_calls=denoiser.num_calls - before, space=space,
        prior=prior_name(prior_mean, prior_basis), density="noised, mean",
        offset_bits=offset_bits(bins), guidance_scale=denoiser.embedded_guidance_scale,
    )  # fmt: skip


def stratified_error(contributions: torch.Tensor) -> torch.Tensor:
    """Returns the standard error of the mean over (n, ...) draws from n neighbouring strata, by pairs of neighbours.

    A pair's difference holds the variance of both and the difference of their means, so this errs upwards.
    """
    pairs = contributions.unflatten(0, (-1, 2))
    return (pairs[:, 0] - pairs[:, 1]).square().sum(0).sqrt() / len(contributions)


def _levels(
    count: int, low: float, high: float, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws log s (n,), one from each of n parts of equal probability, and returns the inverse density there too."""
    grid = torch.linspace(low, high, 4097, dtype=torch.float64)
    cumulative = torch.nn.functional.pad(torch.cumulative_trapezoid(0.25 + _share(grid), grid), (1, 0))
    device = "cpu" if generator is None else generator.device
    uniform = torch.rand(count, generator=generator, dtype=torch.float64, device=device).cpu()
    quantiles = (torch.arange(count) + uniform) / count * cumulative[-1]
    upper = torch.searchsorted(cumulative, quantiles).clamp(1, len(grid) - 1)
    share = (quantiles - cumulative[upper - 1]) / (cumulative[upper] - cumulative[upper - 1])
    levels = grid[upper - 1] + share * (grid[upper] - grid[upper - 1])
    return levels, cumulative[-1] / (0.25 + _share(levels))


def _share(log_s: torch.Tensor) -> torch.Tensor:
    """Returns r of Gaussian data with standard deviation `CROSSOVER`."""
    return torch.sigmoid(2 * (math.log(CROSSOVER) - log_s))
