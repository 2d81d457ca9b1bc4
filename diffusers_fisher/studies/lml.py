"""Levenberg-Marquardt-Langevin sampling: the noise direction preconditioned by a damped rank-one curvature.

Notation: the Hessian's stand-in is H = lambda I + m m^T with m = kappa eps_prev + (1 - kappa) eps (Wang et al., ICCV
2025, arXiv 2505.24222). Its inverse on eps, brought back to the length of eps, takes the place of eps as the direction
that points from the predicted x_0 to the sample; x_0 itself is kept.

That is a rotation of the sample about x_0: with eps' in place of eps, x' = alpha x_0 + sigma eps' is a sample of the
same level, and the parent's own step from x', with the output that says (x_0, eps'), is the LML step. So it is a
composition over any scheduler whose step is a function of x_0 and eps.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from ..errors import InputError
from ..fisher.numerics import dot, per_sample
from ..fisher.operator import FisherMatrixOperator
from ..noise import DenoisingState, Timestep, expand, noise_schedule, state_of

OPTIONS = {"lml_lambda": 1.0, "lml_kappa": 0.1, "lml_freeze": 0.0}


class DampedRankOneOperator(FisherMatrixOperator):
    """lambda I + m m^T at a state.

    Args:
        damping: lambda, (B,) float64, positive.
        direction: m, (B, ...).
    """

    def __init__(self, state: DenoisingState, damping: torch.Tensor, direction: torch.Tensor):
        super().__init__(state)
        self._damping, self._direction = damping, direction

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return per_sample(self._damping, v) * v + self._direction * per_sample(dot(self._direction, v), v)

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Sherman-Morrison: (v - m <m, v>/(a + |m|^2))/a with a = lambda + shift."""
        m, identity = self._direction, (self._damping + shift).to(v.device)
        along = dot(m, v) / (identity + dot(m, m))
        return (v - per_sample(along, v) * m) / per_sample(identity, v)


def preconditioned(
    epsilon: torch.Tensor, previous: torch.Tensor, state: DenoisingState, damping: float, kappa: float
) -> torch.Tensor:
    """eps' = H^-1 eps, of the length of eps, (B, ...); float32 or wider, as `epsilon`.

    Args:
        epsilon, previous: (B, ...) predicted noise of this step and of the one before.
        damping: lambda relative to the number of dimensions, which |m|^2 is about.
    """
    direction = kappa * previous + (1 - kappa) * epsilon
    count, dimensions = len(epsilon), epsilon[0].numel()
    weight = torch.full((count,), damping * dimensions, dtype=torch.float64, device=epsilon.device)
    operator = DampedRankOneOperator(state, weight, direction)
    product = operator.inverse_product(epsilon, torch.zeros_like(weight))
    size = dot(product, product)
    ratio = torch.where(size > 0, dot(epsilon, epsilon) / torch.where(size > 0, size, 1), 1.0)
    return per_sample(ratio.sqrt(), product) * product


