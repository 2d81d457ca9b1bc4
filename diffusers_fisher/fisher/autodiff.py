"""Exact products with the model's own Jacobian, by automatic differentiation through the denoiser."""

import torch

from ..errors import InputError
from ..noise import expand
from ..state import DenoisingState
from .operator import ModelFisherOperator


class AutodiffFisher:
    """The reference estimator: vector-Jacobian products through the denoiser.

    Cost: one forward evaluation with a graph a state, then one backward pass a product; memory is the denoiser's
    activations.

    A state whose output already carries a graph to its sample is used as it is, without another evaluation.

    Args:
        denoiser: `PipelineDenoiser`, or any callable `(model_input, timestep) -> raw model output` that autograd can
            differentiate. None: a pipeline's `guide` or `log_likelihood` puts in its own.
    """

    needs_graph = True  # callers that evaluate the state themselves may do so with a graph

    def __init__(self, denoiser=None):
        self.denoiser = denoiser

    def bind(self, denoiser) -> "AutodiffFisher":
        """The same estimator with `denoiser` where none was given."""
        return self if self.denoiser is not None else AutodiffFisher(denoiser)

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> "AutodiffOperator":
        if state.sample.requires_grad and state.model_output.requires_grad:
            return AutodiffOperator(state, None)
        return AutodiffOperator(state, model_output_function(self.denoiser))


class AutodiffOperator(ModelFisherOperator):
    """See `AutodiffFisher`. The graph is built at the first product and lives as long as the operator."""

    def __init__(self, state: DenoisingState, function):
        super().__init__(state)
        self._function = function
        self._graph = (state.sample, state.model_output) if function is None else None
        self.calls_per_state = 0 if function is None else 1

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        leaf, output = self._build()
        (product,) = torch.autograd.grad(output, leaf, v.to(output.dtype), retain_graph=True)
        return product.to(v.dtype)

    def _build(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._graph is None:
            with torch.enable_grad():
                leaf = self.state.sample.detach().requires_grad_()
                output = self._function(expand(self.state.input_scale, leaf) * leaf, self.state.timestep)
            if not output.requires_grad:
                raise InputError(
                    "The denoiser's output does not depend on its input for autograd; AutodiffFisher needs a denoiser "
                    "that is differentiable (not under no_grad, inference_mode or compiled without grad). Use "
                    "FiniteDifferenceFisher, which needs none."
                )
            self._graph = leaf, output
        return self._graph


def model_output_function(denoiser):
    """`denoiser.model_output`, or the denoiser itself where it is a plain function."""
    if denoiser is None:
        raise InputError(
            "The estimator has no denoiser; give it one, such as AutodiffFisher(PipelineDenoiser(pipe, prompt=...)), "
            "or pass it to a pipeline's `guide` or `log_likelihood`, which put in their own."
        )
    return getattr(denoiser, "model_output", denoiser)
