"""The mixin that makes any diffusers scheduler differentiable."""

import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..fisher.estimator import FisherEstimator
from .trajectory import Trajectory, record_run

if TYPE_CHECKING:
    from .trajectory import Scheduler
else:
    Scheduler = object  # at run time the mixin stands before the diffusers class


class FisherSchedulerMixin(Scheduler):
    """Adds `differentiable` to a diffusers scheduler: `class MyFisherScheduler(FisherSchedulerMixin, MyScheduler)`.

    Outside a `differentiable` block the class gives the results of its parent, bit for bit.
    """

    _trajectory: Trajectory | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Pipelines inspect the signature of `step`: a bare *args would silently drop `generator` and `eta`.
        parent_step = super().step

        @functools.wraps(parent_step)
        def step(self, model_output, timestep, sample, *args, **kwargs):
            if self._trajectory is None:
                return parent_step(self, model_output, timestep, sample, *args, **kwargs)
            own_step = functools.partial(parent_step, self)
            return self._trajectory.step(own_step, self, model_output, timestep, sample, *args, **kwargs)

        cls.step = step  # type: ignore[attr-defined]
        parent_noise = getattr(super(), "add_noise", None)
        if parent_noise is None:
            return

        @functools.wraps(parent_noise)
        def add_noise(self, *args, **kwargs):
            result = parent_noise(self, *args, **kwargs)
            if self._trajectory is not None:
                self._trajectory.noised_sample = result
            return result

        cls.add_noise = add_noise  # type: ignore[attr-defined]

    def differentiable(
        self, estimator: FisherEstimator, changed_latents: str = "refuse", controls: list[torch.Tensor] | None = None
    ) -> AbstractContextManager[Trajectory]:
        """Records the run inside the block so that it can be differentiated without a graph in the denoiser.

        Args:
            estimator: Fisher estimator that replaces the denoiser's Jacobian in the backward pass, such as
                `DirectFisher()`.
            changed_latents: what happens if the latents change between two steps: "refuse" raises an error, "additive"
                continues as if a constant had been added.
            controls: list of tensors (B, ...), one per step, that are added to the model output and require a
                gradient, which `trajectory.gradients` returns. A step beyond the end of the list appends zeros to it.
                None: no controls.

        Yields:
            The `Trajectory`, whose `gradient(loss)` is d loss / d latents.

        Raises:
            TrajectoryError: blocks are nested; or the run inside the block uses inference mode or learned variance, or
                changes the latents.
            UnsupportedError: the noise levels of the run's scheduler or prediction type are not known.
        """
        return record_run(self, Trajectory(estimator, changed_latents, controls))
