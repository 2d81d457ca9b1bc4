"""The paper's endpoint approximation (DF-EA): the run's clean end takes the place of the data."""

import torch

from ..arguments import check_kinds
from ..errors import InputError, check_shape
from ..noise import DenoisingState, expand
from .estimator import FisherEstimator
from .numerics import dot
from .operator import FisherOperator


class EndpointFisher(FisherEstimator):
    """Computes the posterior covariance from the run's endpoint x_0 (Wang et al., ICML 2025, section 4, DF-EA).

    `centred=False` is the paper's form, C v = x_0 <x_0, v> - m <m, v> with m = E[x_0|x_t] of the model. It is
    indefinite, with eigenvalues +-|x_0||x_0 - m| in the span of x_0 and m. For this reason its products through a
    whole run grow exponentially in the number of steps: use only the direction of the gradient.
    `centred=True` is C v = (x_0 - m) <x_0 - m, v>. It has the same expectation and a far smaller variance, and it is
    positive.

    Cost: no denoiser call beyond those of the run.

    Raises:
        InputError: the endpoint is missing or has another shape, or the model predicts noise and alpha is 0, where
            the noise does not determine m.
    """

    @check_kinds
    def __init__(self, centred: bool = False):
        self.centred = centred

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> "EndpointOperator":
        if endpoint is None:
            raise InputError(
                "EndpointFisher needs the clean end of the run: EndpointFisher()(state, endpoint=x0), x0 of the "
                "sample's shape. Inside `scheduler.differentiable(...)` it is put in."
            )
        check_shape("The endpoint", endpoint.shape, state.sample.shape, "Pass one clean sample per noisy sample.")
        return EndpointOperator(state, endpoint, self.centred)


class EndpointOperator(FisherOperator):
    """See `EndpointFisher`."""

    def __init__(self, state: DenoisingState, endpoint: torch.Tensor, centred: bool):
        super().__init__(state)
        if not all(torch.isfinite(value).all() for value in state.prediction.original_coefficients(state.level)):
            raise InputError(
                "At a noise level with alpha = 0 the endpoint forms need E[x_0|x_t], which predicted noise does not "
                f"tell there (prediction type '{state.prediction.kind}'). Start the run at a smaller noise, use a "
                "model of v_prediction or sample, or another estimator, such as DirectFisher()."
            )
        mean = state.pred_original_sample
        endpoint = endpoint.to(mean.dtype)
        self._terms = [(1.0, endpoint - mean)] if centred else [(1.0, endpoint), (-1.0, mean)]

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return torch.stack([sign * vector * expand(dot(vector, v), v) for sign, vector in self._terms]).sum(0)

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        level = self.state.level
        squares = torch.stack([sign * vector.double().square() for sign, vector in self._terms]).sum(0)
        return 1 / expand(level.sigma**2, squares) - expand(level.alpha**2 / level.sigma**4, squares) * squares, 0

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Uses Woodbury's formula, (a I + U D U^T)^-1 = (I - U (a D^-1 + U^T U)^-1 U^T)/a."""
        level = self.state.level
        identity = self._numbers(1 / level.sigma**2) + shift
        weight = self._numbers(-(level.alpha**2) / level.sigma**4)
        vectors = torch.stack([vector for _, vector in self._terms], 1).double().flatten(2)  # (B, terms, d)
        signs = torch.tensor([sign for sign, _ in self._terms], dtype=torch.float64)
        core = torch.diag_embed((identity / weight)[:, None] / signs).to(vectors.device) + vectors @ vectors.mT
        column = v.double().flatten(1)[..., None]
        inner = vectors.mT @ torch.linalg.solve_ex(core, vectors @ column).result  # not finite where F is singular
        return ((column - inner)[..., 0] / identity.to(column.device)[:, None]).to(v.dtype).view_as(v)
