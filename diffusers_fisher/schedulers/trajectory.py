"""The discrete adjoint of a sampling run: a graph of scheduler steps, to which Jacobians of the denoiser are attached.

Every diffusers `step` is differentiable in (model_output, sample) at negligible cost. The denoiser is evaluated
without a graph. A custom autograd function attaches its output to the graph; the backward of this function multiplies
by the transposed Jacobian of the raw model output, which an estimator of the diffusion Fisher computes. The run is
differentiated as it was discretised: with the true Jacobian the gradient equals that of full back-propagation. Memory
is O(steps x latent) for any denoiser.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from ..arguments import check_kinds
from ..errors import InputError, NumericalError, TrajectoryError, describe_change
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.operator import FisherOperator
from ..noise import DenoisingState, Timestep, noise_schedule, split_variance, state_of

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    class Scheduler(SchedulerMixin, ConfigMixin):
        """Stands for any of diffusers' schedulers."""

        timesteps: torch.Tensor
        _trajectory: Trajectory | None


CHANGED_LATENTS = ("refuse", "additive")


@dataclasses.dataclass
class _Record:
    """What the backward pass needs of a run: no tensor in it has a graph.

    The graph holds the backward functions. If these held the trajectory, whose samples hold the graph, nothing of a
    run would ever be freed, because Python's garbage collector can't see a circle through a graph.
    """

    estimator: FisherEstimator
    states: list[DenoisingState] = dataclasses.field(default_factory=list)
    endpoint: torch.Tensor | None = None  # sample that the last step returned

    def operator(self, index: int) -> FisherOperator:
        return self.estimator(self.states[index], endpoint=self.endpoint)

    def backward_of(
        self, index: int, autocast: Callable[[], AbstractContextManager]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns the backward function of step `index`.

        CUDA runs the backward pass in another thread, so the function itself sets the modes of torch.
        """

        def product(gradient: torch.Tensor) -> torch.Tensor:
            with torch.no_grad(), autocast():
                return self.operator(index).output_jacobian(gradient)

        return product


class Trajectory:
    """Records one differentiable sampling run. `scheduler.differentiable(estimator)` makes it.

    Attributes:
        controls: the argument `controls` of `differentiable`: one tensor per step that is added to the model output,
            or None.
        states: one `DenoisingState` per denoiser evaluation (samples in the scheduler's coordinates, without a graph).
        initial_sample: leaf of the graph: the first sample in the scheduler's coordinates, float32 or wider.
        final_sample: sample that the last step returned, with its graph, float32 or wider.
        noised_sample: last result of the scheduler's `add_noise`, where runs from a noised image start; or None.
    """

    def __init__(
        self, estimator: FisherEstimator, changed_latents: str = "refuse", controls: list[torch.Tensor] | None = None
    ):
        if changed_latents not in CHANGED_LATENTS:
            raise InputError(f"`changed_latents` is '{changed_latents}'; allowed: {', '.join(CHANGED_LATENTS)}.")
        self.estimator = check_estimator(estimator)
        self._record = _Record(self.estimator)
        self.states = self._record.states
        self.changed_latents = changed_latents
        self.controls = controls
        self.initial_sample: torch.Tensor | None = None
        self.final_sample: torch.Tensor | None = None
        self.noised_sample: torch.Tensor | None = None
        self._last_result: torch.Tensor | None = None
        self._version = 0  # version of the last result, which shows changes in place
        self._timesteps: torch.Tensor | None = None
        self._noise_scale = 1.0
        self._autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext  # autocast of the last step
        self._is_compared = False  # whether the estimator's denoiser was compared with the run's outputs

    def __deepcopy__(self, memo: dict[int, object]) -> Trajectory:
        """Returns itself: pipelines that copy all that a scheduler holds do not copy the run and its denoiser."""
        return self

    def gradient(self, loss: torch.Tensor, retain_graph: bool = False) -> torch.Tensor:
        """Returns the gradient of a scalar `loss` of the run's result with respect to the pipeline's `latents`.

        The gradient includes the factor `init_noise_sigma` by which pipelines multiply their `latents`. If the run
        starts from a noised image (image to image), the gradient is with respect to the noised image, without a
        factor. The dtype is float32 or wider. Cost: one product of the estimator per step.

        Raises:
            TrajectoryError, NumericalError: as in `gradients`.
        """
        return self.gradients(loss, retain_graph)[0]

    def gradients(self, loss: torch.Tensor, retain_graph: bool = False) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Returns the result of `gradient`, and the list of gradients with respect to the run's controls.

        The list is empty for a run without controls.

        Raises:
            TrajectoryError: no step was recorded, or the loss does not depend on the run.
            InputError: the estimator's denoiser does not give the run's outputs.
            NumericalError: the gradient is not finite.
        """
        if self.initial_sample is None:
            raise TrajectoryError(
                "No step was recorded: run the pipeline inside the `with scheduler.differentiable(...)` block, with "
                "this scheduler in the pipeline."
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
            raise TrajectoryError(
                f"The loss must be a scalar tensor that depends on the run's result, got {_describe(loss)}. Compute "
                "it outside of torch.no_grad from `trajectory.final_sample`, or from the pipeline's result for "
                '`output_type="latent"` if that is this sample, unchanged.'
            )
        if not self._is_compared:
            with torch.no_grad(), self._autocast():
                self.estimator.check_outputs(self.states)
            self._is_compared = True
        leaves = [self.initial_sample, *(self.controls or [])[: len(self.states)]]
        gradients = torch.autograd.grad(loss, leaves, retain_graph=retain_graph, allow_unused=True)
        if gradients[0] is None:
            raise TrajectoryError("The loss does not depend on this run's result. Compute it from `final_sample`.")
        with torch.no_grad(), self._autocast():
            gradient = self.estimator.through_run(gradients[0] * self._noise_scale, self.states)
        if not torch.isfinite(gradient).all():
            raise NumericalError(
                f"The gradient through {len(self.states)} steps is not finite with {type(self.estimator).__name__}. "
                "The uncentred endpoint form grows exponentially in the number of steps: use fewer steps, "
                "EndpointFisher(centred=True) or DirectFisher()."
            )
        # The result of some schedulers does not depend on every step (first stages): such controls have no gradient.
        pairs = zip(leaves[1:], gradients[1:], strict=True)
        return gradient, [torch.zeros_like(leaf) if value is None else value for leaf, value in pairs]

    @check_kinds
    def operator(self, index: int) -> FisherOperator:
        """Returns the estimator's operator at the run's state `index`. Raises `TrajectoryError` before the run."""
        if self.final_sample is None:
            raise TrajectoryError("The run has no steps yet. Call `operator` after the pipeline has run.")
        return self._record.operator(index)

    def step(
        self, parent_step: Callable, scheduler: Scheduler, model_output: torch.Tensor, timestep: Timestep,
        sample: torch.Tensor, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip  # Any: every scheduler has a result class of its own
        """Records one step, runs the scheduler's own `parent_step` with a graph and returns its result."""
        model_output, variance = split_variance(scheduler.config, model_output, sample)
        self._check(scheduler, model_output, sample)
        with torch.enable_grad():
            current = self._enter(scheduler, sample)
            index = noise_schedule(scheduler).start_step(timestep)
            output = model_output.detach().to(current.dtype)
            state = state_of(scheduler, current.detach(), output, timestep, index)
            self.states.append(state)
            self._autocast = _current_autocast(sample.device.type)
            output = _AttachJacobian.apply(
                current, output, self._record.backward_of(len(self.states) - 1, self._autocast)
            )
            if self.controls is not None:
                if len(self.controls) < len(self.states):
                    self.controls.append(torch.zeros_like(current).requires_grad_())
                output = output + self.controls[len(self.states) - 1]
            if variance is not None:  # a constant in the backward pass
                output = torch.cat([output, variance.detach().to(output.dtype)], dim=1)
            result = parent_step(output, timestep, current, *args, **kwargs)
            next_sample = result[0] if isinstance(result, tuple) else result.prev_sample
            self.final_sample = next_sample
            self._record.endpoint = next_sample.detach()
            # The pipeline gets its own dtype, while the chain goes on in float32 or wider.
            self._last_result = next_sample.to(sample.dtype)
            self._version = self._last_result._version
        if isinstance(result, tuple):
            return (self._last_result, *result[1:])
        result.prev_sample = self._last_result
        return result

    def _check(self, scheduler: Scheduler, model_output: torch.Tensor, sample: torch.Tensor) -> None:
        if torch.is_inference_mode_enabled() or sample.is_inference():
            raise TrajectoryError(
                "A differentiable run can't record under torch.inference_mode, because autograd does not accept its "
                "tensors; use torch.no_grad instead. Pipelines already use torch.no_grad."
            )
        if model_output.shape != sample.shape:
            cause = "the pipeline hands its scheduler the two in different layouts. Pass them to it in one layout."
            if model_output.ndim == sample.ndim and model_output.shape[1] == 2 * sample.shape[1]:
                cause = (
                    f"models with learned variance are not supported by {type(scheduler).__name__} with its "
                    "variance_type. Use one of variance_type 'learned_range', or a model or pipeline that returns the "
                    "mean alone."
                )
            raise TrajectoryError(
                f"The model output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: {cause}"
            )

    def _enter(self, scheduler: Scheduler, sample: torch.Tensor) -> torch.Tensor:
        """Returns the tensor of the graph that stands for the incoming `sample`, float32 or wider."""
        dtype = torch.promote_types(sample.dtype, torch.float32)
        chain = self.final_sample
        if self._last_result is None or chain is None:
            self.initial_sample = sample.detach().to(dtype, copy=True).requires_grad_()
            # Pipelines multiply noise by `init_noise_sigma`, but start from a noised image without a factor.
            from_image = self.noised_sample is not None and _equal(sample, self.noised_sample.to(sample.dtype))
            self._noise_scale = 1.0 if from_image else float(getattr(scheduler, "init_noise_sigma", 1.0))
            self._timesteps = scheduler.timesteps
            return self.initial_sample
        is_intact = self._last_result._version == self._version
        if is_intact and (sample is self._last_result or _equal(sample, self._last_result)):
            return chain
        # A second run sets new timesteps. After a change in place the difference to the last result is lost.
        is_same_run = scheduler.timesteps is self._timesteps and sample.shape == self._last_result.shape
        if self.changed_latents == "additive" and is_intact and is_same_run:
            return chain + (sample - self._last_result).detach().to(dtype)
        number = len(self.states)
        if scheduler.timesteps is not self._timesteps:
            raise TrajectoryError(
                f"A second run began in the `differentiable` block, after {number} steps of the first: its timesteps "
                "are new and its latents are not those that the last step returned. One `differentiable` block holds "
                "one run."
            )
        if sample.shape != self._last_result.shape:
            cause = "the pipeline changes their layout, or steps samples of two kinds with one scheduler"
        else:
            cause = "a callback, an inpainting blend or frames that the pipeline holds fixed changed them"
        change = describe_change(self._last_result, sample) if is_intact else "changed in place"
        raise TrajectoryError(
            f"Step {number} received other latents than step {number - 1} returned, "
            f"{change}: {cause}. If the change does not depend on the latents, "
            "pass differentiable(estimator, changed_latents='additive'); other changes have no known gradient."
        )


def _current_autocast(kind: str) -> Callable[[], AbstractContextManager]:
    """Returns a function that makes a context with the autocast settings of this moment."""
    return functools.partial(
        torch.autocast, kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind)
    )


class _AttachJacobian(torch.autograd.Function):
    """Returns the model output; its backward is `product`, the transposed Jacobian with respect to the sample."""

    @staticmethod
    def forward(ctx, sample, model_output, product):
        ctx.product = product
        return model_output.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return ctx.product(gradient), None, None


@contextlib.contextmanager
def record_run(scheduler: Scheduler, trajectory: Trajectory) -> Iterator[Trajectory]:
    """Sets `trajectory` on `scheduler` inside the block. Afterwards the scheduler's own buffers hold no graph."""
    if scheduler._trajectory is not None:
        raise TrajectoryError("This scheduler is already inside a `differentiable` block. Blocks can't be nested.")
    scheduler._trajectory = trajectory
    try:
        yield trajectory
    finally:
        scheduler._trajectory = None
        for name, value in list(vars(scheduler).items()):
            setattr(scheduler, name, _detach(value))


def _detach(value: Any) -> Any:  # Any: a scheduler's attributes have every type
    if isinstance(value, torch.Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (list, tuple):
        return type(value)(_detach(entry) for entry in value)
    return value


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} with requires_grad={value.requires_grad}"
    return f"a {type(value).__name__}"
