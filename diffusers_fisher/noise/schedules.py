"""Noise levels and prediction types of every supported scheduler family.

Notation: x_t = alpha_t x_0 + sigma_t eps, eps ~ N(0, I); s = sigma/alpha is the noise-to-signal ratio.

"Carried" coordinates are those of the sample that the scheduler's `step` takes and returns: x_t itself for
variance-preserving and flow-matching schedulers, x_t/alpha_t for k-diffusion style and EDM ones.
"""

import enum
import functools
import math
from typing import Any

import torch

from ..errors import InputError, UnsupportedError
from .level import NoiseLevel
from .prediction import PREDICTION_TYPES, Prediction


class SchedulerFamily(enum.Enum):
    """What coordinates a diffusers scheduler carries its sample in, and where its noise level is kept."""

    TABLE = "variance preserving, level looked up by timestep"
    INVERSE_TABLE = "variance preserving, sample one level below its timestep"
    SIGMAS = "variance preserving, level from the run's sigmas"
    SCALED_SIGMAS = "k-diffusion style: sample divided by alpha"
    EDM = "EDM: sample divided by alpha, preconditioned model"
    FLOW = "flow matching"


FAMILIES = {
    "DDIMScheduler": SchedulerFamily.TABLE,
    "DDPMScheduler": SchedulerFamily.TABLE,
    "DDIMParallelScheduler": SchedulerFamily.TABLE,
    "DDPMParallelScheduler": SchedulerFamily.TABLE,
    "PNDMScheduler": SchedulerFamily.TABLE,
    "LCMScheduler": SchedulerFamily.TABLE,
    "TCDScheduler": SchedulerFamily.TABLE,
    "DDIMInverseScheduler": SchedulerFamily.INVERSE_TABLE,
    "DPMSolverMultistepScheduler": SchedulerFamily.SIGMAS,
    "DPMSolverMultistepInverseScheduler": SchedulerFamily.SIGMAS,
    "DPMSolverSinglestepScheduler": SchedulerFamily.SIGMAS,
    "UniPCMultistepScheduler": SchedulerFamily.SIGMAS,
    "DEISMultistepScheduler": SchedulerFamily.SIGMAS,
    "SASolverScheduler": SchedulerFamily.SIGMAS,
    "EulerDiscreteScheduler": SchedulerFamily.SCALED_SIGMAS,
    "EulerAncestralDiscreteScheduler": SchedulerFamily.SCALED_SIGMAS,
    "HeunDiscreteScheduler": SchedulerFamily.SCALED_SIGMAS,
    "LMSDiscreteScheduler": SchedulerFamily.SCALED_SIGMAS,
    "KDPM2DiscreteScheduler": SchedulerFamily.SCALED_SIGMAS,
    "KDPM2AncestralDiscreteScheduler": SchedulerFamily.SCALED_SIGMAS,
    "EDMEulerScheduler": SchedulerFamily.EDM,
    "EDMDPMSolverMultistepScheduler": SchedulerFamily.EDM,
    "FlowMatchEulerDiscreteScheduler": SchedulerFamily.FLOW,
    "FlowMatchHeunDiscreteScheduler": SchedulerFamily.FLOW,
    "FlowMatchLCMScheduler": SchedulerFamily.FLOW,
}
"""Scheduler family by class name; subclasses inherit their parent's."""


def scheduler_family(scheduler: Any) -> SchedulerFamily:
    """The family of `scheduler`.

    Raises:
        UnsupportedError: its class derives from none of `FAMILIES`.
    """
    for parent in type(scheduler).__mro__:
        if parent.__name__ in FAMILIES:
            return FAMILIES[parent.__name__]
    raise UnsupportedError(
        f"Noise levels of {type(scheduler).__name__} are not known; supported schedulers: {', '.join(FAMILIES)}, and "
        "subclasses of these. Use one of them, such as FisherDDIMScheduler.from_config(scheduler.config)."
    )


def prediction_of(scheduler: Any) -> Prediction:
    """The prediction type that `scheduler` expects of the model.

    Raises:
        UnsupportedError: unknown scheduler or prediction type.
    """
    family = scheduler_family(scheduler)
    if family is SchedulerFamily.FLOW:
        return Prediction("flow_prediction")
    kind = scheduler.config.get("prediction_type", "epsilon")
    if family is SchedulerFamily.EDM and kind in ("epsilon", "v_prediction"):
        return Prediction("edm", float(scheduler.config.sigma_data), kind)
    kind = "sample" if kind == "original_sample" else kind
    flow = bool(scheduler.config.get("use_flow_sigmas", False))
    if kind not in PREDICTION_TYPES or (kind == "flow_prediction" and not flow) or family is SchedulerFamily.EDM:
        raise UnsupportedError(
            f"`prediction_type` of {type(scheduler).__name__} is '{scheduler.config.get('prediction_type')}'; "
            f"supported: {', '.join(PREDICTION_TYPES)} (flow_prediction only with use_flow_sigmas=True; EDM: epsilon, "
            "v_prediction). Set it in the scheduler's config to what the model was trained for."
        )
    return Prediction(kind)


