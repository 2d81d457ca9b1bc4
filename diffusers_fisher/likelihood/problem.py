"""What a likelihood by the probability-flow ODE integrates: the samples, the denoiser and the checked options.

Notation: x~ = x/alpha, s = sigma/alpha; r = tr Cov[eps|x]/d, so tr F = d (1 - r)/sigma^2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from ..arguments import check_generators, check_kinds
from ..denoiser import Denoiser
from ..errors import InputError
from ..fisher.estimate import Generators
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..fisher.operator import FisherOperator
from ..noise import DenoisingState, expand, log_noise_to_signal_range
from .bins import dequantised
from .draws import ImageDraws
from .prior import Moment, PriorGaussian, check_prior
from .refinement import MAX_DENOISER_CALLS
from .schemes import DEFAULT_SCHEME
from .trace_check import NUM_CHECKS
from .traces import NodeTrace

MANY_PROBES = 64
"""Number of probes up to which more than the dimensions of a sample are allowed."""


@check_kinds
@dataclasses.dataclass(frozen=True)
class Integration:
    """Says how a log-likelihood is integrated, and of which density.

    Args:
        num_steps: number of steps of the grid in log(sigma/alpha), see `noise_grid`; at least 2.
        num_probes: number of directions of random signs at every node (Hutchinson, 1990); None: the operator's exact
            trace, in closed form or by d products.
        dealt_probes: deal the directions to the nodes by each sample's own variance, `num_probes` per node on average
            and one at least, so that the standard error is smaller for the same cost.
        fixed_probes: take the same directions at all nodes. Their errors then add up over the nodes instead of
            cancelling, and the standard error comes from the scatter of the probes, so it needs two or more.
        prior_mean, prior_variance: moments of the data, which broadcast to one sample; None for both: 0 and 1
            ("standard").
        noised: whether to evaluate at `samples + s_0 * noise` instead of at `samples`.
        step_halving: whether to measure the discretisation error by half as many steps, for half as many evaluations
            again.
        generator: gives the seed of the probes, of the place in the bins and of the noise of `noised`. All of them
            are functions of this seed and of the image alone.
        keys: one key per image, which stands for it in its random draws; None: a key of the sample's values.
        scheme: "euler", "trapezoid", "adams3" or "adams4", of order 1 to 4.
        bins: number of equally spaced values from -1 to 1 on which the samples lie: each is moved to a random point of
            its bin, and `bits_per_dim` is that of the bins. None: that of the density.
        space: "latent" or "pixel", for the output.
        on_step: called after every evaluation.
        tolerance: bits/dim; each sample's grid is refined until its discretisation error is at most this. None: all
            samples have one grid of `num_steps`. With a tolerance that is the first grid, and every further grid has
            twice as many steps.
        max_denoiser_calls: largest number of evaluations per sample along its path with a tolerance; those of the
            trace's directions come on top.
        trace_checks: number of levels at which a trace model is checked by a difference of the denoiser, which costs
            one evaluation each; 0: it is not checked. Traces by probes and exact traces need no check.
        untrusted_trace: what becomes of a sample whose checks disagree with the trace model: "warn" keeps the number
            and states the larger error; "probes" takes the trace by differences at all levels instead.
        max_standard_error: bits/dim; samples with a larger standard error are integrated again with more directions
            per level, up to 64. None: all samples have `num_probes`.
        on_grid: called with the number of evaluations of every grid after the first.
        prior_basis: coordinates of `prior_variance`: "pixel" (the sample's own), or "dct" for variances of the
            coefficients of the discrete cosine transform over the last two axes.
    """

    num_steps: int = 20
    num_probes: int | None = 1
    dealt_probes: bool = False
    fixed_probes: bool = False
    prior_mean: Moment = None
    prior_variance: Moment = None
    noised: bool = False
    step_halving: bool = False
    generator: Generators = None
    keys: Sequence[str] | None = None
    scheme: str = DEFAULT_SCHEME
    bins: int | None = None
    space: str = "latent"
    on_step: Callable[[], object] = lambda: None
    tolerance: float | None = None
    max_denoiser_calls: int = MAX_DENOISER_CALLS
    trace_checks: int = NUM_CHECKS
    untrusted_trace: str = "warn"
    max_standard_error: float | None = None
    on_grid: Callable[[int], object] = lambda number: None
    prior_basis: str = "pixel"


@dataclasses.dataclass(frozen=True)
class OdeProblem:
    """Holds the samples and the denoiser of one likelihood, after all checks and random draws.

    Args:
        denoiser: denoiser at guidance scale 1; a guided output is the score of no density.
        start: (B, ...) float64, the points whose density is computed; on the CPU, because some devices have no
            float64.
        device, dtype: those of the denoiser's inputs.
        estimator: gives the trace at every node, with its denoiser.
        draws: makes the directions of the trace.
        low, high: log(sigma/alpha) at the ends.
        gaussian: stands for the data at the noise end.
        calls_before: the denoiser's `num_calls` before the integration.
        integration: the caller's options.
    """

    denoiser: Denoiser
    start: torch.Tensor
    device: torch.device
    dtype: torch.dtype
    estimator: FisherEstimator
    draws: ImageDraws
    low: float
    high: float
    gaussian: PriorGaussian
    calls_before: int
    integration: Integration

    def evaluate(self, x: torch.Tensor, timestep: torch.Tensor, log_noise: float, checks: int = 0) -> Node:
        """Evaluates the denoiser and the trace at x~ = `x`, (B, ...) float64, and log s = `log_noise`.

        Args:
            checks: number of directions by which the trace is also taken by differences, to check a trace model.
        """
        with torch.set_grad_enabled(self.estimator.needs_graph):
            state = self.state_at(x, timestep)
            operator, factor = self.estimator(state), float(state.level.sigma) ** 2 / x[0].numel()
            # Dealt directions are added when the grid is done, and one per level says where.
            count = 1 if self.integration.dealt_probes else self.integration.num_probes
            place = place_of(log_noise)
            if count is None:
                trace = NodeTrace.exact(factor * operator.trace().value.cpu())
            else:
                place = "fixed" if self.integration.fixed_probes else place
                trace = self._sampled(operator, factor, count, "probes", place)
            check = None
            if checks:
                differences = FiniteDifferenceFisher(self.denoiser)(state)
                check = self._sampled(differences, factor, checks, "trace check", place)
        self.integration.on_step()
        kept = state.detached() if self.integration.dealt_probes else None
        return Node(state.epsilon.detach().cpu().double(), trace, check, kept)

    def state_at(self, x: torch.Tensor, timestep: torch.Tensor) -> DenoisingState:
        """Evaluates the denoiser at x~ = `x`, (B, ...) float64, with a graph where the estimator differentiates it."""
        return state_at(self.denoiser, x, timestep, self.dtype, self.device, self.estimator.needs_graph)

    def _trace_along(self, operator: FisherOperator, factor: float, vectors: torch.Tensor) -> NodeTrace:
        products = operator.products(vectors.to(self.dtype).to(self.device)).detach().cpu().double()
        return NodeTrace.sampled(vectors, factor * products)

    def _sampled(self, operator: FisherOperator, factor: float, count: int, purpose: str, place: str) -> NodeTrace:
        """Returns the trace by `count` random directions, which belong to a purpose and a place on the grid."""
        return self._trace_along(operator, factor, self.draws.signs(count, purpose, place))

    def trace_by_probe(self, state: DenoisingState, log_noise: float, probe: int) -> NodeTrace:
        """Returns the trace at a node's state by its direction number `probe` alone."""
        with torch.set_grad_enabled(self.estimator.needs_graph):
            operator, factor = self.estimator(state), float(state.level.sigma) ** 2 / state.sample[0].numel()
            vectors = self.draws.signs_of_probe(probe, "probes", place_of(log_noise))[None]
            return self._trace_along(operator, factor, vectors)

    def select_samples(self, rows: torch.Tensor) -> OdeProblem:
        """Returns the problem of some of the samples, with the same draws; `rows` (n,) int64 are their places."""
        selected = self.denoiser.select_samples(rows)
        estimator = self.estimator.select_samples(
            rows, lambda each: selected if each is self.denoiser else each.select_samples(rows)
        )
        return dataclasses.replace(
            self, denoiser=selected, start=self.start[rows], estimator=estimator,
            draws=self.draws.select_samples(rows), calls_before=selected.num_calls,
        )  # fmt: skip

    def with_probes(self, rows: torch.Tensor, count: int) -> OdeProblem:
        """Returns the problem of some of the samples, with `count` directions per level."""
        options = dataclasses.replace(self.integration, num_probes=count)
        return dataclasses.replace(self.select_samples(rows), integration=options)

    def by_differences(self, rows: torch.Tensor) -> OdeProblem:
        """Returns the problem of some of the samples, with the trace by one difference of the denoiser per level."""
        selected = self.select_samples(rows)
        options = dataclasses.replace(self.integration, num_probes=1, fixed_probes=False, dealt_probes=False)
        return dataclasses.replace(selected, estimator=FiniteDifferenceFisher(selected.denoiser), integration=options)

    def prior(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the log density of the Gaussian at the noise end, (B,) nats."""
        return self.gaussian.log_density(x, math.exp(self.high))

    def prior_error(self, x: torch.Tensor, node: Node) -> torch.Tensor:
        """Returns how far `prior` is from the model's own law, (B,) nats, by `node` at x~ = `x` at the noise end."""
        return self.gaussian.error(x, math.exp(self.high), node.epsilon, node.trace.rest)


@dataclasses.dataclass(frozen=True)
class Node:
    """Holds eps (B, ...) float64 and the trace at one node of the grid, and the trace by which it is checked.

    `state` is kept where more directions are dealt to the node.
    """

    epsilon: torch.Tensor
    trace: NodeTrace
    check: NodeTrace | None = None
    state: DenoisingState | None = None

    def state_of(self, rows: torch.Tensor) -> DenoisingState:
        """Returns the state of some of the samples; `rows` (n,) int64 are their places in the batch."""
        assert self.state is not None  # kept where directions are dealt
        return self.state.select_samples(rows)


def place_of(log_noise: float) -> str:
    """Returns the name of a place on the grid for its random draws. It is rounded, because another way to the same
    grid may differ in the last digits."""
    return f"{log_noise:.9f}"


def state_at(
    denoiser: Denoiser, x: torch.Tensor, timestep: torch.Tensor, dtype: torch.dtype, device: torch.device,
    needs_graph: bool = False,
) -> DenoisingState:  # fmt: skip
    """Evaluates the denoiser at x~ = `x`, (B, ...) float64, by an input of this dtype and device."""
    alpha = denoiser.level(timestep).alpha
    with torch.set_grad_enabled(needs_graph):
        model_input = (expand(alpha, x) * x).to(dtype).to(device).requires_grad_(needs_graph)
        return denoiser.state(model_input, timestep.to(torch.float32))


def prepare_problem(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration
) -> OdeProblem:
    """Checks what is to be integrated, and makes all random draws. Raises as `integrate_log_likelihood`."""
    samples, draws = samples_and_draws(samples, integration.generator, integration.keys)
    if integration.num_probes is not None and integration.num_probes > max(samples[0].numel(), MANY_PROBES):
        raise InputError(
            f"`num_probes` is {integration.num_probes} for samples of {samples[0].numel()} dimensions; pass None for "
            "the exact trace, which costs fewer products."
        )
    if integration.num_probes is not None and integration.num_probes < 1:
        raise InputError(
            f"`num_probes` is {integration.num_probes}; allowed: at least 1, or None for the exact trace."
        )
    gaussian = check_prior(
        samples.shape[1:], integration.prior_mean, integration.prior_variance, integration.prior_basis
    )
    if check_estimator(estimator).needs_graph and torch.is_inference_mode_enabled():
        raise InputError(
            f"{type(estimator).__name__} differentiates the denoiser, which torch.inference_mode forbids even inside "
            "enable_grad; use torch.no_grad instead, or FiniteDifferenceFisher, which needs no graph."
        )
    estimator = estimator.bind(denoiser)
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    start = samples.cpu().double()
    if integration.bins is not None:
        start = dequantised(start, integration.bins, draws.generators("bins"))
    if integration.noised:
        start = start + math.exp(low) * draws.normal("noise")
    return OdeProblem(
        denoiser,
        start,
        samples.device,
        samples.dtype,
        estimator,
        draws,
        low,
        high,
        gaussian,
        denoiser.num_calls,
        integration,
    )


def check_dealt_probes(dealt_probes: bool, num_probes: int | None, fixed_probes: bool) -> None:
    """Checks the option that deals directions to the levels. Raises `InputError` without directions to be dealt."""
    if dealt_probes and (num_probes is None or num_probes < 2 or fixed_probes):
        given = "the same ones at all levels" if fixed_probes else num_probes
        raise InputError(
            "`dealt_probes` deals the random directions beyond one per level to the levels that need them, but "
            f"`num_probes` is {given}. Pass `num_probes=2` or more with an estimator like FiniteDifferenceFisher()."
        )


def check_standard_error(largest: float | None, num_probes: int | None, fixed_probes: bool) -> None:
    """Checks the largest standard error that a caller allows.

    Raises:
        InputError: it is not positive, or the trace is not by fresh probes, whose number could reach it.
    """
    if largest is None:
        return
    if not largest > 0:
        raise InputError(f"`max_standard_error` is {largest}; allowed: a positive number of bits/dim, such as 0.01.")
    if num_probes is None or fixed_probes:
        raise InputError(
            "`max_standard_error` adds random directions, but this trace has "
            f"{'none' if num_probes is None else 'the same ones at all levels'}. Pass `num_probes=1` with an "
            "estimator such as FiniteDifferenceFisher(), or leave it out."
        )


def prior_name(mean: Moment, basis: str) -> str:
    """Returns the name of the prior in outputs."""
    if mean is None:
        return "standard"
    return "moment-matched" if basis == "pixel" else "spectral"


def samples_and_draws(
    samples: torch.Tensor, generator: Generators, keys: Sequence[str] | None
) -> tuple[torch.Tensor, ImageDraws]:
    """Returns the samples, see `check_samples`, and what makes their random draws. Raises `InputError`."""
    samples = check_samples(samples)
    check_generators(generator, len(samples))
    if keys is not None and len(keys) != len(samples):
        raise InputError(f"{len(keys)} image keys were given for {len(samples)} images; give as many.")
    return samples, ImageDraws(samples, generator, keys)


def check_samples(samples: torch.Tensor) -> torch.Tensor:
    """Returns `samples` (B, ...) in float32 or wider, detached. Raises `InputError` unless they are finite floats."""
    if samples.ndim < 2 or samples.numel() == 0:
        raise InputError(f"Samples have shape {tuple(samples.shape)}; allowed: (B, ...), a batch of at least one.")
    if not samples.is_floating_point() or not torch.isfinite(samples).all():
        raise InputError(
            f"Samples of shape {tuple(samples.shape)} and dtype {samples.dtype} must be finite floating-point "
            "numbers; NaN usually comes from images outside [0, 1] or a half-precision autoencoder."
        )
    return samples.detach().to(torch.promote_types(samples.dtype, torch.float32))


def standard_noise(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Draws standard normal noise in the shape and dtype of `like`, and returns it in float64 on the CPU."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype).cpu().double()
