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
"""End of the range of log(sigma/alpha) if the schedule ends in pure noise, whose ratio is infinite: sigma = 0.999."""


class TableSchedule(NoiseSchedule):
    """Describes variance-preserving schedulers with one level per training timestep (DDIM, DDPM, PNDM, LCM, TCD).

    Between two training timesteps log(sigma/alpha) is linear. The levels of a run come from this table by timestep.
    """

    def table(self) -> torch.Tensor:
        """Returns log(sigma/alpha) of every training timestep, (T,) float64, increasing."""
        return log_noise_to_signal_of(self.config, self.scheduler.alphas_cumprod)

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        timestep = as_float64(timestep)
        check_timestep(timestep, self.config["num_train_timesteps"] - 1)
        table, low, fraction = self.table(), timestep.floor().long(), timestep.frac()
        interpolation = (1 - fraction) * table[low] + fraction * table[timestep.ceil().long()]
        return torch.where(fraction == 0, table[low], interpolation)  # 0 * inf would be NaN at zero terminal SNR

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        table, log_s = self.table(), torch.as_tensor(log_s, dtype=torch.float64)
        slack = 1e-9  # rounding of log and exp at the ends of the schedule
        if bool((log_s < table[0] - slack).any() or (log_s > table[-1] + slack).any()):
            raise InputError(
                f"Noise levels log(sigma/alpha) in [{log_s.min():.4f}, {log_s.max():.4f}] leave the schedule's range "
                f"[{table[0]:.4f}, {table[-1]:.4f}]; stay inside it."
            )
        timesteps = numpy.interp(log_s.numpy(), table.numpy(), numpy.arange(len(table)))
        return torch.as_tensor(timesteps, dtype=torch.float64)

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        table = self.table()
        # With zero terminal SNR the schedule ends in pure noise, and the range ends at the last level below the limit.
        ends_below_limit = torch.isfinite(table[-1]) and table[-1] < PURE_NOISE_LIMIT
        return float(table[0]), float(table[-1] if ends_below_limit else table[table < PURE_NOISE_LIMIT][-1])

    def final_level(self) -> NoiseLevel:
        # Some runs end at the first training timestep (set_alpha_to_one=False). DDPM has no such number.
        return NoiseLevel.from_alpha_bar(getattr(self.scheduler, "final_alpha_cumprod", 1.0))

    def spread_timesteps(self, count: int) -> torch.Tensor:
        # The timesteps are whole, because levels at whole timesteps are not interpolated.
        return (torch.linspace(0, 1, count, dtype=torch.float64) * (self.config["num_train_timesteps"] - 1)).round()


class InverseTableSchedule(TableSchedule):
    """Describes runs from data to noise, whose step at a timestep takes the sample one level below it (DDIMInverse).

    The condition of the network is the level at the end of the step, not the level of the sample.
    """

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        below = timestep - self.config["num_train_timesteps"] // self.scheduler.num_inference_steps
        return self.level_at(below) if below >= 0 else NoiseLevel.from_alpha_bar(self.scheduler.initial_alpha_cumprod)

    def level_after_step(self, timestep: Timestep) -> NoiseLevel:
        return self.level_at(timestep)


class SigmaSchedule(RunSigmaSchedule, TableSchedule):
    """Describes variance-preserving solvers whose run keeps sigma/alpha (DPM-Solver, UniPC, DEIS, SA-Solver)."""


class KDiffusionSchedule(RunSigmaSchedule, VarianceExplodingSchedule, TableSchedule):
    """Describes schedulers that carry x/alpha and whose run keeps sigma/alpha (Euler, Heun, LMS)."""


class ContinuousSchedule(KDiffusionSchedule):
    """Changes `KDiffusionSchedule`: the timestep is log(sigma/alpha)/4, as in EDM (`timestep_type="continuous"`)."""

    spread_timesteps = NoiseSchedule.spread_timesteps  # There are no whole timesteps.

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        return 4 * as_float64(timestep)

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(log_s, dtype=torch.float64) / 4

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        low, high = super().log_noise_to_signal_range()
        ends = self.config.get("sigma_min"), self.config.get("sigma_max")
        return math.log(ends[0]) if ends[0] else low, math.log(ends[1]) if ends[1] else high


