"""Antithetic noise with stratified lengths, and the error that it leaves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy
import scipy.stats
import torch

from ..errors import InputError
from ..likelihood.draws import ImageDraws
from ..likelihood.traces import level_error


def antithetic_noise(draws: ImageDraws, count: int, place: str) -> Iterator[torch.Tensor]:
    """Yields `count` standard normal noises, (B, ...) float64 on the CPU, each followed by its negative.

    A single noise has no negative. The lengths of the n = count/2 pairs are stratified: the probability that a normal
    vector is shorter lies between i/n and (i + 1)/n for pair i. So the mean over all draws is unbiased, and neither
    the direction's sign nor, for many pairs, the length adds to its variance.

    Args:
        place: name of the noise level, on which the noise depends beside the seed, the image and the draw.
    """
    strata = max(count // 2, 1)
    for stratum in range(strata):
        noise = _of_stratum(draws.normal("bound", place, stratum), stratum, strata)
        yield noise
        if count > 1:
            yield -noise


def _of_stratum(noise: torch.Tensor, stratum: int, strata: int) -> torch.Tensor:
    """Rescales noise (B, ...) to a length in its stratum. Its own length gives the place there."""
    law = scipy.stats.chi2(noise[0].numel())
    squares = noise.flatten(1).square().sum(1)
    target = law.ppf((stratum + law.cdf(squares.numpy())) / strata)
    factor = (torch.from_numpy(target) / squares).sqrt()
    return factor.view(-1, *[1] * (noise.ndim - 1)) * noise


def draws_error(terms: torch.Tensor, dims: int) -> torch.Tensor:
    """Returns the standard error (B,) of the sum over steps of the mean over draws of `antithetic_noise`.

    Each step's variance is that of the pairs about a line in their stratum's mean squared length, because the strata
    have taken out what the line takes out. With a single pair the variance is that of neighbouring steps. Both err
    upwards: the first by up to a quarter with four pairs and a tenth with eight, the second by much; of fewer than
    three steps it is infinite.

    Args:
        terms: (steps, draws, B), independent between steps.
        dims: dimensions of one sample.
    """
    pairs = terms if terms.shape[1] == 1 else terms.unflatten(1, (-1, 2)).mean(2)
    strata = pairs.shape[1]
    if strata == 1 and len(pairs) < 3:
        return torch.full_like(pairs[0, 0], torch.inf)
    if strata == 1:
        return level_error(pairs, torch.ones(len(pairs), dtype=pairs.dtype))
    # The mean of a chi-squared number below its quantile q is d times the distribution function of d + 2 at q.
    edges = scipy.stats.chi2(dims).ppf(numpy.arange(strata + 1) / strata)
    centres = torch.from_numpy(numpy.diff(scipy.stats.chi2(dims + 2).cdf(edges)))
    centres = (centres - centres.mean()) / (centres - centres.mean()).norm()
    rest = pairs - pairs.mean(1, keepdim=True)
    rest = rest - centres[:, None] * torch.einsum("n,snb->sb", centres, rest)[:, None]
    # The line follows the outer pairs: where all variances are equal, a squared residual is the share 1 - leverage of
    # the pair's variance, and it is less in the outer strata, whose lengths vary most.
    leverage = 1 / strata + centres.square()
    return torch.einsum("n,snb->b", (1 - leverage) ** -1.5, rest.square()).sqrt() / strata


def check_draws(num_draws: int) -> None:
    """Raises `InputError` unless the number of noises per level has a standard error: 1, 2, or even and at least 6."""
    if num_draws not in (1, 2) and (num_draws < 6 or num_draws % 2):
        raise InputError(
            f"`num_draws` is {num_draws}; allowed: 1, 2, or an even number from 6 on, for pairs of a noise and its "
            "negative."
        )
