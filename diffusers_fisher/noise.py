"""Noise levels and prediction types of every supported scheduler family.

Notation: x_t = alpha_t x_0 + sigma_t eps, eps ~ N(0, I); s = sigma/alpha is the noise-to-signal ratio.

"Carried" coordinates are those of the sample that the scheduler's `step` takes and returns: x_t itself for
variance-preserving and flow-matching schedulers, x_t/alpha_t for k-diffusion style and EDM ones.
"""

import dataclasses
import enum
import functools
import math
from typing import Any

import torch

from .errors import InputError, UnsupportedError


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

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


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


@dataclasses.dataclass(frozen=True)
class NoiseLevel:
    """One noise level, or one a sample.

    Args:
        alpha: float64 tensor, shape () or (B,); factor on the clean sample.
        sigma: float64 tensor, same shape; standard deviation of the noise.
    """

    alpha: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def from_log_noise_to_signal(cls, log_s: torch.Tensor) -> "NoiseLevel":
        """The variance-preserving level with log(sigma/alpha) = `log_s`; infinite values are allowed."""
        log_s = torch.as_tensor(log_s, dtype=torch.float64)
        return cls(torch.sigmoid(-2 * log_s).sqrt(), torch.sigmoid(2 * log_s).sqrt())

    @property
    def noise_to_signal(self) -> torch.Tensor:
        """s = sigma/alpha; infinite where alpha is 0."""
        return self.sigma / self.alpha

    @property
    def log_noise_to_signal(self) -> torch.Tensor:
        """log(sigma/alpha)."""
        return self.sigma.log() - self.alpha.log()

    @property
    def norm(self) -> torch.Tensor:
        """sqrt(alpha^2 + sigma^2): 1 for variance-preserving levels."""
        return torch.hypot(self.alpha, self.sigma)

    def scaled(self, factor: torch.Tensor | float) -> "NoiseLevel":
        """The level of the same sample multiplied by `factor`."""
        return NoiseLevel(self.alpha * factor, self.sigma * factor)


def expand(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shapes a level's coefficient to multiply `like` (B, ...) without widening its dtype."""
    if value.ndim == 0:
        return value.to(like.device, like.dtype)
    if value.shape != like.shape[:1]:
        raise InputError(f"A noise level a sample was given for {len(value)} samples, but the batch has {len(like)}.")
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What the raw model output means, as affine relations between sample, output, epsilon and x_0.

    Epsilon and x_0 are each obtained from the raw output, never one from the other, because alpha = 0 exists.

    Args:
        kind: one of `PREDICTION_TYPES`, or "edm" for an output behind EDM's preconditioning (Karras et al., 2022).
        sigma_data: EDM's data standard deviation.
        edm_kind: EDM's own prediction type, "epsilon" or "v_prediction", which decides the sign of the output.
    """

    kind: str
    sigma_data: float = 0.5
    edm_kind: str = "epsilon"

    def epsilon_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) with epsilon = a * sample + b * output."""
        alpha, sigma, norm = level.alpha, level.sigma, level.norm
        if self.kind == "epsilon":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.kind == "v_prediction":
            return sigma / norm**2, alpha / norm
        if self.kind == "flow_prediction":
            return 1 / (alpha + sigma), alpha / (alpha + sigma)
        skip, out = self.original_coefficients(level)
        return (1 - alpha * skip) / sigma, -alpha * out / sigma

    def original_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        """(a, b) with x_0 = a * sample + b * output; infinite for epsilon prediction at alpha = 0."""
        alpha, sigma, norm = level.alpha, level.sigma, level.norm
        if self.kind == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.kind == "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.kind == "v_prediction":
            return alpha / norm**2, -sigma / norm
        if self.kind == "flow_prediction":
            return 1 / (alpha + sigma), -sigma / (alpha + sigma)
        return self._edm_coefficients(level)

    def output_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(a, b, c) with output = a * epsilon + b * x_0 + c * sample; none divides by alpha."""
        alpha, sigma, norm = level.alpha, level.sigma, level.norm
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.kind == "epsilon":
            return one, zero, zero
        if self.kind == "sample":
            return zero, one, zero
        if self.kind == "v_prediction":
            return alpha / norm, -sigma / norm, zero
        if self.kind == "flow_prediction":
            return one, -one, zero
        skip, out = self._edm_coefficients(level)
        return zero, 1 / out, -skip / out

    def _edm_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        """EDM's c_skip and c_out, for a sample carried as x/alpha (alpha = 1) or scaled by the level's alpha."""
        noise_to_signal = level.sigma / level.alpha
        total = noise_to_signal**2 + self.sigma_data**2
        sign = -1.0 if self.edm_kind == "v_prediction" else 1.0
        return self.sigma_data**2 / total / level.alpha, sign * noise_to_signal * self.sigma_data / total.sqrt()


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
