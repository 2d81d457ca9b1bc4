"""Exact products with the model's own Jacobian, by automatic differentiation through the denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, UnsupportedError
from ..noise import DenoisingState, expand
from .agreement import ModelFunction, check_output, model_function
from .estimator import FisherEstimator
from .operator import FisherOperator, ModelFisherOperator

OutputCheck = Callable[[torch.Tensor], None]


class AutodiffFisher(FisherEstimator):
    """The reference estimator: products with the model's Jacobian by automatic differentiation.

    By default it takes vector-Jacobian products (J^T v, reverse mode): one forward evaluation with a graph per state,
    then one backward pass per product, and the memory of the denoiser's activations. With `forward_mode` it takes
    Jacobian-vector products (J v): one evaluation per product, at about twice the cost of an ordinary one, without a
    graph. Networks in channels_last have no forward mode, because torch has no forward derivative of group norm there.
    A learned Jacobian is not quite symmetric, so the two modes differ; `operator.symmetrised()` is their mean.

    A state whose output already carries a graph to its sample is used as it is, without another evaluation.

    Args:
        denoiser: `PipelineDenoiser`, or any callable `(model_input, timestep) -> raw model output` that autograd can
            differentiate. None: a pipeline's `guide` or `log_likelihood` binds its own.
        forward_mode: take J v instead of J^T v.
        chunk_size: number of vectors per batched backward pass (reverse mode), where many products are needed, as for
            full Jacobians: faster on small networks, for `chunk_size` times the memory of a backward pass. Networks
            without a batched backward pass (in channels_last, for one) take one vector at a time all the same.
    """

    needs_denoiser = True

    @check_kinds
    def __init__(
        self, denoiser: Denoiser | ModelFunction | None = None, forward_mode: bool = False, chunk_size: int = 1
    ):
        if chunk_size < 1:
            raise InputError(f"`chunk_size` is {chunk_size}; allowed: at least 1.")
        self.denoiser = denoiser
        self.forward_mode = forward_mode
        self.chunk_size = chunk_size

    @property
    def needs_graph(self) -> bool:
        return not self.forward_mode  # callers that evaluate the state themselves may do so with a graph

    uses_backward_pass = needs_graph

    @property
    def calls_per_state(self) -> int:
        return 0 if self.forward_mode else 1

    @property
    def calls_per_product(self) -> int:
        return 1 if self.forward_mode else 0

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> ModelFisherOperator:
        has_graph = state.sample.requires_grad and state.model_output.requires_grad
        if has_graph and not self.forward_mode:
            return AutodiffOperator(state, None, self.chunk_size)
        function = model_function(self.denoiser)
        check = functools.partial(check_output, self.denoiser, state) if self.compares_output else None
        if self.forward_mode:
            return ForwardOperator(state, function, check)
        return AutodiffOperator(state, function, self.chunk_size, check)

    def check_outputs(self, states: Sequence[DenoisingState]) -> None:
        """Does nothing: each operator compares the output of its own evaluation."""


class AutodiffOperator(ModelFisherOperator):
    """See `AutodiffFisher`. The graph is built at the first product and lives as long as the operator.

    `check` is called with the output of the operator's own evaluation.
    """

    def __init__(
        self, state: DenoisingState, function: ModelFunction | None, chunk_size: int = 1,
        check: OutputCheck | None = None,
    ):  # fmt: skip
        super().__init__(state)
        self._function = function
        self._check_output = check
        self._graph = (state.sample, state.model_output) if function is None else None
        self.chunk_size = chunk_size
        self._batched = True
        self.calls_per_state = 0 if function is None else 1

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        leaf, output = self._build()
        return _gradient(output, leaf, v).to(v.dtype)

    def output_jacobians(self, vectors: torch.Tensor) -> torch.Tensor:
        if len(vectors) == 1 or not self._batched:
            return super().output_jacobians(vectors)
        leaf, output = self._build()
        try:
            products = _gradient(output, leaf, vectors, is_grads_batched=True)
        except RuntimeError as error:
            if not any(word in str(error) for word in ("vmap", "Batching rule")):
                raise
            self._batched = False  # an operation without a batched backward, as convolutions in channels_last
            return super().output_jacobians(vectors)
        return products.to(vectors.dtype)

    def transposed(self) -> FisherOperator:
        if self._function is None:
            raise UnsupportedError(
                "The state brought its own graph, so the denoiser is not at hand for Jacobian-vector products; make "
                "the operator with AutodiffFisher(denoiser) from a state without a graph."
            )
        return ForwardOperator(self.state, self._function, self._check_output)

    def _build(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._graph is None:
            with torch.enable_grad():
                leaf = self.state.sample.detach().contiguous().requires_grad_()  # see ForwardOperator
                model_input = expand(self.state.input_scale, leaf) * leaf
                output = model_function(self._function)(model_input, self.state.timestep)
            if not output.requires_grad:
                raise InputError(
                    "The denoiser's output does not depend on its input for autograd; AutodiffFisher needs a denoiser "
                    "that is differentiable (not under no_grad, inference_mode or compiled without grad). Use "
                    "FiniteDifferenceFisher, which needs none."
                )
            if self._check_output is not None:
                self._check_output(output)
            self._graph = leaf, output
        return self._graph


class ForwardOperator(ModelFisherOperator):
    """See `AutodiffFisher(forward_mode=True)`: products with J itself, so `matvec` is that of F, not of F^T."""

    calls_per_product = 1

    def __init__(self, state: DenoisingState, function: ModelFunction, check: OutputCheck | None = None):
        super().__init__(state)
        self._function = function
        self._check_output = check

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Product with the Jacobian of the raw model output, not transposed."""
        import torch.autograd.forward_ad as forward
        from torch.nn.attention import SDPBackend, sdpa_kernel

        self._check(v)
        # Autoencoders may give latents in channels_last, which group norm's forward derivative does not take.
        sample, direction = (tensor.detach().contiguous() for tensor in (self.state.sample, v))
        # Only the plain attention kernel has forward derivatives.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward.dual_level():
            dual = forward.make_dual(sample, direction.to(sample.dtype))
            output = self._function(expand(self.state.input_scale, dual) * dual, self.state.timestep)
            primal, tangent = forward.unpack_dual(output)
        if tangent is None:
            raise InputError(
                "The denoiser's output does not depend on its input for forward-mode autograd; use "
                "AutodiffFisher(denoiser) without `forward_mode`, or FiniteDifferenceFisher."
            )
        if self._check_output is not None:
            self._check_output(primal)
        return tangent.to(v.dtype)

    def transposed(self) -> FisherOperator:
        return AutodiffOperator(self.state, self._function, check=self._check_output)


def _gradient(output: torch.Tensor, leaf: torch.Tensor, v: torch.Tensor, **options: bool) -> torch.Tensor:
    """Returns the product of `v` with the Jacobian, and keeps the graph for the next product."""
    try:
        return torch.autograd.grad(output, leaf, v.to(output.dtype), retain_graph=True, **options)[0]
    except RuntimeError as error:
        if "donated" not in str(error):
            raise
        raise UnsupportedError(
            "The denoiser is compiled so that its backward pass frees what a second one would need, and several "
            "products are taken of one graph. Set torch._functorch.config.donated_buffer = False before the first "
            "call of the compiled denoiser, or use FiniteDifferenceFisher, which needs no backward pass."
        ) from error
