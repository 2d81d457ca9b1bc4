"""A Fisher that knows the noise level alone, from a table of mean squared errors."""

from __future__ import annotations

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.estimator import FisherEstimator
from ..fisher.operator import FisherOperator
from ..likelihood.draws import ImageDraws
from ..likelihood.problem import check_samples
from ..likelihood.schemes import noise_grid
from ..noise import DenoisingState, expand, log_noise_to_signal_range, timestep_at
from .draws import antithetic_noise


class LevelFisher(FisherEstimator):
    """Makes F = (1 - r) I/sigma^2 with an unexplained noise fraction r that depends on the noise level alone.

    Between the table's levels r is linear in log(sigma/alpha); outside of them it is that of the nearest level.

    Args:
        noise_to_signal: (n,) sigma/alpha, increasing.
        unexplained_noise_fraction: (n,) r at these levels, finite.
    """

    @check_kinds
    def __init__(self, noise_to_signal: torch.Tensor, unexplained_noise_fraction: torch.Tensor):
        levels, fractions = (each.detach().double().cpu() for each in (noise_to_signal, unexplained_noise_fraction))
        increasing = levels.ndim == 1 and len(levels) > 0 and bool((levels > 0).all() and (levels.diff() > 0).all())
        if not increasing or fractions.shape != levels.shape or not torch.isfinite(fractions).all():
            raise InputError(
                f"The table has levels {tuple(levels.shape)} and fractions {tuple(fractions.shape)}; allowed: (n,) "
                "positive increasing levels, and as many finite fractions."
            )
        self.noise_to_signal, self.unexplained_noise_fraction = levels, fractions

    @classmethod
    @check_kinds
    def from_squared_errors(
        cls, denoiser: Denoiser, samples: torch.Tensor, num_levels: int = 40, num_pairs: int = 1,
        generator: Generators = None,
    ) -> LevelFisher:  # fmt: skip
        """Makes the table of the denoiser's mean squared errors |eps - eps_theta|^2/d over `samples` (B, ...).

        For a perfect denoiser they are r. Cost: `num_levels` * 2 `num_pairs` evaluations.

        Args:
            samples: clean samples in the model's coordinates, other ones than those that the table shall serve for,
                but of the same kind. For `likelihood_bound` these are the means of the encoder's posterior; around
                latents that are drawn from it there is more noise to explain.
            num_levels: number of levels, at least 2.
            num_pairs: number of pairs of a noise and its negative, per level and sample.

        Raises:
            InputError: samples that are not finite; fewer than two levels or one pair.
            NumericalError: squared errors that are not finite.
        """
        if num_levels < 2 or num_pairs < 1:
            raise InputError(
                f"`num_levels` is {num_levels}, `num_pairs` {num_pairs}; allowed: at least 2, at least 1."
            )
        samples = check_samples(samples)
        draws, start = ImageDraws(samples, generator), samples.cpu().double()
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
        return cls(grid.exp(), errors)

    @property
    def default_num_probes(self) -> None:
        return None

    @property
    def description(self) -> str:
        return "table by noise level"

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> LevelOperator:
        log_s, nodes = state.level.log_noise_to_signal.cpu(), self.noise_to_signal.log()
        upper = torch.searchsorted(nodes, log_s).clamp(1, max(len(nodes) - 1, 1))
        if len(nodes) == 1:
            return LevelOperator(state, self.unexplained_noise_fraction[0].expand(log_s.shape))
        low, high = (self.unexplained_noise_fraction[index] for index in (upper - 1, upper))
        share = ((log_s - nodes[upper - 1]) / (nodes[upper] - nodes[upper - 1])).clamp(0, 1)
        return LevelOperator(state, low + share * (high - low))


class LevelOperator(FisherOperator):
    """See `LevelFisher`."""

    def __init__(self, state: DenoisingState, fraction: torch.Tensor):
        super().__init__(state)
        self._fraction = fraction  # r, () or (B,)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        return expand(self._fraction * self.state.level.noise_to_signal.cpu().square(), v) * v

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        value = (1 - self._fraction) / self.state.level.sigma.cpu().square()
        ones = torch.ones(self.state.sample.shape, dtype=torch.float64)
        return expand(value, ones) * ones, 0
