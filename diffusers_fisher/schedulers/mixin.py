"""What makes any diffusers scheduler differentiable."""

import functools
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from ..fisher.estimator import FisherEstimator
from .trajectory import Trajectory, recording

if TYPE_CHECKING:
    from diffusers.configuration_utils import ConfigMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    class Scheduler(SchedulerMixin, ConfigMixin):
        """What all of diffusers' schedulers are."""

else:
    Scheduler = object  # at run time the mixin stands before the stock class


class FisherSchedulerMixin(Scheduler):
    """Adds `differentiable` to a diffusers scheduler: `class MyFisherScheduler(FisherSchedulerMixin, MyScheduler)`.

    Outside a `differentiable` block the class is its parent, bit for bit.
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
            noised = parent_noise(self, *args, **kwargs)
            if self._trajectory is not None:
                self._trajectory.noised = noised
            return noised

        cls.add_noise = add_noise  # type: ignore[attr-defined]

    def differentiable(
        self,
        estimator: FisherEstimator,
        changed_latents: str = "refuse",
        controls: list[torch.Tensor] | None = None,
    ) -> AbstractContextManager[Trajectory]:
        """Records the run inside the block so that it can be differentiated without a graph in the denoiser.

        Args:
            estimator: what stands in for the denoiser's Jacobian in the backward pass, such as `DirectFisher()`.
            changed_latents: what to do when something between two steps changes the latents: "refuse", or "additive"
                to go on as though a constant had been added.
            controls: added to the model's output, one tensor (B, ...) a step that requires a gradient, which
                `trajectory.gradients` then gives; steps beyond the list's end append zeros to it. None: no controls.

        Yields:
            The `Trajectory`, whose `gradient(loss)` is d loss / d latents.

        Raises:
            TrajectoryError: nested blocks; inside the run: inference mode, learned variance, changed latents.
            UnsupportedError: inside the run: a scheduler or prediction type whose noise level is not known.
        """
        return recording(self, Trajectory(estimator, changed_latents, controls))
