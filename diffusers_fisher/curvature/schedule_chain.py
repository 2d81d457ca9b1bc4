"""The chain of the training schedule with the variances of the papers on pixel models, and their decoder of 8 bits.

Notation: abar = alpha^2, beta_t = 1 - abar_t/abar_{t-1}, x_t = alpha_t x_0 + sigma_t eps for t = 1..T (the timesteps
0..T-1 of diffusers). The reverse step has the forward posterior's mean at the predicted x_0, and the variance
tilde beta_t = (1 - abar_{t-1})/(1 - abar_t) beta_t ("fixed_small"), beta_t ("fixed_large"; Ho et al., 2006.11239), or
exp(f log beta_t + (1 - f) log tilde beta_t) with f per element by the network ("learned"; Nichol and Dhariwal,
2102.09672). At t = 1 tilde beta is 0, and that of t = 2 takes its place; so it does for "fixed_large".
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..denoiser import Denoiser
from ..errors import UnsupportedError
from ..features import record_outputs
from ..likelihood.bins import bin_positions
from ..likelihood.problem import samples_and_draws
from ..noise import TableSchedule, expand, noise_schedule
from .chain import Chain, divergence
from .options import BoundOptions


class ScheduleChain(Chain):
    """See the head of this file. The predicted x_0 is clipped where the scheduler's `clip_sample` says so."""

    prior = "standard"

    def __init__(self, denoiser: Denoiser, samples: torch.Tensor, options: BoundOptions):
        schedule = noise_schedule(denoiser.scheduler)
        if not isinstance(schedule, TableSchedule):
            raise UnsupportedError(
                f"The variance is '{options.variance}', which needs a variance-preserving schedule; got "
                f"{type(denoiser.scheduler).__name__}. Take variance='optimal'."
            )
        if options.variance == "learned" and schedule.config.get("variance_type") == "learned":
            raise UnsupportedError(
                "The scheduler's `variance_type` is 'learned'; a learned variance is supported as 'learned_range'. "
                "Take variance='optimal'."
            )
        self.denoiser, self.options, self.space = denoiser, options, options.space
        samples, self.draws = samples_and_draws(samples, options.generator, options.keys)
        self._device, self._dtype, self._start = samples.device, samples.dtype, samples.cpu().double()
        self.density, self.variance = "data" if options.bins is None else "bins", options.variance
        if options.bins is not None:
            self._places, self._width = bin_positions(self._start, options.bins)
        log_s = schedule.table()
        self.noise_to_signal = torch.cat([torch.zeros(1, dtype=torch.float64), log_s.exp()])
        alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), torch.sigmoid(-2 * log_s)])
        beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
        posterior = (1 - alpha_bar[:-1]) / torch.sigmoid(2 * log_s) * beta
        posterior[0] = posterior[1]
        # In x~ of the step's end, where all chains are alike.
        self._small, self._large = posterior / alpha_bar[:-1], beta / alpha_bar[:-1]
        self._clip = schedule.config.get("clip_sample_range", 1.0) if schedule.config.get("clip_sample") else math.inf

    def prior_terms(self) -> torch.Tensor:
        level = self.denoiser.level(len(self.noise_to_signal) - 2)
        return divergence(level.sigma.square(), (level.alpha * self._start).square())

    def step_terms(self, step: int, noise: torch.Tensor, draw: int) -> torch.Tensor:
        level = self.denoiser.level(step)
        x = expand(level.alpha, noise) * self._start + expand(level.sigma, noise) * noise
        with torch.no_grad(), record_outputs(self.denoiser.network) as outputs:
            state = self.denoiser.state(x.to(self._dtype).to(self._device), torch.tensor(step, dtype=torch.float32))
        output = state.model_output.cpu()
        original = dataclasses.replace(state, sample=x, model_output=output).pred_original_sample
        error = self._start - original.clamp(-self._clip, self._clip)
        v = self._reverse_variance(step, outputs, error)
        if step == 0:
            if self.options.bins is not None:
                return -bin_log_probability(self._places, error, v.sqrt(), self._width, self.options.bins)
            return (math.log(2 * math.pi) + v.log() + error.square() / v) / 2
        end, begin = (float(self.noise_to_signal[index]) ** 2 for index in (step, step + 1))
        share = 1 - end / begin
        return divergence(end * share / v, share**2 * error.square() / v)

    def _reverse_variance(self, step: int, outputs: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        """Returns the variance of a reverse step, () or (B, ...), in x~ of its end."""
        if self.variance == "fixed_small":
            return self._small[step]
        if self.variance == "fixed_large":
            return self._small[0] if step == 0 else self._large[step]
        if len(outputs) != 1 or outputs[0].shape[1] != 2 * like.shape[1] or len(outputs[0]) != len(like):
            shapes = [tuple(output.shape) for output in outputs]
            raise UnsupportedError(
                f"The variance is 'learned', but the network's outputs are {shapes} for samples {tuple(like.shape)}; "
                "allowed: one output of twice the channels. Take variance='optimal'."
            )
        share = (outputs[0].detach().cpu().double().chunk(2, dim=1)[1] + 1) / 2
        return (share * self._large[step].log() + (1 - share) * self._small[step].log()).exp()


def bin_log_probability(
    places: torch.Tensor, error: torch.Tensor, deviation: torch.Tensor, width: float, bins: int
) -> torch.Tensor:
    """Returns the log probability of bins under a normal law; the first and the last bin have no outer edge.

    Args:
        places: (B, ...) places of the bins among `bins`.
        error: (B, ...) the bins' centres minus the law's mean.
        deviation: standard deviation of the law.
        width: distance of the bins' centres.
    """
    lower = torch.where(places == 0, -torch.inf, (error - width / 2) / deviation)
    upper = torch.where(places == bins - 1, torch.inf, (error + width / 2) / deviation)
    # In the upper tail both distribution functions round to 1, so it is mirrored.
    lower, upper = torch.where(lower > 0, -upper, lower), torch.where(lower > 0, -lower, upper)
    low, high = torch.special.log_ndtr(lower), torch.special.log_ndtr(upper)
    return high + torch.log(-torch.expm1(low - high))
