"""A whole run's Jacobian from that of the denoiser at one noise level."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..arguments import check_kinds
from ..errors import InputError
from ..noise import DenoisingState, expand
from .direct import DirectOperator
from .estimator import FisherEstimator, check_estimator
from .finite_difference import FiniteDifferenceFisher


class OneStepFisher(FisherEstimator):
    """Replaces the run from one noise level on by a single step to the predicted clean sample.

    At every state the products are those of `DirectFisher`, which change only the scale of a reward's gradient on its
    way to the noise. At the noise the gradient is multiplied once by alpha dx_0/dx_t, the Jacobian of the predicted
    clean sample at the state nearest to `noise_to_signal`. The eigenvalues of this Jacobian say how far the model's
    images still vary at that level: directions in which images vary as a whole remain, and patterns that the model
    would remove do not.

    Cost: one product of `jacobian` per gradient, which is one denoiser call with the default.

    Args:
        jacobian: an estimator of the Jacobian at that state; None: `FiniteDifferenceFisher()`, which a pipeline's
            `guide` binds to its denoiser.
        noise_to_signal: sigma/alpha at that level. At 1 the noise has the variance of latents. Higher levels turn the
            gradient more and make the ascent along it slower.
    """

    uses_whole_run = True
    needs_graph = False  # Only `through_run` evaluates the denoiser; the operators do not.
    calls_per_state = 0
    calls_per_product = 0

    @check_kinds
    def __init__(self, jacobian: FisherEstimator | None = None, noise_to_signal: float = 1.0):
        if not (math.isfinite(noise_to_signal) and noise_to_signal > 0):
            raise InputError(f"`noise_to_signal` is {noise_to_signal}; allowed: above 0 and finite, such as 1.")
        self.jacobian = FiniteDifferenceFisher() if jacobian is None else check_estimator(jacobian)
        self.noise_to_signal = noise_to_signal

    @property
    def components(self) -> dict[str, FisherEstimator]:
        return {"jacobian": self.jacobian}

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> DirectOperator:
        return DirectOperator(state)

    def through_run(self, gradient: torch.Tensor, states: Sequence[DenoisingState]) -> torch.Tensor:
        """Returns the gradient at the noise times the Jacobian at one of the run's `states`."""
        state = min(states, key=self._distance)
        return expand(state.level.alpha, gradient) * self.jacobian(state).original_jacobian(gradient)

    def check_outputs(self, states: Sequence[DenoisingState]) -> None:
        """Compares the denoiser with the run's output at the one state where `jacobian` takes its product."""
        self.jacobian.check_outputs([min(states, key=self._distance)])

    def _distance(self, state: DenoisingState) -> float:
        ratio = state.level.noise_to_signal.double().log().mean()  # infinite at the ends of some schedules
        return abs(float(ratio) - math.log(self.noise_to_signal))