def noise_level(scheduler: Any, timestep: Any, step_index: int | None = None) -> NoiseLevel:
    """Noise level of the sample that `scheduler` carries.

    Args:
        timestep: number or tensor, shape () or (B,), in the model's own unit; fractions are interpolated linearly in
            log(sigma/alpha).
        step_index: the run's own step. Inside a run the level comes from the run's state (Karras sigmas differ from
            their rounded timesteps by up to 4%, second-order schedulers repeat timesteps); None: float64 tables
            recomputed from the config.

    Raises:
        UnsupportedError: unknown scheduler.
        InputError: a timestep outside the schedule.
    """
    family = scheduler_family(scheduler)
    if step_index is not None and family not in (SchedulerFamily.TABLE, SchedulerFamily.INVERSE_TABLE):
        sigma = _run_sigma(scheduler, step_index)
        one = torch.ones_like(sigma)
        if family is SchedulerFamily.FLOW or scheduler.config.get("use_flow_sigmas", False):
            return NoiseLevel(1 - sigma, sigma)
        if family is SchedulerFamily.SIGMAS:
            return NoiseLevel.from_log_noise_to_signal(sigma.log())
        return NoiseLevel(one, sigma)
    if family is SchedulerFamily.INVERSE_TABLE and step_index is not None:
        timestep = timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        if timestep < 0:
            return _level_of_alpha_bar(torch.as_tensor(scheduler.initial_alpha_cumprod, dtype=torch.float64))
    log_s = log_noise_to_signal_at(scheduler, timestep)
    if family is SchedulerFamily.FLOW or scheduler.config.get("use_flow_sigmas", False):
        sigma = torch.sigmoid(log_s)
        return NoiseLevel(1 - sigma, sigma)
    if family in (SchedulerFamily.SCALED_SIGMAS, SchedulerFamily.EDM):
        return NoiseLevel(torch.ones_like(log_s), log_s.exp())
    return NoiseLevel.from_log_noise_to_signal(log_s)


def input_scale(scheduler: Any, level: NoiseLevel) -> torch.Tensor:
    """Factor between the carried sample and what the model is fed (`scale_model_input`), float64."""
    family = scheduler_family(scheduler)
    if family is SchedulerFamily.SCALED_SIGMAS:
        return 1 / level.norm
    if family is SchedulerFamily.EDM:
        return 1 / torch.hypot(level.sigma, torch.full_like(level.sigma, float(scheduler.config.sigma_data)))
    return torch.ones_like(level.alpha)


def _run_sigma(scheduler: Any, step_index: int) -> torch.Tensor:
    """Sigma of the run's current sample; the second stage of KDPM2 lies between two of the run's sigmas."""
    sigmas = scheduler.sigmas
    if not getattr(scheduler, "state_in_first_order", True) and hasattr(scheduler, "sigmas_interpol"):
        sigmas = scheduler.sigmas_interpol
        if any(parent.__name__ == "KDPM2AncestralDiscreteScheduler" for parent in type(scheduler).__mro__):
            step_index -= 1  # its table of intermediate sigmas starts one entry later than KDPM2's
    return sigmas[step_index].detach().double().cpu()


def _level_of_alpha_bar(alpha_bar: torch.Tensor) -> NoiseLevel:
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def log_noise_to_signal_at(scheduler: Any, timestep: Any) -> torch.Tensor:
    """log(sigma/alpha), float64, at (possibly fractional) timesteps of the model, from the config alone."""
    timestep = torch.as_tensor(timestep, dtype=torch.float64).detach().cpu()  # a number must not pass by float32
    family = scheduler_family(scheduler)
    if family is SchedulerFamily.EDM:
        return 4 * timestep  # the model is conditioned on log(sigma)/4 (Karras et al., 2022, table 1)
    count = scheduler.config.num_train_timesteps
    if family is SchedulerFamily.FLOW or scheduler.config.get("use_flow_sigmas", False):
        _check_timestep(timestep, count)
        return torch.logit(timestep / count)
    _check_timestep(timestep, count - 1)
    table = log_noise_to_signal_table(scheduler)
    low, fraction = timestep.floor().long(), timestep.frac()
    between = (1 - fraction) * table[low] + fraction * table[timestep.ceil().long()]
    return torch.where(fraction == 0, table[low], between)  # 0 * inf would be NaN at zero terminal SNR