class LMLSchedulerMixin:
    """Adds Levenberg-Marquardt-Langevin directions to a diffusers scheduler: `class X(LMLSchedulerMixin, Parent)`.

    Cost: some inner products a step; no denoiser call. All inner products are accumulated in float64, the rotation is
    done in float32 or wider, so half precision is safe.

    To first order in what the predicted noise has changed by since the step before, D, the direction is
    eps + (kappa/lambda) D without its part along eps: kappa/lambda is what counts, and 0.1, the default, is mild.

    Config, beside the parent's:
        lml_lambda: damping relative to the number of dimensions; the larger, the nearer to the parent.
        lml_kappa: weight of the step before in m; 0 is the parent exactly (a warning says so), because a rank-one
            curvature along eps itself does not turn it.
        lml_freeze: fraction of the first steps that are left to the parent.

    Raises:
        InputError: lambda not positive, kappa outside [0, 1), freeze outside [0, 1].
    """

    _previous_epsilon: torch.Tensor | None = None
    _steps_taken = 0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if LMLSchedulerMixin not in cls.__bases__:
            return  # a subclass of a class that has it all, such as its Fisher version
        parent = cls.__mro__[cls.__mro__.index(LMLSchedulerMixin) + 1]
        cls.__init__ = _init_of(parent)  # type: ignore[method-assign]
        cls.step = _step_of(parent)  # type: ignore[attr-defined]
        cls.set_timesteps = _set_timesteps_of(parent)  # type: ignore[attr-defined]

    def _turned(
        self, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Model output and sample with the noise direction preconditioned."""
        scheduler: Any = self  # the class beside this mixin is diffusers'
        config, dtype = scheduler.config, torch.promote_types(sample.dtype, torch.float32)
        index = noise_schedule(scheduler).start_step(timestep)
        state = state_of(scheduler, sample.to(dtype), model_output.to(dtype), timestep, index)
        epsilon, previous = state.epsilon, self._previous_epsilon
        self._previous_epsilon = epsilon.detach()
        self._steps_taken += 1
        frozen = self._steps_taken <= config.lml_freeze * len(scheduler.timesteps)
        if frozen or previous is None or config.lml_kappa == 0 or not bool((state.level.alpha > 0).all()):
            return model_output, sample
        turned = preconditioned(epsilon, previous.to(epsilon), state, config.lml_lambda, config.lml_kappa)
        original = state.pred_original_sample
        moved = expand(state.level.alpha, original) * original + expand(state.level.sigma, turned) * turned
        noise, clean, identity = state.prediction.output_coefficients(state.level)
        output = expand(noise, turned) * turned + expand(clean, turned) * original + expand(identity, turned) * moved
        return output.to(model_output.dtype), moved.to(sample.dtype)


def _init_of(parent: type) -> Any:
    """The parent's constructor with our options: its signature too, which diffusers reads configs by."""
    parent_init: Any = parent.__init__

    @functools.wraps(parent_init)
    def __init__(self, *args, **kwargs):
        options = {name: float(kwargs.pop(name, default)) for name, default in OPTIONS.items()}
        _check(**options)
        parent_init(self, *args, **kwargs)
        self.register_to_config(**options)

    signature = inspect.signature(parent_init)
    own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=value) for name, value in OPTIONS.items()]
    __init__.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *own])  # type: ignore[attr-defined]
    return __init__


def _step_of(parent: Any) -> Any:
    @functools.wraps(parent.step)
    def step(self, model_output, timestep, sample, *args, **kwargs):
        output, moved = self._turned(model_output, timestep, sample)
        return parent.step(self, output, timestep, moved, *args, **kwargs)

    return step


def _set_timesteps_of(parent: Any) -> Any:
    @functools.wraps(parent.set_timesteps)
    def set_timesteps(self, *args, **kwargs):
        self._previous_epsilon, self._steps_taken = None, 0
        return parent.set_timesteps(self, *args, **kwargs)

    return set_timesteps


def _check(lml_lambda: float, lml_kappa: float, lml_freeze: float) -> None:
    if not 0 < lml_lambda < float("inf"):
        raise InputError(f"`lml_lambda` is {lml_lambda}; allowed: positive, relative to the dimension, such as 1.0.")
    if not 0 <= lml_kappa < 1:
        raise InputError(f"`lml_kappa` is {lml_kappa}; allowed: 0 to below 1, such as 0.1.")
    if not 0 <= lml_freeze <= 1:
        raise InputError(f"`lml_freeze` is {lml_freeze}; allowed: 0 to 1, a fraction of the steps.")
    if lml_kappa == 0:
        warnings.warn(
            "`lml_kappa` is 0: a curvature along the predicted noise alone does not turn it, so this is the parent "
            "scheduler, whatever `lml_lambda`. Pass a positive `lml_kappa`, such as 0.1.",
            stacklevel=3,
        )


class LMLDDIMScheduler(LMLSchedulerMixin, DDIMScheduler):
    """`DDIMScheduler` with Levenberg-Marquardt-Langevin directions, see `LMLSchedulerMixin`."""


class LMLDPMSolverMultistepScheduler(LMLSchedulerMixin, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` (DPM-Solver and DPM-Solver++) with Levenberg-Marquardt-Langevin directions."""


class LMLFlowMatchEulerDiscreteScheduler(LMLSchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with Levenberg-Marquardt-Langevin directions, see `LMLSchedulerMixin`."""


for _class in (LMLDDIMScheduler, LMLDPMSolverMultistepScheduler, LMLFlowMatchEulerDiscreteScheduler):
    _class.__module__ = "diffusers_fisher"  # the public module is what a saved component names