class KDPM2Schedule(KDiffusionSchedule):
    """Extends `KDiffusionSchedule` by a second stage per step, at a sigma between two of the run's sigmas (KDPM2)."""

    interpolated_offset = 0  # index of a step's intermediate sigma in `sigmas_interpol` minus the step's index

    def level_in_run(self, timestep: Timestep, step_index: int) -> NoiseLevel:
        if self._between_stages:
            return self._level_of_entry(self.scheduler.sigmas_interpol, step_index + self.interpolated_offset)
        return super().level_in_run(timestep, step_index)


class AncestralKDPM2Schedule(KDPM2Schedule):
    """Changes `KDPM2Schedule`: the table of intermediate sigmas starts one entry later (KDPM2Ancestral)."""

    interpolated_offset = -1


class EDMSchedule(RunSigmaSchedule, VarianceExplodingSchedule):
    """Describes schedulers that carry x/alpha for networks with EDM's preconditioning (Karras et al., 2022)."""

    prediction_types = ("epsilon", "v_prediction")

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        return 4 * as_float64(timestep)  # The model's timestep is c_noise = log(sigma)/4.

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
    """Describes flow matching, where x = (1 - sigma) x_0 + sigma eps and the timestep is T sigma.

    The run keeps this sigma and not sigma/alpha, because sigma/(1 - sigma) is infinite where a run begins. The shift
    of a scheduler changes the sigmas of a run, but not the meaning of a timestep.
    """

    is_flow = True

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        timestep, count = as_float64(timestep), self.config["num_train_timesteps"]
        check_timestep(timestep, count)
        return torch.logit(timestep / count)

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(torch.as_tensor(log_s, dtype=torch.float64)) * self.config["num_train_timesteps"]

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        # The range begins at sigma = 1/T, the first timestep above 0. At 0 the logarithm is infinite too.
        return -math.log(self.config["num_train_timesteps"] - 1), PURE_NOISE_LIMIT

    def level_of(self, log_s: torch.Tensor) -> NoiseLevel:
        return self.level_of_sigma(self.sigma_of(log_s))

    def sigma_of(self, log_s: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(log_s)

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(1 - sigma, sigma)

    @property
    def prediction(self) -> Prediction:
        return Prediction("flow_prediction")  # The output is eps - x_0; these schedulers have no setting for it.

    def spread_timesteps(self, count: int) -> torch.Tensor:
        # The schedule includes both ends of the trained range, where the logarithm is infinite.
        return torch.linspace(0, 1, count, dtype=torch.float64) * self.config["num_train_timesteps"]


class ShiftedFlowSchedule(FlowSchedule):
    """Changes `FlowSchedule`: the network's timesteps are those before a shift of the sigmas (CogView4).

    The scheduler's attribute `network_log_shift` is the shift of log(sigma/alpha).
    """

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        return super().log_noise_to_signal_at(timestep) + self.scheduler.network_log_shift

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        return super().timestep_at(torch.as_tensor(log_s, dtype=torch.float64) - self.scheduler.network_log_shift)

    def log_noise_to_signal_range(self) -> tuple[float, float]:
        low, high = super().log_noise_to_signal_range()
        return low + self.scheduler.network_log_shift, high


class ReversedFlowSchedule(FlowSchedule):
    """Changes `FlowSchedule`: timesteps and sigmas run from noise to data (`invert_sigmas=True`, as for Mochi).

    An entry of the run's sigmas is the factor on the clean sample, and the output is x_0 - eps.
    """

    def log_noise_to_signal_at(self, timestep: Timestep) -> torch.Tensor:
        return -super().log_noise_to_signal_at(timestep)

    def timestep_at(self, log_s: torch.Tensor) -> torch.Tensor:
        return super().timestep_at(-torch.as_tensor(log_s, dtype=torch.float64))

    def sigma_of(self, log_s: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(-log_s)

    def level_of_sigma(self, sigma: torch.Tensor) -> NoiseLevel:
        return NoiseLevel(sigma, 1 - sigma)

    @property
    def prediction(self) -> Prediction:
        return Prediction("flow_prediction", is_reversed=True)


class FlowSigmaSchedule(FlowSchedule):
    """Describes flow matching by a solver of the `SigmaSchedule` family whose config has `use_flow_sigmas`."""

    prediction_types = PREDICTION_TYPES
    prediction = NoiseSchedule.prediction  # These solvers have the setting in their config.
