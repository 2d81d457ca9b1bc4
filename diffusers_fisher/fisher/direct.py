"""The cheapest estimator: it takes the model output as a constant in the backward pass."""

import torch

from ..arguments import check_kinds
from ..noise import DenoisingState, expand
from .estimator import FisherEstimator
from .operator import JacobianOperator


class DirectFisher(FisherEstimator):
    """Takes the raw model output as a constant, so a reward's gradient reaches the noise without the network.

    For epsilon prediction this means F = 0, which is C = (sigma/alpha)^2 I. For models that predict x_0, a constant
    output would make the gradient vanish at the last step (C = 0). For them the velocity is the constant instead.

    Cost: no denoiser call beyond those of the run.
    """

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> "DirectOperator":
        return DirectOperator(state)


class DirectOperator(JacobianOperator):
    """See `DirectFisher`. All matrices are multiples of the identity."""

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        # x_0 = a x + b output, so the Jacobian is a times the identity if the output (or the velocity) is constant.
        level = self.state.level
        if self.state.prediction.kind == "sample":
            return expand(level.alpha / level.norm**2, v) * v
        return expand(self.state.prediction.original_coefficients(level)[0], v) * v

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        if self.state.prediction.kind == "sample":
            return super().epsilon_jacobian(v)
        return expand(self.state.prediction.epsilon_coefficients(self.state.level)[0], v) * v

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return self.original_jacobian(v) if self.state.prediction.kind == "sample" else torch.zeros_like(v)

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        sample = self.state.sample
        return expand(self._eigenvalue(), sample.double()).expand(sample.shape), 0

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return v / expand(self._eigenvalue() + shift, v)

    def _eigenvalue(self) -> torch.Tensor:
        """Returns the only eigenvalue of F, (B,) float64."""
        level, prediction = self.state.level, self.state.prediction
        if prediction.kind == "sample":
            return self._numbers(1 / level.norm**2)
        return self._numbers(prediction.epsilon_coefficients(level)[0] / level.sigma)
