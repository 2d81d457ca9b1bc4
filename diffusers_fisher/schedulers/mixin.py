"""The mixin that makes any diffusers scheduler differentiable."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import check_kinds
from ..fisher.estimator import FisherEstimator
from ..noise import Timestep
from .trajectory import Trajectory, record_run

if TYPE_CHECKING:
    from .trajectory import Scheduler
else:
    Scheduler = object  # at run time the mixin stands before the diffusers class


class FisherSchedulerMixin(Scheduler):
    """Adds `differentiable` to a diffusers scheduler: `class MyFisherScheduler(FisherSchedulerMixin, MyScheduler)`.

    Outside a `differentiable` block the class gives the results of its parent, bit for bit. A class over it may have a
    `step` of its own, also one that calls its parent's: the whole of it is one recorded step.
    """

    _trajectory: Trajectory | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # The class's own method is wrapped, or the one that it inherits from outside of the mixin's classes.
        for name, record in (("step", _record_step), ("add_noise", _record_noise)):
            method = getattr(cls, name, None)
            if method is not None and getattr(method, "_recorder", None) is not method:
                wrapper = record(method)
                vars(wrapper)["_recorder"] = wrapper  # itself: `functools.wraps` copies the attribute to others
                setattr(cls, name, wrapper)

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """Returns the classes that the parent names as its compatible ones: diffusers looks them up by class name."""
        parent = next(base for base in cls.__mro__ if not issubclass(base, FisherSchedulerMixin))
        return parent._get_compatibles()  # type: ignore[attr-defined]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave a running trajectory out: it holds the run's samples and its denoiser."""
        return {name: value for name, value in vars(self).items() if name != "_trajectory"}

    @check_kinds
    def differentiable(
        self,
        estimator: FisherEstimator,
        changed_latents: str = "refuse",
        controls: list[torch.Tensor] | None = None,
        adjoint_guidance_scale: float | None = None,
    ) -> AbstractContextManager[Trajectory]:
        """Records the run inside the block so that it can be differentiated without a graph in the denoiser.

        Args:
            estimator: Fisher estimator that replaces the denoiser's Jacobian in the backward pass, such as
                `DirectFisher()`. A denoiser that it evaluates must give the run's outputs: the gradient compares them,
                `AutodiffFisher` at every step, others at the first, the middle and the last one.
            changed_latents: what happens if the latents change between two steps: "refuse" raises an error, "additive"
                continues as if a constant had been added.
            controls: list of tensors (B, ...), one per step, that are added to the model output and require a
                gradient, which `trajectory.gradients` returns. A step beyond the end of the list appends zeros to it.
                None: no controls.
            adjoint_guidance_scale: guidance scale of the estimator's denoiser where it is another than the run's on
                purpose, such as 1.0 to keep classifier-free guidance out of the backward pass. The outputs are then
                not compared. None: the denoiser is the run's own function.

        Yields:
            The `Trajectory`, whose `gradient(loss)` is d loss / d latents.

        Raises:
            InputError: `adjoint_guidance_scale` is not that of the estimator's denoiser.
            TrajectoryError: blocks are nested; or the run inside the block uses inference mode, or a learned variance
                that the scheduler does not use, or changes the latents.
            UnsupportedError: the noise levels of the run's scheduler or prediction type are not known.
        """
        if adjoint_guidance_scale is not None:
            estimator = estimator.at_guidance_scale(adjoint_guidance_scale)
        return record_run(self, Trajectory(estimator, changed_latents, controls))


def _record_step(method: Callable) -> Callable:
    """Wraps a `step`, so that the run's trajectory records it where there is one."""

    # Pipelines inspect the signature of `step`: a bare *args would silently drop `generator` and `eta`.
    @functools.wraps(method)
    def step(
        self: FisherSchedulerMixin, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, *args: Any,
        **kwargs: Any,
    ) -> Any:  # fmt: skip  # Any: every scheduler has a result class of its own
        trajectory = self._trajectory
        if trajectory is None:
            return method(self, model_output, timestep, sample, *args, **kwargs)
        self._trajectory = None  # a subclass's step may call that of its parent, which is a part of the same step
        try:
            own_step = functools.partial(method, self)
            return trajectory.step(own_step, self, model_output, timestep, sample, *args, **kwargs)
        finally:
            self._trajectory = trajectory

    return step


def _record_noise(method: Callable) -> Callable:
    """Wraps an `add_noise`, so that the run's trajectory knows a noised image as the start of the run."""

    @functools.wraps(method)
    def add_noise(self: FisherSchedulerMixin, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = method(self, *args, **kwargs)
        if self._trajectory is not None:
            self._trajectory.noised_sample = result
        return result

    return add_noise
