"""Stochastic sampling whose noise has the optimal variance at every step.

Notation: x_t = alpha x_0 + sigma eps at the step's level, and alpha', sigma' at the next one; t = sigma/alpha,
s = sigma'/alpha'. A step draws from the mean over x_0 ~ p(x_0|x_t) of the posterior

    q(x_s|x_t, x_0) = N(alpha' x_0 + sqrt(sigma'^2 - eta^2 lam) eps, eta^2 lam I),  lam = sigma'^2 (1 - s^2/t^2),

whose eps is (x_t - alpha x_0)/sigma: eta is 1 for DDPM and 0 for DDIM. The best Gaussian for this mean has its first
two moments: x_0 replaced by E[x_0|x_t], and the variance v = eta^2 lam + k^2 c with
k = alpha' - sqrt(sigma'^2 - eta^2 lam) alpha/sigma and c = tr Cov[x_0|x_t]/d = t^2 r (Bao et al., Analytic-DPM,
2201.06503), or with the diagonal of Cov[x_0|x_t] one variance per element (Ou et al., 2406.10808).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, DDPMSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor

from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators, rademacher
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.level import LevelFisher
from ..noise import DenoisingState, NoiseLevel, RunSigmaSchedule, Timestep, expand, noise_schedule, state_of
from .config_options import add_config_options

OPTIONS = {
    "noise_to_signal": None, "unexplained_noise_fraction": None, "eta": 1.0, "noise_last_step": False,
    "per_element": False, "num_probes": None, "data_variance": 1.0,
}  # fmt: skip

TABLE = ("noise_to_signal", "unexplained_noise_fraction")


class OptimalVarianceSchedulerMixin:
    """Makes the steps of a diffusers scheduler stochastic, with the optimal variance: `class X(ThisMixin, Parent)`.

    The parent gives the timesteps, the levels and the prediction type. Its other options, such as clipping and learned
    variances, do not apply. The variance comes from a table of r by noise level in the config (`fit_level_fisher`
    makes one), or from an estimator that `set_estimator` sets: a trace model, or probes of a `PipelineDenoiser`. With
    classifier-free guidance the mean is that of the guided network, whose law has no such variance: the variance
    remains that of the unguided one. A pipeline that gives its scheduler no generator (Stable Diffusion 3) leaves the
    noise to torch's default one.

    Cost: that of the parent with a table; else one evaluation of the estimator's trace per step.

    Config, in addition to the parent's config:
        noise_to_signal, unexplained_noise_fraction: lists of sigma/alpha, increasing, and of r there; None: the
            variance comes from an estimator. Above the last level the variance of x_0 stays what it is there.
        eta: from 0 (only what x_0 leaves open) to 1 (DDPM).
        noise_last_step: whether the last step, to a level without noise, draws noise too. Without it the result is the
            mean E[x_0|x_t], as in diffusers.
        per_element: one variance per element of a sample, from the estimator's diagonal.
        num_probes: number of random directions of an estimator's trace or diagonal; None: exact.
        data_variance: variance of an element of x_0, for states of pure noise (alpha = 0), where only the data's own
            variance is left.

    Raises:
        InputError: half a table or one that is not increasing, `eta` outside of 0 to 1, no source of the variance.
        NumericalError: a variance that is not finite.
    """

    _estimator: FisherEstimator | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if OptimalVarianceSchedulerMixin not in cls.__bases__:
            return  # a subclass, such as the Fisher version, inherits these methods
        # Any: diffusers' schedulers have no base class with these methods.
        parent: Any = cls.__mro__[cls.__mro__.index(OptimalVarianceSchedulerMixin) + 1]
        add_config_options(cls, parent, OPTIONS, _check)

        @functools.wraps(parent.step)
        def step(self, model_output, timestep, sample, *args, generator=None, return_dict=True, **kwargs):
            result, original = self._step(model_output, timestep, sample, generator)
            return DDPMSchedulerOutput(result, original) if return_dict else (result, original)

        cls.step = step  # type: ignore[attr-defined]

    def set_estimator(self, estimator: FisherEstimator) -> Self:
        """Takes the variance from an estimator of the diffusion Fisher in the table's place. It is not saved."""
        self._estimator = check_estimator(estimator)
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        """Copies the scheduler without the estimator's networks, which both then share."""
        duplicate = copy.copy(self)
        if self._estimator is not None:
            memo[id(self._estimator)] = self._estimator
        duplicate.__dict__ = copy.deepcopy(self.__dict__, memo)
        return duplicate

    def _step(
        self, model_output: torch.Tensor, timestep: Timestep, sample: torch.Tensor, generator: Generators
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the next sample and the predicted x_0, in the dtype of `sample`; computed in float32 or wider."""
        scheduler: Any = self  # Any: the second base class is one of diffusers' schedulers
        schedule, dtype = noise_schedule(scheduler), torch.promote_types(sample.dtype, torch.float32)
        index = schedule.start_step(timestep)
        state = state_of(scheduler, sample.to(dtype), model_output.to(dtype), timestep, index)
        if isinstance(schedule, RunSigmaSchedule):
            scheduler._step_index += 1
        after = schedule.level_after_step(timestep)
        original = state.pred_original_sample
        kept, own = _kept_noise(state.level, after, float(scheduler.config.eta))
        result = expand(after.alpha, original) * original + expand(kept, original) * state.epsilon
        if float(after.sigma) > 0 or scheduler.config.noise_last_step:
            factor = after.alpha - kept * state.level.alpha / state.level.sigma
            variance = own + expand(factor.square(), original) * self._clean_variance(state, generator)
            if not torch.isfinite(variance).all():
                raise NumericalError(f"The variance of the step at timestep {timestep} is not finite.")
            noise = randn_tensor(original.shape, generator=generator, device=original.device, dtype=dtype)
            result = result + variance.sqrt().to(original) * noise
        return result.to(sample.dtype), original.to(sample.dtype)

    def _clean_variance(self, state: DenoisingState, generator: Generators) -> torch.Tensor:
        """Returns the variance of the elements of x_0 at a state, (B, 1, ...) or (B, ...) float64 on the CPU."""
        config = self.config  # type: ignore[attr-defined]
        ones = torch.ones(len(state.sample), *[1] * (state.sample.ndim - 1), dtype=torch.float64)
        if self._estimator is None:
            table = LevelFisher(*(torch.tensor(config[name]) for name in TABLE)) if config[TABLE[0]] else None
            if table is None:
                raise InputError(
                    f"{type(self).__name__} has no source of its variance. Pass `noise_to_signal` and "
                    "`unexplained_noise_fraction` of a table (`fit_level_fisher`), or call `set_estimator`."
                )
            # Above the table the posterior is that of its last level: nothing more is known of x_0 there.
            ratio = state.level.noise_to_signal.cpu().clamp_max(table.noise_to_signal[-1])
            fraction = table.fraction_at(ratio.log()).clamp(0, 1)
            return expand(fraction * ratio.square(), ones) * ones
        if float(state.level.alpha.min()) == 0:
            return config["data_variance"] * ones
        operator = self._estimator(state)
        count, variance = config["num_probes"], state.level.sigma.cpu().square()
        probes = None if count is None else rademacher(count, state.sample, generator)
        if config["per_element"]:
            rest = expand(variance, state.sample.cpu()) * operator.diagonal(probes).value.detach().cpu().double()
        else:
            trace = operator.trace(probes).value.detach().cpu().double() / state.sample[0].numel()
            rest = expand(variance * trace, ones) * ones
        return expand(state.level.noise_to_signal.cpu().square(), ones) * (1 - rest).clamp(0, 1)


def _kept_noise(level: NoiseLevel, after: NoiseLevel, eta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns sqrt(sigma'^2 - eta^2 lam) and eta^2 lam."""
    ratio = after.noise_to_signal / level.noise_to_signal  # 0 from pure noise and to no noise
    own = eta**2 * after.sigma.square() * (1 - ratio.square()).clamp_min(0)
    return (after.sigma.square() - own).clamp_min(0).sqrt(), own


def _check(
    noise_to_signal: Sequence[float] | None, unexplained_noise_fraction: Sequence[float] | None, eta: float,
    noise_last_step: bool, per_element: bool, num_probes: int | None, data_variance: float,
) -> None:  # fmt: skip
    """Checks the options. Raises `InputError`."""
    if (noise_to_signal is None) != (unexplained_noise_fraction is None):
        raise InputError("Give both `noise_to_signal` and `unexplained_noise_fraction` of a table, or neither.")
    if noise_to_signal is not None:
        LevelFisher(torch.tensor(noise_to_signal), torch.tensor(unexplained_noise_fraction))  # checks the table
    if not 0 <= eta <= 1:
        raise InputError(f"`eta` is {eta}; allowed: 0 to 1.")
    if num_probes is not None and num_probes < 1:
        raise InputError(f"`num_probes` is {num_probes}; allowed: at least 1, or None for the exact trace.")
    if not data_variance > 0:
        raise InputError(f"`data_variance` is {data_variance}; allowed: above 0.")


class OptimalVarianceDDPMScheduler(OptimalVarianceSchedulerMixin, DDPMScheduler):
    """`DDPMScheduler` with the optimal variance at any number of steps, see `OptimalVarianceSchedulerMixin`."""


class OptimalVarianceFlowMatchScheduler(OptimalVarianceSchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` as a stochastic chain, see `OptimalVarianceSchedulerMixin`."""


def optimal_variance_scheduler(
    scheduler: SchedulerMixin, table: LevelFisher
) -> OptimalVarianceDDPMScheduler | OptimalVarianceFlowMatchScheduler:
    """Returns the stochastic scheduler of the same noise schedule, with the variance of a table.

    Args:
        scheduler: a pipeline's scheduler; it is not changed.
        table: r by noise level, see `fit_level_fisher`.
    """
    schedule = noise_schedule(scheduler)
    cls: Any = OptimalVarianceFlowMatchScheduler if schedule.is_flow else OptimalVarianceDDPMScheduler
    options = {name: getattr(table, name).tolist() for name in TABLE}
    return cls.from_config(schedule.config, **options)


for _class in (OptimalVarianceDDPMScheduler, OptimalVarianceFlowMatchScheduler):
    _class.__module__ = "diffusers_fisher"  # a saved component names the public module
