"""Noise schedules of diffusers' schedulers, one class per family.

Notation: s = sigma/alpha is the noise-to-signal ratio, alpha_bar = alpha^2 of a variance-preserving sample.
"""

import math

import numpy
import torch

from ..errors import InputError
from .level import NoiseLevel, Timestep
from .prediction import PREDICTION_TYPES, Prediction
from .schedule import NoiseSchedule, RunSigmaSchedule, VarianceExplodingSchedule, as_float64, check_timestep
from .tables import log_noise_to_signal_of

PURE_NOISE_LIMIT = math.log(0.999 / 0.001)
"""Where ranges of log(sigma/alpha) stop if the schedule ends in pure noise, whose ratio is infinite: sigma = 0.999."""


class TableSchedule(NoiseSchedule):
    """Variance preserving, one level per training timestep (DDIM, DDPM, PNDM, LCM, TCD).

    Between two training timesteps log(sigma/alpha) is linear. A run looks its levels up by timestep in this table.
    """

    def table(self) -> torch.Tensor:
        """log(sigma/alpha) of every training timestep, (T,) float64, increasing."""
        return log_noise_to_signal_of(self.config, self.scheduler.alphas_cumprod)

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        timestep = as_float64(timestep)
        check_timestep(timestep, self.config["num_train_timesteps"] - 1)
        table, low, fraction = self.table(), timestep.floor().long(), timestep.frac()
        between = (1 - fraction) * table[low] + fraction * table[timestep.ceil().long()]
        return torch.where(fraction == 0, table[low], between)  # 0 * inf would be NaN at zero terminal SNR

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        table, log_s = self.table(), torch.as_tensor(log_s, dtype=torch.float64)
        slack = 1e-9  # rounding of log and exp at the schedule's own ends
        if bool((log_s < table[0] - slack).any() or (log_s > table[-1] + slack).any()):
            raise InputError(
                f"Noise levels log(sigma/alpha) in [{log_s.min():.4f}, {log_s.max():.4f}] leave the schedule's range "
                f"[{table[0]:.4f}, {table[-1]:.4f}]; stay inside it."
            )
        timesteps = numpy.interp(log_s.numpy(), table.numpy(), numpy.arange(len(table)))
        return torch.as_tensor(timesteps, dtype=torch.float64)

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        table = self.table()
        # Zero terminal SNR ends in pure noise: there the range ends with the last level below the limit.
        below = torch.isfinite(table[-1]) and table[-1] < PURE_NOISE_LIMIT
        return float(table[0]), float(table[-1] if below else table[table < PURE_NOISE_LIMIT][-1])

    def final_level(self) -> NoiseLevel:
        # Some end at the first training timestep (set_alpha_to_one=False); DDPM, without this number, ends clean.
        return NoiseLevel.from_alpha_bar(getattr(self.scheduler, "final_alpha_cumprod", 1.0))

    def spread_timesteps(self, count: int) -> torch.Tensor:
        # Whole timesteps, where every schedule has a level of its own and nothing is interpolated.
        return (torch.linspace(0, 1, count, dtype=torch.float64) * (self.config["num_train_timesteps"] - 1)).round()


class InverseTableSchedule(TableSchedule):
    """Variance preserving, from data to noise: a step at a timestep takes the sample one level below it (DDIMInverse).

    The network is conditioned on the level that the step goes to, not on that of the sample.
    """

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        below = timestep - self.config["num_train_timesteps"] // self.scheduler.num_inference_steps
        return self.level_at(below) if below >= 0 else NoiseLevel.from_alpha_bar(self.scheduler.initial_alpha_cumprod)

    def level_after_step(self, timestep: Timestep) -> NoiseLevel:
        return self.level_at(timestep)


class SigmaSchedule(RunSigmaSchedule, TableSchedule):
    """Variance preserving, a run's levels from its sigmas, each sigma/alpha (DPM-Solver, UniPC, DEIS, SA-Solver)."""


class KDiffusionSchedule(RunSigmaSchedule, VarianceExplodingSchedule, TableSchedule):
    """The sample divided by alpha, a run's levels from its sigmas, each sigma/alpha (Euler, Heun, LMS)."""


class KDPM2Schedule(KDiffusionSchedule):
    """As `KDiffusionSchedule`, with a second stage per step at a sigma between two of the run's sigmas (KDPM2)."""

    interpolated_offset = 0  # place of a step's intermediate sigma in `sigmas_interpol`, from the step's index

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        if self._between_stages:
            return self._level_of_entry(self.scheduler.sigmas_interpol, step_index + self.interpolated_offset)
        return super().level_in_run(timestep, step_index)


class AncestralKDPM2Schedule(KDPM2Schedule):
    """As `KDPM2Schedule`; the table of intermediate sigmas starts one entry later (KDPM2Ancestral)."""

    interpolated_offset = -1


class EDMSchedule(RunSigmaSchedule, VarianceExplodingSchedule):
    """The sample divided by alpha, the network behind EDM's preconditioning (Karras et al., 2022, table 1)."""

    prediction_types = ("epsilon", "v_prediction")

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        return 4 * as_float64(timestep)  # the model is conditioned on c_noise = log(sigma)/4

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(log_s, dtype=torch.float64) / 4

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        return math.log(self.config["sigma_min"]), math.log(self.config["sigma_max"])

    def input_scale(self, level: NoiseLevel) -> torch.Tensor:
        # c_in: the network's input has variance 1 on data of deviation sigma_data.
        return 1 / torch.hypot(level.sigma, torch.full_like(level.sigma, float(self.config["sigma_data"])))

    @property
    def prediction(self) -> Prediction:
        return Prediction("edm", float(self.config["sigma_data"]), self._prediction_type())


class FlowSchedule(RunSigmaSchedule):
    """Flow matching: x = (1 - sigma) x_0 + sigma eps, and the timestep is sigma in units of 1/T.

    The run's sigmas are this sigma, not sigma/alpha: sigma/(1 - sigma) is infinite where a run begins. The shift that
    schedulers apply moves a run's sigmas, not the meaning of a timestep.
    """

    is_flow = True

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        timestep, count = as_float64(timestep), self.config["num_train_timesteps"]
        check_timestep(timestep, count)
        return torch.logit(timestep / count)

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.as_tensor(log_s, dtype=torch.float64)) * self.config["num_train_timesteps"]

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        # From sigma = 1/T, the first timestep above 0, whose logarithm is infinite too.
        return -math.log(self.config["num_train_timesteps"] - 1), PURE_NOISE_LIMIT

    def level_of(self, log_s: torch.Tensor) -> NoiseLevel:
        return self.level_of_sigma(torch.sigmoid(log_s))

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(1 - sigma, sigma)

    @property
    def prediction(self) -> Prediction:
        return Prediction("flow_prediction")  # eps - x_0; these schedulers have no such setting

    def spread_timesteps(self, count: int) -> torch.Tensor:
        # Both ends of the trained range, where the logarithm is infinite, belong to the schedule.
        return torch.linspace(0, 1, count, dtype=torch.float64) * self.config["num_train_timesteps"]


class FlowSigmaSchedule(FlowSchedule):
    """Flow matching by a solver of the `SigmaSchedule` family whose config says `use_flow_sigmas`."""

    prediction_types = PREDICTION_TYPES
    prediction = NoiseSchedule.prediction  # from the config, which such solvers have
