"""Memorised prompts: the curvature of the conditional law beside that of the unconditional one.

A memorised image is a point around which the conditional density has collapsed. Its Fisher F_c is larger there than
the unconditional F_0 (Jeon et al., ICML 2025, 2412.04140), and so is the distance of the scores, a cheap sign of it
(Wen et al., ICLR 2024).

Notation: x~ = x/alpha, s = sigma/alpha, r = tr Cov[eps|x]/d = 1 - sigma^2 tr F/d. The states between the levels follow
the probability-flow ODE dx~/ds = eps by Euler steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch

from ..arguments import check_generators, check_kinds
from ..denoiser import Denoiser
from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.estimator import FisherEstimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..likelihood.draws import ImageDraws
from ..likelihood.problem import check_samples, place_of, state_at
from ..likelihood.traces import scatter_error
from ..noise import DenoisingState, expand, log_noise_to_signal_range, timestep_at
from ..seeds import content_key
from .memorisation_output import Memorisation

SAME_LEVEL = 1e-9  # in log s, because users compute the ends of the schedule in their own way


@check_kinds
def denoiser_memorisation(
    conditional: Denoiser,
    unconditional: Denoiser,
    noise: torch.Tensor,
    noise_to_signal: float | Sequence[float] | None = None,
    estimator: FisherEstimator | None = None,
    num_probes: int | Literal["auto"] | None = "auto",
    maps: bool = False,
    generator: Generators = None,
    on_step: Callable[[], object] = lambda: None,
) -> Memorisation:
    """Compares the predicted noise and the curvature of two denoisers along runs of the conditional one.

    Every run begins with `noise` at the schedule's highest noise level with a positive alpha, as likelihoods end. So a
    flow model's pure noise is left out.

    Args:
        conditional, unconditional: denoisers at guidance scale 1, with and without the prompts.
        noise: (draws, B, ...) noises of unit variance; half precision becomes float32.
        noise_to_signal: sigma/alpha of the states at which the two are compared, decreasing and within the schedule;
            None: the schedule's highest alone. Where the first is lower, each run takes one evaluation more.
        estimator: makes the traces for both denoisers, so it must have no denoiser of its own. None:
            `FiniteDifferenceFisher()`.
        num_probes: number of random directions per state, the same for both denoisers; None: exact traces; "auto":
            None for trace models, else 1; 0: no traces, the score difference alone.
        maps: whether to keep coordinate-wise differences.
        generator: gives the seed of the directions by one draw.
        on_step: called after every state.

    Returns:
        `Memorisation`. Cost per draw and level: 2 evaluations for the score difference, and with the trace difference
        another 2 per direction (none for trace models). No graph unless the estimator needs one.

    Raises:
        InputError: noises that are not finite or have the wrong shape; levels outside of the schedule; an estimator
            with its own denoiser; denoisers with different schedules.
        NumericalError: a score that is not finite.
    """
    if noise.ndim < 3 or noise.numel() == 0:
        raise InputError(f"`noise` has shape {tuple(noise.shape)}; allowed: (draws, B, ...), at least one of each.")
    check_generators(generator, noise.shape[1])
    noise = check_samples(noise)
    estimator = FiniteDifferenceFisher() if estimator is None else estimator
    num_probes = estimator.default_num_probes if num_probes == "auto" else num_probes
    pair = _Pair(conditional, unconditional, estimator, num_probes, noise, generator)
    grid = level_grid(conditional, unconditional, noise_to_signal)
    before, scores, rests = conditional.num_calls + unconditional.num_calls, [], []
    for draw, start in enumerate(noise):
        for score, rest in pair.differences(start.cpu().double(), grid, draw):
            scores.append(score)
            if rest is not None:
                rests.append(rest)
            on_step()
    calls, count = conditional.num_calls + unconditional.num_calls - before, len(noise)
    by_score = torch.stack(scores).unflatten(0, (count, len(grid)))  # (draws, levels, B, ...)
    by_trace = None if num_probes == 0 else torch.stack(rests).unflatten(0, (count, len(grid)))
    for name, values in (("Score", by_score), ("Trace", by_trace)):
        if values is not None and not torch.isfinite(values).all():
            numbers = _means(values).tolist()
            raise NumericalError(f"{name} differences are not finite: {numbers}. Check both denoisers.")
    parts = None if by_trace is None or not maps else by_trace.mean(1)
    return Memorisation(
        _means(by_score), None if by_trace is None else _means(by_trace), noise, grid.exp(), dims=noise[0, 0].numel(),
        score_calls=count * (2 * len(grid) + pair.leads_in(grid)), num_denoiser_calls=calls,
        trace="none" if by_trace is None else pair.description, score_maps=by_score.mean((0, 1)) if maps else None,
        trace_maps=None if parts is None else parts.mean(0),
        trace_maps_error=None if parts is None else scatter_error(parts),
    )  # fmt: skip


def level_grid(
    conditional: Denoiser, unconditional: Denoiser, noise_to_signal: float | Sequence[float] | None
) -> torch.Tensor:
    """Returns log(sigma/alpha) of the levels, (levels,) float64. Raises `InputError` unless the schedule has them."""
    low, high = log_noise_to_signal_range(conditional.scheduler)
    other = log_noise_to_signal_range(unconditional.scheduler)
    if max(abs(low - other[0]), abs(high - other[1])) > SAME_LEVEL:
        raise InputError(
            f"The denoisers' noise ranges in log(sigma/alpha) are {(low, high)} and {other}; allowed: one schedule "
            "for both. Give both the same scheduler."
        )
    if noise_to_signal is None:
        return torch.tensor([high], dtype=torch.float64)
    numbers = noise_to_signal if isinstance(noise_to_signal, Sequence) else [noise_to_signal]
    grid = torch.tensor([float(number) for number in numbers], dtype=torch.float64).log()
    inside = (grid >= low - SAME_LEVEL) & (grid <= high + SAME_LEVEL)
    if not len(grid) or not bool(inside.all()) or not bool((grid.diff() < 0).all()):
        raise InputError(
            f"`noise_to_signal` is {noise_to_signal}; allowed: numbers from {math.exp(high):.6g} down to "
            f"{math.exp(low):.4g}, decreasing, at least one. None takes the highest."
        )
    return grid.clamp(low, high)


class _Pair:
    """Two denoisers that are evaluated at the same states, in the same random directions."""

    def __init__(
        self, conditional: Denoiser, unconditional: Denoiser, estimator: FisherEstimator, num_probes: int | None,
        noise: torch.Tensor, generator: Generators,
    ):  # fmt: skip
        if num_probes is not None and num_probes < 0:
            raise InputError(
                f"`num_probes` is {num_probes}; allowed: 1 or more, 0 for no traces, None for exact ones."
            )
        self.denoisers, self.num_probes = (conditional, unconditional), num_probes
        self.estimators = [self._bind(estimator, each) for each in self.denoisers] if num_probes != 0 else []
        probes = "no probes" if num_probes is None else f"probes per state: {num_probes}"
        self.description = f"{estimator.description}, {probes}"
        self.needs_graph = bool(self.estimators) and estimator.needs_graph
        self.dtype, self.device = noise.dtype, noise.device
        # The keys are those of the first draw, so that a larger number of draws does not change the first ones.
        self.draws = ImageDraws(noise[0], generator, [content_key(each) for each in noise[0]])
        self.high = log_noise_to_signal_range(conditional.scheduler)[1]

    @staticmethod
    def _bind(estimator: FisherEstimator, denoiser: Denoiser) -> FisherEstimator:
        if estimator.denoisers:
            raise InputError(
                f"{type(estimator).__name__} has a denoiser of its own, but each of the two denoisers needs its own "
                "traces. Pass it without a denoiser."
            )
        if estimator.holds_condition:
            raise InputError(
                f"{type(estimator).__name__} has `pooled` vectors of its own, but each of the two denoisers needs "
                "those of its condition. Pass it without `pooled`."
            )
        return estimator.bind(denoiser)

    def leads_in(self, grid: torch.Tensor) -> bool:
        """Returns whether a run begins at a level that is not among those of `grid`."""
        return float(grid[0]) < self.high - SAME_LEVEL

    def differences(
        self, noise: torch.Tensor, grid: torch.Tensor, draw: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Yields at each level of `grid` the coordinate-wise differences of one run, (B, ...) float64.

        They are (eps_c - eps_0)^2 and sigma^2 (diag F_c - diag F_0), the latter None without traces.

        Args:
            noise: (B, ...) float64, the noise with which the run begins.
            draw: number of the run.
        """
        scheduler, s = self.denoisers[0].scheduler, math.exp(self.high)
        start = self.denoisers[0].level(timestep_at(scheduler, torch.tensor(self.high, dtype=torch.float64)))
        x, epsilon = expand(start.norm / start.alpha, noise) * noise, torch.zeros_like(noise)
        if self.leads_in(grid):
            epsilon = self._epsilon(self._state(0, x, torch.tensor(self.high, dtype=torch.float64)))
        for log_noise in grid:
            x = x + (math.exp(log_noise) - s) * epsilon
            s = math.exp(log_noise)
            states = [self._state(index, x, log_noise) for index in (0, 1)]
            epsilon = self._epsilon(states[0])
            rest = None
            if self.estimators:
                vectors = None
                if self.num_probes is not None:
                    signs = self.draws.signs(self.num_probes, "memorisation", place_of(float(log_noise)), draw)
                    vectors = signs.to(self.dtype).to(self.device)
                left, right = (self._diagonal(index, state, vectors) for index, state in enumerate(states))
                rest = left - right
            yield (epsilon - self._epsilon(states[1])).square(), rest

    def _state(self, index: int, x: torch.Tensor, log_noise: torch.Tensor) -> DenoisingState:
        denoiser = self.denoisers[index]
        timestep = timestep_at(denoiser.scheduler, log_noise)
        return state_at(denoiser, x, timestep, self.dtype, self.device, self.needs_graph)

    @staticmethod
    def _epsilon(state: DenoisingState) -> torch.Tensor:
        return state.epsilon.detach().cpu().double()

    def _diagonal(self, index: int, state: DenoisingState, vectors: torch.Tensor | None) -> torch.Tensor:
        """Returns the diagonal of sigma^2 F, (B, ...) float64."""
        with torch.set_grad_enabled(self.needs_graph):
            diagonal = self.estimators[index](state).diagonal(vectors).value
        return float(state.level.sigma) ** 2 * diagonal.detach().cpu().double()


def _means(values: torch.Tensor) -> torch.Tensor:
    """Returns the means over coordinates of (draws, levels, B, ...), as (levels, draws, B)."""
    return values.flatten(3).mean(3).transpose(0, 1)
