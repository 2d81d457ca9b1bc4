"""A reverse chain of Gaussian steps, and the bound that it makes: the sum of its terms over random states."""

from __future__ import annotations

import abc
from collections.abc import Callable

import torch

from ..denoiser import Denoiser
from ..errors import NumericalError
from ..likelihood.draws import ImageDraws
from .draws import antithetic_noise, draws_error
from .output import LikelihoodBound


class Chain(abc.ABC):
    """A reverse chain of Gaussian steps from noise to the data, and the terms of its bound.

    Attributes:
        denoiser, draws: evaluates the states, and makes their noise.
        noise_to_signal: (steps + 1,) float64, sigma/alpha of the states, increasing; the first is that of the data.
        space, density, prior, variance, offset_bits: those of `LikelihoodBound`.
    """

    denoiser: Denoiser
    draws: ImageDraws
    noise_to_signal: torch.Tensor
    space: str
    density: str
    prior: str
    variance: str
    offset_bits: float = 0.0

    @abc.abstractmethod
    def prior_terms(self) -> torch.Tensor:
        """Returns the divergence of the noise end from the prior, (B, ...) nats by element."""

    @abc.abstractmethod
    def step_terms(self, step: int, noise: torch.Tensor, draw: int) -> torch.Tensor:
        """Returns the terms of one step at one draw of the state that it starts from, (B, ...) nats by element.

        Args:
            step: index of the step; 0 is the one that ends at the data.
            noise: (B, ...) float64, noise of the state.
            draw: index of the draw.
        """

    def clamped_share(self) -> torch.Tensor:
        """Returns the share of the values that were clamped so far, (B,)."""
        return torch.zeros(len(self.prior_terms()), dtype=torch.float64)


def sum_chain(
    chain: Chain, num_draws: int, maps: bool, on_step: Callable[[], object] = lambda: None
) -> LikelihoodBound:
    """Returns the bound: the chain's terms, averaged over the draws and summed over the steps.

    Args:
        num_draws: number of noises per level, see `antithetic_noise`.
        maps: whether to keep the parts by element.
        on_step: called after every evaluation.

    Raises:
        NumericalError: a bound that is not finite.
    """
    total, before, count, rows = chain.prior_terms(), chain.denoiser.num_calls, num_draws, []
    prior = total.flatten(1).sum(1)
    for step, log_noise in enumerate(chain.noise_to_signal[1:].log().tolist()):
        # Rounded, because another way to the same grid may differ in the last digits.
        for draw, noise in enumerate(antithetic_noise(chain.draws, count, f"{log_noise:.9f}")):
            terms = chain.step_terms(step, noise, draw)
            total = total + terms / count
            rows.append(terms.flatten(1).sum(1))
            on_step()
    by_draw = torch.stack(rows).unflatten(0, (-1, count))
    value = prior + by_draw.mean(1).sum(0)
    if not torch.isfinite(value).all():
        raise NumericalError(f"Bounds are not finite: {value.tolist()}; terms by step: {by_draw.mean(1).tolist()}.")
    return LikelihoodBound(
        value, draws_error(by_draw, total[0].numel()), prior, by_draw, chain.noise_to_signal, chain.clamped_share(),
        dims=total[0].numel(), num_denoiser_calls=chain.denoiser.num_calls - before, space=chain.space,
        density=chain.density, prior=chain.prior, variance=chain.variance, offset_bits=chain.offset_bits,
        maps=total if maps else None,
    )  # fmt: skip


def divergence(ratio: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Returns KL(N(a, v_1) || N(b, v_2)) in one dimension, nats, from v_1/v_2 and (a - b)^2/v_2."""
    return (ratio - 1 - ratio.log() + distance) / 2
