"""The paper's endpoint approximation (DF-EA): one outer product of the run's clean end stands in for the data's."""

import torch

from ..errors import InputError
from ..state import DenoisingState
from .operator import FisherOperator


class EndpointFisher:
    """Posterior covariance from the run's endpoint x_0 (Wang et al., ICML 2025, section 4, DF-EA).

    `centred=False` is the paper's form, C v = x_0 <x_0, v> - m <m, v> with m = E[x_0|x_t] of the model. It is
    indefinite, with eigenvalues +-|x_0||x_0 - m| in the span of x_0 and m, so its products through a whole run grow
    exponentially in the number of steps: use only the direction of the resulting gradient.
    `centred=True` is C v = (x_0 - m) <x_0 - m, v>: the same expectation, positive, far smaller variance.

    Cost: nothing beyond the run itself.
    """

    def __init__(self, centred: bool = False):
        self.centred = centred

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> "EndpointOperator":
        if endpoint is None:
            raise InputError(
                "EndpointFisher needs the clean end of the run: EndpointFisher()(state, endpoint=x0), x0 of the "
                "sample's shape. Inside `scheduler.differentiable(...)` it is put in."
            )
        if endpoint.shape != state.sample.shape:
            raise InputError(
                f"The endpoint has shape {tuple(endpoint.shape)}, the sample {tuple(state.sample.shape)}; they must "
                "agree."
            )
        return EndpointOperator(state, endpoint, self.centred)


class EndpointOperator(FisherOperator):
    """See `EndpointFisher`."""

    def __init__(self, state: DenoisingState, endpoint: torch.Tensor, centred: bool):
        super().__init__(state)
        mean = state.pred_original_sample
        endpoint = endpoint.to(mean.dtype)
        self._terms = [(1.0, endpoint - mean)] if centred else [(1.0, endpoint), (-1.0, mean)]

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        products = [sign * vector * _inner(vector, v) for sign, vector in self._terms]
        return torch.stack(products).sum(0)

    def _exact_trace(self) -> tuple[torch.Tensor, int]:
        squares = [sign * vector.double().flatten(1).square().sum(1) for sign, vector in self._terms]
        return self._trace_of_covariance(torch.stack(squares).sum(0)), 0


def _inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left * right).flatten(1).sum(1).reshape(-1, *[1] * (left.ndim - 1))
