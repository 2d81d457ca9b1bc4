"""Levenberg-Marquardt-Langevin sampling: the noise direction preconditioned by a damped rank-one curvature.

Notation: the Hessian is approximated by H = lambda I + m m^T with m = kappa eps_prev + (1 - kappa) eps (Wang et al.,
ICCV 2025, arXiv 2505.24222). H^-1 eps, rescaled to the length of eps, replaces eps as the direction from the predicted
x_0 to the sample. The predicted x_0 does not change.

This is a rotation of the sample about x_0: x' = alpha x_0 + sigma eps', with eps' in place of eps, is a sample of the
same level. The LML step is the parent's own step from x', with the model output that belongs to (x_0, eps'). So it
works with any scheduler whose step is a function of x_0 and eps.
"""

import functools
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from ..errors import InputError, warn
from ..fisher.numerics import dot
from ..fisher.operator import FisherMatrixOperator
from ..noise import DenoisingState, Timestep, expand, noise_schedule, state_of
from ..schedulers.config_options import add_config_options

OPTIONS = {"lml_lambda": 1.0, "lml_kappa": 0.1, "lml_freeze": 0.0}


class DampedRankOneOperator(FisherMatrixOperator):
    """Represents lambda I + m m^T at a state.

    Args:
        damping: lambda, (B,) float64, positive.
        direction: m, (B, ...).
    """

    def __init__(self, state: DenoisingState, damping: torch.Tensor, direction: torch.Tensor):
        super().__init__(state)
        self._damping, self._direction = damping, direction

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return expand(self._damping, v) * v + self._direction * expand(dot(self._direction, v), v)

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Returns (v - m <m, v>/(a + |m|^2))/a with a = lambda + shift (Sherman-Morrison)."""
        m, identity = self._direction, (self._damping + shift).to(v.device)
        along = dot(m, v) / (identity + dot(m, m))
        return (v - expand(along, v) * m) / expand(identity, v)


def precondition(
    epsilon: torch.Tensor, previous: torch.Tensor, state: DenoisingState, damping: float, kappa: float
) -> torch.Tensor:
    """Returns eps' = H^-1 eps, rescaled to the length of eps: (B, ...), in the dtype of `epsilon`.

    Args:
        epsilon, previous: predicted noise of this step and of the previous step, (B, ...), float32 or wider.
        state: denoising state of this step.
        damping: lambda relative to the number of dimensions, which is about |m|^2.
        kappa: weight of the previous step in m.
    """
    weight = torch.full((len(epsilon),), damping * epsilon[0].numel(), dtype=torch.float64, device=epsilon.device)
    operator = DampedRankOneOperator(state, weight, kappa * previous + (1 - kappa) * epsilon)
    product = operator.inverse_product(epsilon, torch.zeros_like(weight))
    size = dot(product, product)
    ratio = torch.where(size > 0, dot(epsilon, epsilon) / torch.where(size > 0, size, 1), 1.0)
    return expand(ratio.sqrt(), product) * product


class LMLSchedulerMixin:
    """Adds Levenberg-Marquardt-Langevin directions to a diffusers scheduler: `class X(LMLSchedulerMixin, Parent)`.

    Cost: some inner products per step, and no denoiser call. All inner products are accumulated in float64, and the
    rotation is computed in float32 or wider, so half precision is safe.

    Let D be the change of the predicted noise since the previous step. To first order in D, the direction is
    eps + (kappa/lambda) D without its part along eps. Only the ratio kappa/lambda matters; the default 0.1 is mild.

    Config, in addition to the parent's config:
        lml_lambda: damping relative to the number of dimensions; a large value gives nearly the parent's steps.
        lml_kappa: weight of the previous step in m. With 0 the scheduler equals its parent, and a warning says so: a
            rank-one curvature along eps does not turn eps.
        lml_freeze: fraction of the steps, from the first one, that the parent does without a rotation.

    Raises:
        InputError: lambda is not positive, kappa is outside [0, 1), or freeze is outside [0, 1].
    """

    _previous_epsilon: torch.Tensor | None = None
    _steps_taken = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if LMLSchedulerMixin not in cls.__bases__:
            return  # a subclass of an LML class, such as its Fisher version, inherits these methods
        # Any: diffusers' schedulers have no base class with these methods.
        parent: Any = cls.__mro__[cls.__mro__.index(LMLSchedulerMixin) + 1]

        @functools.wraps(parent.step)
        def step(self, model_output, timestep, sample, *args, **kwargs):
            output, rotated_sample = self._rotate(model_output, timestep, sample)
            return parent.step(self, output, timestep, rotated_sample, *args, **kwargs)

        @functools.wraps(parent.set_timesteps)
        def set_timesteps(self, *args, **kwargs):
            self._previous_epsilon, self._steps_taken = None, 0
            return parent.set_timesteps(self, *args, **kwargs)

        add_config_options(cls, parent, OPTIONS, _check)
        cls.step, cls.set_timesteps = step, set_timesteps  # type: ignore[attr-defined]

    def _rotate(
        self, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the model output and the sample that have the preconditioned noise direction."""
        scheduler: Any = self  # Any: the second base class is one of diffusers' schedulers
        config, dtype = scheduler.config, torch.promote_types(sample.dtype, torch.float32)
        index = noise_schedule(scheduler).start_step(timestep)
        state = state_of(scheduler, sample.to(dtype), model_output.to(dtype), timestep, index)
        epsilon, previous = state.epsilon, self._previous_epsilon
        self._previous_epsilon = epsilon.detach()
        self._steps_taken += 1
        in_freeze = self._steps_taken <= config.lml_freeze * len(scheduler.timesteps)
        if in_freeze or previous is None or config.lml_kappa == 0 or not bool((state.level.alpha > 0).all()):
            return model_output, sample
        direction = precondition(epsilon, previous.to(epsilon), state, config.lml_lambda, config.lml_kappa)
        x0 = state.pred_original_sample
        x = expand(state.level.alpha, x0) * x0 + expand(state.level.sigma, direction) * direction
        noise, clean, identity = (expand(value, x) for value in state.prediction.output_coefficients(state.level))
        output = noise * direction + clean * x0 + identity * x
        return output.to(model_output.dtype), x.to(sample.dtype)