def log_noise_to_signal_range(scheduler: Any) -> tuple[float, float]:
    """log(sigma/alpha) at the clean and at the noisy end of what the model was trained on, both finite.

    Flow matching and zero terminal SNR end in pure noise, where the ratio is infinite: there the range stops at
    sigma = 0.999 of the whole.
    """
    family = scheduler_family(scheduler)
    limit = math.log(0.999 / 0.001)
    if family is SchedulerFamily.EDM:
        return math.log(scheduler.config.sigma_min), math.log(scheduler.config.sigma_max)
    if family is SchedulerFamily.FLOW or scheduler.config.get("use_flow_sigmas", False):
        return -math.log(scheduler.config.num_train_timesteps - 1), limit
    table = log_noise_to_signal_table(scheduler)
    last = table[-1] if torch.isfinite(table[-1]) and table[-1] < limit else table[table < limit][-1]
    return float(table[0]), float(last)


def timestep_at(scheduler: Any, log_s: torch.Tensor) -> torch.Tensor:
    """The (fractional) timestep, float64, of noise levels log(sigma/alpha); inverse of `log_noise_to_signal_at`.

    Raises:
        InputError: a level outside the schedule.
    """
    import numpy

    log_s = torch.as_tensor(log_s, dtype=torch.float64)
    family = scheduler_family(scheduler)
    if family is SchedulerFamily.EDM:
        return log_s / 4
    if family is SchedulerFamily.FLOW or scheduler.config.get("use_flow_sigmas", False):
        return torch.sigmoid(log_s) * scheduler.config.num_train_timesteps
    table = log_noise_to_signal_table(scheduler)
    slack = 1e-9  # rounding of log and exp at the schedule's own ends
    if bool((log_s < table[0] - slack).any() or (log_s > table[-1] + slack).any()):
        raise InputError(
            f"Noise levels log(sigma/alpha) in [{log_s.min():.4f}, {log_s.max():.4f}] leave the schedule's range "
            f"[{table[0]:.4f}, {table[-1]:.4f}]; stay inside it."
        )
    return torch.as_tensor(numpy.interp(log_s.numpy(), table.numpy(), numpy.arange(len(table))), dtype=torch.float64)


def _check_timestep(timestep: torch.Tensor, last: float) -> None:
    if not bool(((timestep >= 0) & (timestep <= last)).all()):
        raise InputError(f"Timestep {timestep.tolist()} lies outside the schedule; allowed: 0 to {last}.")


def log_noise_to_signal_table(scheduler: Any) -> torch.Tensor:
    """log(sigma/alpha) of every training timestep, (T,) float64, increasing.

    Recomputed from the config, because a float32 `alphas_cumprod` makes 1 - alphas_cumprod[0] wrong by 2.6e-5; where
    the scheduler's own table says otherwise (trained betas, a beta schedule of its own, the floor some put under a
    zero terminal SNR), its table holds.
    """
    own = scheduler.alphas_cumprod.detach().double().cpu()
    own_log = 0.5 * (torch.log1p(-own) - own.log())
    config = scheduler.config
    computed = _computed_table(
        config.get("beta_schedule"),
        float(config.get("beta_start", 0.0)),
        float(config.get("beta_end", 0.0)),
        int(config.num_train_timesteps),
        bool(config.get("rescale_betas_zero_snr", False)),
    )
    if computed is None or config.get("trained_betas") is not None:
        return own_log
    close = ((computed - own_log).abs() < 1e-3) | (computed == own_log)
    return torch.where(close, computed, own_log)


@functools.lru_cache(maxsize=32)
def _computed_table(name: str | None, start: float, end: float, count: int, zero_snr: bool) -> torch.Tensor | None:
    if name == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif name == "scaled_linear":
        betas = torch.linspace(math.sqrt(start), math.sqrt(end), count, dtype=torch.float64) ** 2
    elif name == "squaredcos_cap_v2":
        time = torch.arange(count + 1, dtype=torch.float64) / count
        bars = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = (1 - bars[1:] / bars[:-1]).clamp(max=0.999)
    else:
        return None
    log_bar = torch.log1p(-betas).cumsum(0)
    if zero_snr:  # Lin et al., 2023 (arXiv 2305.08891), algorithm 1
        root = (0.5 * log_bar).exp()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        return 0.5 * (torch.log1p(-(root**2)) - 2 * root.log())
    return 0.5 * (torch.log(-torch.expm1(log_bar)) - log_bar)
