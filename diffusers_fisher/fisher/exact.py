"""The exact Fisher of a known distribution, in closed form."""

from __future__ import annotations

import torch

from ..arguments import check_kinds
from ..distributions import Distribution, Posterior
from ..noise import DenoisingState, expand
from .estimator import FisherEstimator
from .operator import FisherOperator


class ExactFisher(FisherEstimator):
    """Computes F of a distribution in closed form, the truth that other estimators are compared with.

    The estimator uses the state's sample and noise level, in any scheduler's coordinates, and not the model's output.
    It works at alpha = 0.

    Cost: one posterior of the distribution per state, one product with its covariance per product, no denoiser call.

    Args:
        distribution: `GaussianMixture`, `DiracMixture`, or another `Distribution`.
    """

    @check_kinds
    def __init__(self, distribution: Distribution):
        self.distribution = distribution

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> ExactOperator:
        """Returns F at `state`. Raises `InputError` for another shape, half precision or a level without noise."""
        return ExactOperator(state, self.distribution.posterior(state.sample.detach(), state.level))


class ExactOperator(FisherOperator):
    """See `ExactFisher`. F and C have formulas of their own: each cancels in the other at one end of the levels."""

    chunk_size = 32

    def __init__(self, state: DenoisingState, posterior: Posterior):
        super().__init__(state)
        self.posterior = posterior

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return self.posterior.covariance(v)

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return expand(self.state.level.sigma, v) * self.matvec(v)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return self.posterior.fisher(v)

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        return self.posterior.fisher(vectors)

    def dense(self) -> torch.Tensor:
        return self.posterior.fisher_matrix()

    def exact_trace(self) -> tuple[torch.Tensor, int]:
        return self.posterior.fisher_trace(), 0

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        return self.posterior.fisher_diagonal(), 0

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        return self.posterior.inverse_fisher(v, shift)
