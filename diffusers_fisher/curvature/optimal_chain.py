"""The reverse chain with the optimal variance at every state.

Notation: x~ = x/alpha, s = sigma/alpha, V_t = t^2 - s_0^2. The forward posterior of the chain that starts at the
sample x is q(x_s|x_t, x) = N(a x + (1 - a) x_t, lam I) with a = (V_t - V_s)/V_t and lam = V_s a. The reverse step is
p(x_s|x_t) = N(a m + (1 - a) x_t, v) with m = x_t - V_t eps_theta/t, and its optimal variance is v = lam + a^2 c with
c = E[|x - m|^2 | x_t]/d = V_t - V_t^2 (1 - r)/t^2 = V_t (s_0^2 + V_t r)/t^2 for a perfect eps_theta and
r = tr Cov[eps|x_t]/d (per state: Bao et al., 2201.06503; per element, with the diagonal: Ou et al., 2406.10808).
"""

from __future__ import annotations

import math

import torch

from ..errors import NumericalError
from ..likelihood.bins import offset_bits
from ..likelihood.problem import OdeProblem, prior_name
from ..likelihood.schemes import noise_grid
from ..noise import expand, timestep_at
from .chain import Chain, divergence
from .options import BoundOptions


class OptimalChain(Chain):
    """The chain in x~ on a grid in log(sigma/alpha), with the optimal variance at every state."""

    density = "smoothed"

    def __init__(self, problem: OdeProblem, options: BoundOptions):
        self.problem, self.options = problem, options
        self.denoiser, self.draws = problem.denoiser, problem.draws
        grid = noise_grid(problem.low, problem.high, options.steps)
        self.noise_to_signal = grid.exp()
        self._timesteps = timestep_at(problem.denoiser.scheduler, grid)
        probes = "no probes" if options.num_probes is None else f"probes per state: {options.num_probes}"
        self.variance = f"{options.variance}, {problem.estimator.description}, {probes}"
        self.prior = prior_name(options.prior_mean, options.prior_basis)
        self.space, self.offset_bits = options.space, offset_bits(options.bins)
        self._outside: list[torch.Tensor] = []

    def prior_terms(self) -> torch.Tensor:
        start, gaussian = self.problem.start, self.problem.gaussian
        total = gaussian.variance + self._variance(-1) + self._variance_of_data
        distance = gaussian.squares(start) / total
        terms = divergence(torch.as_tensor(self._variance(-1)) / total, distance).expand_as(start)
        if gaussian.basis is None:
            return terms
        # Terms of frequencies belong to no element: all elements share them.
        return terms.flatten(1).mean(1).view(-1, *[1] * (start.ndim - 1)).expand_as(start)

    def step_terms(self, step: int, noise: torch.Tensor, draw: int) -> torch.Tensor:
        t, end, begin = float(self.noise_to_signal[step + 1]), self._variance(step), self._variance(step + 1)
        share = (begin - end) / begin
        epsilon, r = self._evaluate(step + 1, self.problem.start + math.sqrt(begin) * noise, draw)
        error = math.sqrt(begin) * noise - begin / t * epsilon  # m - x
        spread = begin * (self._variance_of_data + begin * r) / t**2
        if step == 0:
            return (math.log(2 * math.pi) + spread.log() + error.square() / spread) / 2
        v = end * share + share**2 * spread
        return divergence(end * share / v, share**2 * error.square() / v)

    def clamped_share(self) -> torch.Tensor:
        return torch.stack(self._outside).mean(0)

    @property
    def _variance_of_data(self) -> float:
        return float(self.noise_to_signal[0]) ** 2

    def _variance(self, level: int) -> float:
        """Returns V of a level."""
        return float(self.noise_to_signal[level]) ** 2 - self._variance_of_data

    def _evaluate(self, level: int, x: torch.Tensor, draw: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns eps (B, ...) and r (B, 1, ...) or (B, ...) at x~, float64; r is clamped to 0..1."""
        problem, count = self.problem, self.options.num_probes
        with torch.set_grad_enabled(problem.estimator.needs_graph):
            state = problem.state_at(x, self._timesteps[level])
            operator, variance = problem.estimator(state), float(state.level.sigma) ** 2
            vectors = None
            if count is not None:
                place = f"{float(self.noise_to_signal[level].log()):.9f}"
                vectors = problem.draws.signs(count, "probes", place, draw).to(problem.dtype).to(problem.device)
            if self.options.variance == "diagonal":
                rest = variance * operator.diagonal(vectors).value.detach().cpu()
            else:
                trace = operator.trace(vectors).value.detach().cpu() / x[0].numel()
                rest = variance * expand(trace, x)
        r = 1 - rest
        if not torch.isfinite(r).all():
            raise NumericalError(
                f"Unexplained noise fractions at noise-to-signal {float(self.noise_to_signal[level]):.4g} are not "
                f"finite: {r.flatten(1).mean(1).tolist()}. Check the estimator's trace."
            )
        self._outside.append(((r < 0) | (r > 1)).double().flatten(1).mean(1))
        return state.epsilon.detach().cpu().double(), r.clamp(0, 1)
