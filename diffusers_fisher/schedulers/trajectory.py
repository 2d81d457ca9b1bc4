"""The discrete adjoint of a sampling run: a graph of scheduler steps, with the denoiser attached by its Jacobian.

Every diffusers `step` is differentiable in (model_output, sample) at negligible cost. The denoiser, evaluated without
a graph, is attached by a custom autograd function whose backward multiplies by the transposed Jacobian of the raw
model output, as an estimator of the diffusion Fisher gives it. Discretise-then-optimise: with the true Jacobian the
gradient is that of full back-propagation. Memory is O(steps x latent), whatever the denoiser.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..errors import InputError, NumericalError, TrajectoryError
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.operator import FisherOperator
from ..noise import DenoisingState, Timestep, noise_schedule, state_of

CHANGED_LATENTS = ("refuse", "additive")


class Trajectory:
    """One differentiable sampling run, recorded. Made by `scheduler.differentiable(estimator)`.

    Attributes:
        controls: what is added to the model's output, a tensor a step, as `differentiable` was given; or None.
        states: one `DenoisingState` a denoiser evaluation (samples in the scheduler's coordinates, detached).
        initial_sample: the graph's leaf: the first sample in the scheduler's coordinates, float32 or wider.
        final_sample: what the last step returned, with its graph, float32 or wider.
        noised: what the scheduler's `add_noise` last returned: runs from a noised image start there.
    """

    def __init__(
        self,
        estimator: FisherEstimator,
        changed_latents: str = "refuse",
        controls: list[torch.Tensor] | None = None,
    ):
        if changed_latents not in CHANGED_LATENTS:
            raise InputError(f"`changed_latents` is '{changed_latents}'; allowed: {', '.join(CHANGED_LATENTS)}.")
        self.estimator = check_estimator(estimator)
        self.changed_latents = changed_latents
        self.controls = controls
        self.states: list[DenoisingState] = []
        self.initial_sample: torch.Tensor | None = None
        self.final_sample: torch.Tensor | None = None
        self.noised: torch.Tensor | None = None
        self._returned: torch.Tensor | None = None
        self._version = 0  # of what was returned, to see changes in place
        self._timesteps: Any = None
        self._noise_scale = 1.0
        self._autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext  # as the last step ran

    def gradient(self, loss: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
        """Gradient of a scalar `loss` of the run's result with respect to the pipeline's `latents` argument.

        Includes the factor `init_noise_sigma` by which pipelines multiply their `latents`. Of a run that starts from a
        noised image (image to image), the gradient with respect to that image as the scheduler noised it, which no
        factor multiplies. Cost: one product of the estimator a step. dtype: float32 or wider. Raises as `gradients`.
        """
        return self.gradients(loss, retain_graph)[0]

    def gradients(self, loss: torch.Tensor, retain_graph: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """As `gradient`, and the gradients with respect to the run's controls (none where it has none), at once.

        Raises:
            TrajectoryError: no step was recorded, or the loss does not depend on the run.
            NumericalError: the gradient is not finite.
        """
        if self.initial_sample is None:
            raise TrajectoryError(
                "No step was recorded: run the pipeline inside the `with scheduler.differentiable(...)` block, with "
                "that scheduler as its scheduler."
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TrajectoryError(
                f"The loss must be a scalar tensor that depends on the run's result, got {_describe(loss)}. Ask the "
                'pipeline for `output_type="latent"` and decode outside of torch.no_grad.'
            )
        leaves = [self.initial_sample, *(self.controls or [])[: len(self.states)]]
        found = torch.autograd.grad(loss, leaves, retain_graph=retain_graph, allow_unused=True)
        if found[0] is None:
            raise TrajectoryError("The loss does not depend on this run's result; compute it from what the run gave.")
        with torch.no_grad(), self._autocast():
            gradient = self.estimator.through_run(found[0] * self._noise_scale, self.states)
        if not torch.isfinite(gradient).all():
            raise NumericalError(
                f"The gradient through {len(self.states)} steps is not finite with {type(self.estimator).__name__}. "
                "The uncentred endpoint form grows exponentially in the number of steps: use fewer steps, "
                "EndpointFisher(centred=True) or DirectFisher()."
            )
        # A step that the result does not depend on (the first stage of some) leaves its control without one.
        others = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves[1:], found[1:], strict=True)]
        return gradient, others

    def operator(self, index: int) -> FisherOperator:
        """The estimator's operator at the run's state `index`. Raises `TrajectoryError` before the run."""
        if self.final_sample is None:
            raise TrajectoryError("The run has no steps yet; ask for operators after the pipeline has run.")
        return self.estimator(self.states[index], endpoint=self.final_sample.detach())

    def step(
        self, parent_step: Callable, scheduler: Any, model_output: torch.Tensor, timestep: Timestep,
        sample: torch.Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """Records one step and runs the scheduler's own `parent_step` with a graph."""
        self._check(model_output, sample)
        with torch.enable_grad():
            current = self._enter(scheduler, sample)
            index = noise_schedule(scheduler).start_step(timestep)
            output = model_output.detach().to(current.dtype)
            state = state_of(scheduler, current.detach(), output, timestep, index)
            self.states.append(state)
            self._autocast = _current_autocast(sample.device.type)
            attached = _AttachJacobian.apply(current, output, self._product(len(self.states) - 1))
            if self.controls is not None:
                if len(self.controls) < len(self.states):
                    self.controls.append(torch.zeros_like(current).requires_grad_())
                attached = attached + self.controls[len(self.states) - 1]
            result = parent_step(attached, timestep, current, *args, **kwargs)
            following = result[0] if isinstance(result, tuple) else result.prev_sample
            self.final_sample = following
            self._returned = following.to(sample.dtype)
            self._version = self._returned._version
        if isinstance(result, tuple):
            return (self._returned, *result[1:])
        result.prev_sample = self._returned
        return result

    def _check(self, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if torch.is_inference_mode_enabled() or sample.is_inference():
            raise TrajectoryError(
                "A differentiable run can't record under torch.inference_mode, whose tensors autograd refuses; use "
                "torch.no_grad instead (pipelines do so themselves)."
            )
        if model_output.shape != sample.shape:
            raise TrajectoryError(
                f"The model output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: models "
                "with learned variance are not supported in a differentiable run. Use a scheduler with "
                "variance_type='fixed_small' and a model (or pipeline) that gives the mean alone."
            )

    def _enter(self, scheduler: Any, sample: torch.Tensor) -> torch.Tensor:
        """The chain's own tensor for the incoming `sample`, float32 or wider."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        chain = self.final_sample
        if self._returned is None or chain is None:
            self.initial_sample = sample.detach().to(dtype, copy=True).requires_grad_()
            from_image = self.noised is not None and _same(sample, self.noised.to(sample.dtype))
            self._noise_scale = 1.0 if from_image else float(getattr(scheduler, "init_noise_sigma", 1.0))
            self._timesteps = scheduler.timesteps
            return self.initial_sample
        unchanged = self._returned._version == self._version
        if unchanged and (sample is self._returned or _same(sample, self._returned)):
            return chain
        same_run = scheduler.timesteps is self._timesteps and sample.shape == self._returned.shape
        if self.changed_latents == "additive" and unchanged and same_run:
            return chain + (sample - self._returned).detach().to(dtype)
        raise TrajectoryError(
            f"Step {len(self.states)} received other latents than step {len(self.states) - 1} returned: a callback or "
            "an inpainting blend changed them, or a second run began. A change that does not depend on the latents "
            "(added guidance, say) can be followed with differentiable(estimator, changed_latents='additive'); "
            "anything else has no known gradient. One `differentiable` block holds one run."
        )

    def _product(self, index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The backward of step `index`. CUDA runs backward in another thread, so its modes are set inside."""
        autocast = self._autocast

        def product(gradient: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), autocast():
                return self.operator(index).output_jacobian(gradient)

        return product


def _current_autocast(kind: str) -> Callable[[], AbstractContextManager]:
    """Makes contexts like the present one."""
    return functools.partial(
        torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


class _AttachJacobian(torch.autograd.Function):
    """The model output, held; its backward is `product`, the transposed Jacobian with respect to the sample."""

    @staticmethod
    def forward(ctx, sample, model_output, product):
        ctx.product = product
        return model_output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.product(gradient), None, None


@contextlib.contextmanager
def recording(scheduler: Any, trajectory: Trajectory) -> Iterator[Trajectory]:
    """Sets `trajectory` on `scheduler` for the block; leaves no graph in the scheduler's own buffers afterwards."""
    if scheduler._trajectory is not None:
        raise TrajectoryError("This scheduler is already inside a `differentiable` block; they don't nest.")
    scheduler._trajectory = trajectory
    try:
        yield trajectory
    finally:
        scheduler._trajectory = None
        for name, value in list(vars(scheduler).items()):
            setattr(scheduler, name, _detached(value))


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (list, tuple):
        return type(value)(_detached(entry) for entry in value)
    return value


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} with requires_grad={value.requires_grad}"
    return f"a {type(value).__name__}"
