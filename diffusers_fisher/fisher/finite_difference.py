"""Products with the model's Jacobian from differences of its outputs, without automatic differentiation."""

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import DenoisingState, expand
from .agreement import ModelFunction, model_function
from .estimator import FisherEstimator
from .numerics import dot
from .operator import ModelFisherOperator

RELATIVE_STEP = 0.01
RELATIVE_STEPS: dict[torch.dtype | None, float] = {torch.float16: 0.05, torch.bfloat16: 0.1}
"""Default lengths of differences relative to the sample, and those for networks of half precision."""


class FiniteDifferenceFisher(FisherEstimator):
    """Computes J v ~ (output(x + h v) - output(x))/h, with h |v| = `relative_step` |x| for each sample.

    Networks in half precision round their inputs. The difference of the rounded inputs is known, and its part along v
    takes the place of h.

    The Jacobian of a true score is symmetric, so this product takes the place of the product with the transposed
    Jacobian. A learned Jacobian is not quite symmetric, which limits how close the gradient comes to the exact one.

    Cost: one denoiser call per product (two with `central`), no graph.

    Args:
        denoiser: `PipelineDenoiser`, or any callable `(model_input, timestep) -> raw model output`. None: a pipeline's
            `guide` or `log_likelihood` binds its own.
        relative_step: length of the difference relative to the norm of the sample (to the norm of the noise for a
            sample of zeros). None: 0.01, for networks in float16 0.05 and in bfloat16 0.1, whose rounding hides
            shorter differences.
        central: take differences to both sides, which has an error of O(h^2) and costs twice the calls.
    """

    needs_denoiser = True

    @check_kinds
    def __init__(
        self,
        denoiser: Denoiser | ModelFunction | None = None,
        relative_step: float | None = None,
        central: bool = False,
    ):
        if relative_step is not None and not 0 < relative_step < 1:
            raise InputError(f"`relative_step` is {relative_step}; allowed: between 0 and 1, such as 1e-2, or None.")
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
        dtype = self.denoiser.input_dtype if isinstance(self.denoiser, Denoiser) else None
        step = self.relative_step if self.relative_step is not None else RELATIVE_STEPS.get(dtype, RELATIVE_STEP)
        return FiniteDifferenceOperator(state, model_function(self.denoiser), step, self.central, dtype)


class FiniteDifferenceOperator(ModelFisherOperator):
    """See `FiniteDifferenceFisher`. `dtype` is that to which the network rounds its inputs; None: it does not."""

    def __init__(
        self, state: DenoisingState, function: ModelFunction, relative_step: float, central: bool,
        dtype: torch.dtype | None = None,
    ):  # fmt: skip
        super().__init__(state)
        self._function = function
        self._relative_step = relative_step
        self._central = central
        self._dtype = dtype
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
        ends = sample + expand(step, v) * v, sample - expand(step, v) * v if self._central else sample
        forward = self._evaluate(ends[0])
        backward = self._evaluate(ends[1]) if self._central else self.state.model_output.to(forward.dtype)
        if self._dtype in RELATIVE_STEPS:
            rounded = self._rounded(ends[0]) - self._rounded(ends[1])
            # A step too short for the precision leaves no difference; it is 1 below, and the product 0.
            step = (dot(rounded, v) / dot(v, v).clamp_min(torch.finfo(v.dtype).tiny)).to(step.dtype).to(step.device)
        else:
            step = (1 + self._central) * step
        step = expand(step, v)
        return torch.where(step > 0, (forward - backward) / torch.where(step > 0, step, 1), 0)  # J 0 = 0, not 0/0

    def _rounded(self, sample: torch.Tensor) -> torch.Tensor:
        """Returns the sample as the network sees it."""
        scale = expand(self.state.input_scale, sample)
        return (scale * sample).to(self._dtype).to(sample.dtype) / scale

    def _evaluate(self, sample: torch.Tensor) -> torch.Tensor:
        output = self._function(expand(self.state.input_scale, sample) * sample, self.state.timestep)
        return output.to(sample.dtype)
