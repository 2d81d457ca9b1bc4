"""A Fisher that knows the noise level alone."""

from __future__ import annotations

import torch

from ..arguments import check_kinds
from ..errors import InputError
from ..noise import DenoisingState, expand
from .estimator import FisherEstimator
from .operator import FisherOperator


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

    @property
    def default_num_probes(self) -> None:
        return None

    @property
    def description(self) -> str:
        return "table by noise level"

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> LevelOperator:
        return LevelOperator(state, self.fraction_at(state.level.log_noise_to_signal.cpu()))

    def fraction_at(self, log_noise_to_signal: torch.Tensor) -> torch.Tensor:
        """Returns r at log(sigma/alpha), in the shape of the argument, float64 on the CPU."""
        nodes = self.noise_to_signal.log()
        if len(nodes) == 1:
            return self.unexplained_noise_fraction[0].expand(log_noise_to_signal.shape)
        upper = torch.searchsorted(nodes, log_noise_to_signal).clamp(1, len(nodes) - 1)
        low, high = (self.unexplained_noise_fraction[index] for index in (upper - 1, upper))
        share = (log_noise_to_signal - nodes[upper - 1]) / (nodes[upper] - nodes[upper - 1])
        return low + share.clamp(0, 1) * (high - low)


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