def _check(lml_lambda: float, lml_kappa: float, lml_freeze: float) -> None:
    if not 0 < lml_lambda < float("inf"):
        raise InputError(f"`lml_lambda` is {lml_lambda}; allowed: a positive number, such as 1.0.")
    if not 0 <= lml_kappa < 1:
        raise InputError(f"`lml_kappa` is {lml_kappa}; allowed: 0 to less than 1, such as 0.1.")
    if not 0 <= lml_freeze <= 1:
        raise InputError(f"`lml_freeze` is {lml_freeze}; allowed: 0 to 1, a fraction of the steps.")
    if lml_kappa == 0:
        warn(
            "`lml_kappa` is 0: a curvature along the predicted noise does not turn it, so this is the parent "
            "scheduler for every `lml_lambda`. Pass a positive `lml_kappa`, such as 0.1."
        )


class LMLDDIMScheduler(LMLSchedulerMixin, DDIMScheduler):
    """`DDIMScheduler` with Levenberg-Marquardt-Langevin directions, see `LMLSchedulerMixin`."""


class LMLDPMSolverMultistepScheduler(LMLSchedulerMixin, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` (DPM-Solver and DPM-Solver++) with Levenberg-Marquardt-Langevin directions."""


class LMLFlowMatchEulerDiscreteScheduler(LMLSchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with Levenberg-Marquardt-Langevin directions, see `LMLSchedulerMixin`."""


for _class in (LMLDDIMScheduler, LMLDPMSolverMultistepScheduler, LMLFlowMatchEulerDiscreteScheduler):
    _class.__module__ = "diffusers_fisher"  # a saved component names the public module
