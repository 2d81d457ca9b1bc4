"""An upper bound on -log p by the reverse chain with the optimal variance at every state: no ODE, no graph.

Notation: x~ = x/alpha, s = sigma/alpha, V_t = t^2 - s_0^2. The forward posterior of the chain that starts at the
sample x is q(x_s|x_t, x) = N(a x + (1 - a) x_t, lam I) with a = (V_t - V_s)/V_t and lam = V_s a. The reverse step is
p(x_s|x_t) = N(a m + (1 - a) x_t, v) with m = x_t - V_t eps_theta/t, and its optimal variance is v = lam + a^2 c with
c = E[|x - m|^2 | x_t]/d = V_t - V_t^2 (1 - r)/t^2 = V_t (s_0^2 + V_t r)/t^2 for a perfect eps_theta and
r = tr Cov[eps|x_t]/d (per state: Bao et al., 2201.06503; per element, with the diagonal: Ou et al., 2406.10808).
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.estimator import FisherEstimator
from ..likelihood.bins import offset_bits
from ..likelihood.draws import ImageDraws
from ..likelihood.schemes import noise_grid
from ..likelihood.solver import Integration, Moment, OdeProblem, prepare_problem
from ..noise import expand, timestep_at
from .draws import antithetic_noise, check_draws, draws_error
from .output import LikelihoodBound

Variance = Literal["optimal", "diagonal"]

DEFAULT_STEPS, DEFAULT_DRAWS = 20, 8


@check_kinds
@dataclasses.dataclass(frozen=True)
class BoundOptions:
    """Says how a likelihood is bounded.

    Args:
        variance: "optimal", one number per state from the trace; or "diagonal", one per element from the diagonal.
        num_steps: number of steps of the chain, on the grid of `noise_grid`; at least 1.
        num_draws: number of noises per level: 1, 2, or an even number from 6 on. They are pairs of a noise and its
            negative, and the lengths of the pairs are stratified.
        num_probes: number of random directions of the trace per state; None: the exact trace or diagonal.
        prior_mean, prior_variance, generator, keys, bins, space, on_step: as in `Integration`.
        maps: whether to keep the bound's parts by element of a sample.
    """

    variance: Variance = "optimal"
    num_steps: int = DEFAULT_STEPS
    num_draws: int = DEFAULT_DRAWS
    num_probes: int | None = None
    prior_mean: Moment = None
    prior_variance: Moment = None
    generator: Generators = None
    keys: Sequence[str] | None = None
    bins: int | None = None
    space: str = "latent"
    maps: bool = False
    on_step: Callable[[], object] = lambda: None


@check_kinds
def denoiser_likelihood_bound(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, options: BoundOptions | None = None
) -> LikelihoodBound:
    """Bounds -log p of clean `samples` (B, ...) under the model behind `denoiser` from above.

    The density is that of `integrate_log_likelihood`: of the data smoothed with the schedule's lowest noise, at the
    sample itself. The bound holds for every estimator: a wrong trace loosens it. An image's draws depend on the seed,
    its key, the level and the draw alone. Cost: `num_steps` * `num_draws` evaluations with the estimator's trace at
    each, and no graph unless the estimator needs one.

    Args:
        denoiser: denoiser at guidance scale 1.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every state; one without a denoiser gets this one.
        options: how to bound; None: `BoundOptions()`.

    Raises:
        InputError: a number of steps, draws or probes that is not allowed; else as `integrate_log_likelihood`.
        NumericalError: a bound or a trace that is not finite.
    """
    options = options or BoundOptions()
    if options.num_steps < 1:
        raise InputError(f"`num_steps` is {options.num_steps}; allowed: at least 1, sensibly 20 or more.")
    check_draws(options.num_draws)
    if options.num_probes is not None and options.num_probes < 1:
        raise InputError(f"`num_probes` is {options.num_probes}; allowed: at least 1, or None for the exact trace.")
    integration = Integration(
        options.num_steps, options.num_probes, prior_mean=options.prior_mean, prior_variance=options.prior_variance,
        generator=options.generator, keys=options.keys, bins=options.bins, space=options.space,
    )  # fmt: skip
    problem = prepare_problem(denoiser, samples, estimator, integration)
    return sum_chain(OptimalChain(problem, options), options)


class Chain(abc.ABC):
    """A reverse chain of Gaussian steps from noise to the data, and the terms of its bound.

    Attributes:
        denoiser, draws: evaluates the states, and makes their noise.
        noise_to_signal: (steps + 1,) float64, sigma/alpha of the states, increasing; the first is that of the data.
        density, variance: those of `LikelihoodBound`.
        offset_bits: that of `LikelihoodBound`.
    """

    denoiser: Denoiser
    draws: ImageDraws
    noise_to_signal: torch.Tensor
    density: str
    variance: str
    offset_bits: float = 0.0

    @abc.abstractmethod
    def prior_terms(self) -> torch.Tensor:
        """Returns the divergence of the noise end from the prior, (B, ...) nats by element."""

    @abc.abstractmethod
    def step_terms(self, step: int, noise: torch.Tensor, draw: int) -> torch.Tensor:
        """Returns the terms of one step at one draw of the state that it starts from, (B, ...) nats by element.

        Args:
            step: index of the step; 0 is the one that ends at the data.
            noise: (B, ...) float64, noise of the state.
            draw: index of the draw.
        """

    def clamped_share(self) -> torch.Tensor:
        """Returns the share of the values that were clamped so far, (B,)."""
        return torch.zeros(len(self.prior_terms()), dtype=torch.float64)


def sum_chain(chain: Chain, options: BoundOptions) -> LikelihoodBound:
    """Returns the bound: the chain's terms, averaged over the draws and summed over the steps.

    Raises:
        NumericalError: a bound that is not finite.
    """
    total, before, count, rows = chain.prior_terms(), chain.denoiser.num_calls, options.num_draws, []
    prior = total.flatten(1).sum(1)
    for step, log_noise in enumerate(chain.noise_to_signal[1:].log().tolist()):
        # Rounded, because another way to the same grid may differ in the last digits.
        for draw, noise in enumerate(antithetic_noise(chain.draws, count, f"{log_noise:.9f}")):
            terms = chain.step_terms(step, noise, draw)
            total = total + terms / count
            rows.append(terms.flatten(1).sum(1))
            options.on_step()
    by_draw = torch.stack(rows).unflatten(0, (-1, count))
    value = prior + by_draw.mean(1).sum(0)
    if not torch.isfinite(value).all():
        raise NumericalError(f"Bounds are not finite: {value.tolist()}; terms by step: {by_draw.mean(1).tolist()}.")
    return LikelihoodBound(
        value, draws_error(by_draw, total[0].numel()), prior, by_draw, chain.noise_to_signal, chain.clamped_share(),
        dims=total[0].numel(), num_denoiser_calls=chain.denoiser.num_calls - before, space=options.space,
        density=chain.density, variance=chain.variance, offset_bits=chain.offset_bits,
        maps=total if options.maps else None,
    )  # fmt: skip


class OptimalChain(Chain):
    """The chain in x~ on a grid in log(sigma/alpha), with the optimal variance at every state."""

    density = "smoothed"

    def __init__(self, problem: OdeProblem, options: BoundOptions):
        self.problem, self.options = problem, options
        self.denoiser, self.draws = problem.denoiser, problem.draws
        grid = noise_grid(problem.low, problem.high, options.num_steps)
        self.noise_to_signal = grid.exp()
        self._timesteps = timestep_at(problem.denoiser.scheduler, grid)
        probes = "no probes" if options.num_probes is None else f"probes per state: {options.num_probes}"
        self.variance = f"{options.variance}, {problem.estimator.description}, {probes}"
        self.offset_bits = offset_bits(options.bins)
        self._outside: list[torch.Tensor] = []

    def prior_terms(self) -> torch.Tensor:
        start, total = self.problem.start, self.problem.variance + self._variance(-1) + self._variance_of_data
        distance = (start - self.problem.mean).square() / total
        return divergence(torch.as_tensor(self._variance(-1)) / total, distance).expand_as(start)

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


def divergence(ratio: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
    """Returns KL(N(a, v_1) || N(b, v_2)) in one dimension, nats, from v_1/v_2 and (a - b)^2/v_2."""
    return (ratio - 1 - ratio.log() + distance) / 2
