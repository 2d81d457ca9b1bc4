"""Products with the model's Jacobian from differences of its outputs, without automatic differentiation."""

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import DenoisingState, expand
from .estimator import FisherEstimator, ModelFunction, model_function
from .operator import ModelFisherOperator


class FiniteDifferenceFisher(FisherEstimator):
    """Computes J v ~ (output(x + h v) - output(x))/h, with h |v| = `relative_step` |x| for each sample.

    The Jacobian of a true score is symmetric, so this product takes the place of the product with the transposed
    Jacobian. A learned Jacobian is not quite symmetric, which limits how close the gradient comes to the exact one.

    Cost: one denoiser call per product (two with `central`), no graph.

    Args:
        denoiser: `PipelineDenoiser`, or any callable `(model_input, timestep) -> raw model output`. None: a pipeline's
            `guide` or `log_likelihood` binds its own.
        relative_step: length of the difference relative to the norm of the sample (to the norm of the noise for a
            sample of zeros). The default suits float32 networks, 0.05 float16 networks and 0.1 bfloat16 networks.
        central: take differences to both sides, which has an error of O(h^2) and costs twice the calls.
    """

    needs_denoiser = True

    @check_kinds
    def __init__(
        self, denoiser: Denoiser | ModelFunction | None = None, relative_step: float = 1e-2, central: bool = False
    ):
        if not 0 < relative_step < 1:
            raise InputError(f"`relative_step` is {relative_step}; allowed: between 0 and 1, such as 1e-2.")
        self.denoiser = denoiser
        self.relative_step = relative_step
        self.central = central

    @property
    def calls_per_product(self) -> int:
        return 2 if self.central else 1

    def without_model_output(self) -> "FiniteDifferenceFisher":
        return self if self.central else self.replace(central=True)

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> "FiniteDifferenceOperator":
        return FiniteDifferenceOperator(state, model_function(self.denoiser), self.relative_step, self.central)


class FiniteDifferenceOperator(ModelFisherOperator):
    """See `FiniteDifferenceFisher`."""

    def __init__(self, state: DenoisingState, function: ModelFunction, relative_step: float, central: bool):
        super().__init__(state)
        self._function = function
        self._relative_step = relative_step
        self._central = central
        self.calls_per_product = 2 if central else 1

    @torch.no_grad()
    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        sample = self.state.sample
        norms = torch.linalg.vector_norm(v.flatten(1), dim=1)
        size = torch.linalg.vector_norm(sample.flatten(1), dim=1)
        noise = expand(self.state.level.sigma, size) * sample[0].numel() ** 0.5
        lengths = self._relative_step * torch.where(size > 0, size, noise)
        step = torch.where(norms > 0, lengths / norms.clamp_min(torch.finfo(v.dtype).tiny), torch.zeros_like(norms))
        step = expand(step, v)
        forward = self._evaluate(sample + step * v)
        if self._central:
            difference = (forward - self._evaluate(sample - step * v)) / 2
        else:
            difference = forward - self.state.model_output.to(forward.dtype)
        return torch.where(step > 0, difference / torch.where(step > 0, step, 1), 0)  # J 0 = 0, not 0/0

    def _evaluate(self, sample: torch.Tensor) -> torch.Tensor:
        output = self._function(expand(self.state.input_scale, sample) * sample, self.state.timestep)
        return output.to(sample.dtype)
