"""Likelihood by the probability-flow ODE, integrated in log(sigma/alpha).

Notation: x~ = x/alpha, s = sigma/alpha; the ODE is dx~/d(log s) = s eps(x~, s), the same for every schedule
(Song et al., 2011.13456; Karras et al., 2206.00364). r = tr Cov[eps|x]/d, so tr F = d (1 - r)/sigma^2 and
log p~_{s_0}(x~_0) = log p~_{s_T}(x~_T) + d * integral of (1 - r) d(log s).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence

import torch

from ..arguments import check_generators, check_kinds
from ..denoiser import Denoiser
from ..errors import CoarseGridWarning, InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.estimator import FisherEstimator, check_estimator
from ..noise import expand, log_noise_to_signal_range, timestep_at
from .bins import dequantised, offset_bits
from .discretisation import estimated_error
from .draws import ImageDraws
from .output import LikelihoodOutput
from .schemes import DEFAULT_SCHEME, Scheme, Track, noise_grid, quadrature_weights, scheme_of
from .traces import NodeTrace, node_variance, standard_error

Moment = torch.Tensor | float | None

MANY_PROBES = 64
"""Number of probes up to which more than the dimensions of a sample are allowed."""

COARSE = 0.05
"""Discretisation error, in bits/dim, above which a likelihood warns."""


@dataclasses.dataclass(frozen=True)
class OdeProblem:
    """Holds the samples and the denoiser of one likelihood, after all checks and random draws.

    Args:
        denoiser: denoiser at guidance scale 1; a guided output is the score of no density.
        start: (B, ...) float64, the points whose density is computed.
        dtype: dtype of the denoiser's inputs.
        estimator: gives the trace at every node, with its denoiser.
        draws: makes the directions of the trace.
        low, high: log(sigma/alpha) at the ends.
        mean, variance: float64 moments of the data, for the prior.
        calls_before: the denoiser's `num_calls` before the integration.
        integration: the caller's options.
    """

    denoiser: Denoiser
    start: torch.Tensor
    dtype: torch.dtype
    estimator: FisherEstimator
    draws: ImageDraws
    low: float
    high: float
    mean: torch.Tensor
    variance: torch.Tensor
    calls_before: int
    integration: Integration

    def evaluate(self, x: torch.Tensor, timestep: torch.Tensor, log_noise: float) -> Node:
        """Evaluates the denoiser and the trace at x~ = `x`, (B, ...) float64, and log s = `log_noise`."""
        level = self.denoiser.level(timestep)
        needs_graph = self.estimator.needs_graph
        with torch.set_grad_enabled(needs_graph):
            model_input = (expand(level.alpha, x) * x).to(self.dtype).requires_grad_(needs_graph)
            state = self.denoiser.state(model_input, timestep.to(torch.float32))
            operator, factor = self.estimator(state), float(level.sigma) ** 2 / x[0].numel()
            count = self.integration.num_probes
            if count is None:
                trace = NodeTrace.exact(factor * operator.trace().value.to(x.device))
            else:
                # Rounded, because another way to the same grid may differ in the last digits.
                place = "fixed" if self.integration.fixed_probes else f"{log_noise:.9f}"
                vectors = self.draws.signs(count, "probes", place).to(model_input)
                trace = NodeTrace.sampled(vectors, factor * operator.products(vectors).detach().double())
        self.integration.on_step()
        return Node(state.epsilon.detach().double(), trace)

    def prior(self, x: torch.Tensor) -> torch.Tensor:
        """Returns log N(x; mean, variance + s^2) at the noise end, (B,) nats."""
        # Without validation: `integrate_log_likelihood` reports a path that is not finite, in words.
        deviation = (self.variance + math.exp(self.high) ** 2).sqrt()
        prior = torch.distributions.Normal(self.mean, deviation, validate_args=False)
        return prior.log_prob(x).flatten(1).sum(1)


@dataclasses.dataclass(frozen=True)
class Node:
    """Holds eps (B, ...) float64 and the trace at one node of the grid."""

    epsilon: torch.Tensor
    trace: NodeTrace


@check_kinds
@dataclasses.dataclass(frozen=True)
class Integration:
    """Says how a log-likelihood is integrated, and of which density.

    Args:
        num_steps: number of steps of the grid in log(sigma/alpha), see `noise_grid`; at least 2.
        num_probes: number of directions of random signs at every node (Hutchinson, 1990); None: the operator's exact
            trace, in closed form or by d products.
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
    """

    num_steps: int = 20
    num_probes: int | None = 1
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


@check_kinds
def integrate_log_likelihood(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration | None = None
) -> LikelihoodOutput:
    """Integrates the log-likelihood of clean `samples` (B, ...) under the model behind `denoiser`.

    Every node has directions of its own, so that their errors cancel over the nodes. Cost: `num_steps + 1` evaluations
    with the estimator's trace at each; the error estimates need no more. Where the discretisation error's estimate
    exceeds 0.05 bits/dim, a `CoarseGridWarning` says so.

    Args:
        denoiser: denoiser at guidance scale 1; a guided output is the score of no density.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every node, such as `AutodiffFisher()`; one without a denoiser gets this one.
        integration: how to integrate; None: `Integration()`.

    Raises:
        InputError: too few steps or probes, samples that are not finite or not on their bins, half a prior or one that
            does not fit, an unknown scheme, an estimator that needs a graph under `torch.inference_mode`, a trace
            model of another denoiser.
        NumericalError: a result that is not finite.
    """
    options = integration or Integration()
    scheme, steps, num_probes = scheme_of(options.scheme), options.num_steps, options.num_probes
    if steps < 2:
        raise InputError(f"`num_steps` is {steps}; allowed: at least 2, sensibly 20 or more.")
    if num_probes is not None and num_probes < 1:
        raise InputError(f"`num_probes` is {num_probes}; allowed: at least 1, or None for the exact trace.")
    problem = prepare_problem(denoiser, samples, estimator, options)
    output = integrate(problem, steps, scheme)
    if not torch.isfinite(output.log_prob).all():
        raise NumericalError(
            f"Log-likelihoods are not finite: {output.log_prob.tolist()}; unexplained noise fractions by noise level: "
            f"{output.unexplained_noise_fraction.tolist()}."
        )
    if options.step_halving:
        half = integrate(problem, steps // 2, scheme)
        if not torch.isfinite(half.log_prob).all():
            raise NumericalError(
                "Log-likelihoods with half as many steps are not finite, so the discretisation error can't be "
                "measured. Take more steps, or pass `step_halving=False`."
            )
        error, calls = (output.log_prob - half.log_prob).abs(), half.num_denoiser_calls
        output = dataclasses.replace(output, discretisation_error=error, num_denoiser_calls=calls)
    if not torch.isfinite(output.discretisation_error).all():
        raise NumericalError(
            f"The discretisation error's estimates are not finite: {output.discretisation_error.tolist()}. Take more "
            "steps."
        )
    worst = float(output.discretisation_error.max()) / (output.dims * math.log(2))
    if worst > COARSE:
        warnings.warn(
            f"The grid of {steps} steps is coarse: its error is estimated at up to {worst:.3f} bits/dim. Take more "
            "steps.",
            CoarseGridWarning,
            stacklevel=3,  # this function's check of kinds is a level of its own
        )
    return output


def prepare_problem(
    denoiser: Denoiser, samples: torch.Tensor, estimator: FisherEstimator, integration: Integration
) -> OdeProblem:
    """Checks what is to be integrated, and makes all random draws. Raises as `integrate_log_likelihood`."""
    samples, bins, generator = check_samples(samples), integration.bins, integration.generator
    check_generators(generator, len(samples))
    if integration.keys is not None and len(integration.keys) != len(samples):
        raise InputError(f"{len(integration.keys)} image keys were given for {len(samples)} images; give as many.")
    if integration.num_probes is not None and integration.num_probes > max(samples[0].numel(), MANY_PROBES):
        raise InputError(
            f"`num_probes` is {integration.num_probes} for samples of {samples[0].numel()} dimensions; pass None for "
            "the exact trace, which costs fewer products."
        )
    moments = check_prior(samples, integration.prior_mean, integration.prior_variance)
    if check_estimator(estimator).needs_graph and torch.is_inference_mode_enabled():
        raise InputError(
            f"{type(estimator).__name__} differentiates the denoiser, which torch.inference_mode forbids even inside "
            "enable_grad; use torch.no_grad instead, or FiniteDifferenceFisher, which needs no graph."
        )
    estimator = estimator.bind(denoiser)
    low, high = log_noise_to_signal_range(denoiser.scheduler)
    draws = ImageDraws(samples, generator, integration.keys)
    start = samples.double() if bins is None else dequantised(samples, bins, draws.generators("bins"))
    if integration.noised:
        start = start + math.exp(low) * draws.normal("noise").to(start.device)
    return OdeProblem(
        denoiser, start, samples.dtype, estimator, draws, low, high, *moments, denoiser.num_calls, integration
    )


def integrate(problem: OdeProblem, num_steps: int, scheme: Scheme) -> LikelihoodOutput:
    """Carries x~ over the `num_steps` steps of `noise_grid` and integrates 1 - r.

    The evaluations lie on a path that knows nothing of the trace. Two more solutions follow it by the same
    evaluations, moved to their own points by (1 - r)/s: one of the scheme's order, whose end is the result's, and its
    companion of another order. `_error` compares the two.
    """
    grid = noise_grid(problem.low, problem.high, num_steps)
    timesteps, nodes = timestep_at(problem.denoiser.scheduler, grid), grid.tolist()
    x = problem.start
    node = problem.evaluate(x, timesteps[0], nodes[0])
    path = Track(x, node.epsilon, scheme.order)
    solution, companion = (
        Track(x, node.epsilon, order, linearised=True) for order in (scheme.order, scheme.companion)
    )
    # The solution of higher order is the nearest to the true one: the trace's points are measured against it.
    best = solution if scheme.order > scheme.companion else companion
    traces, shifts = [node.trace], []
    for index in range(1, len(nodes)):
        point, previous = path.predict(nodes, index), path.x
        node = problem.evaluate(point, timesteps[index], nodes[index])
        slope = expand(node.trace.rest.clamp(0, 1) / math.exp(nodes[index]), x)
        for track in (path, solution, companion):
            track.correct(nodes, index, point, node.epsilon, slope)
        shifts.append(_norm(best.x - point) / _norm(point - previous).clamp_min(torch.finfo(torch.float64).tiny))
        traces.append(node.trace)
    values, dimensions = torch.stack([trace.rest for trace in traces]), x[0].numel()
    weights = dimensions * quadrature_weights(grid, scheme.quadrature).to(x.device)
    fixed = problem.integration.fixed_probes
    variance = node_variance(traces, fixed)
    prior = problem.prior(solution.x)
    prior_error = (problem.prior(companion.x) - prior).abs() / dimensions
    error = estimated_error(prior_error, values, variance, torch.stack(shifts), grid.to(x.device), scheme)
    return make_output(
        problem, problem.integration.scheme, final_latents=solution.x, prior_log_prob=prior,
        trace_log_prob=torch.einsum("n,nb->b", weights, values),
        trace_by_level=weights[:, None, None] * torch.stack([trace.by_probe for trace in traces]),
        trace_weights=weights, unexplained_noise_fraction=1 - values, noise_to_signal=grid.exp(),
        standard_error=standard_error(traces, variance, weights, fixed), discretisation_error=dimensions * error,
    )  # fmt: skip


def make_output(problem: OdeProblem, scheme: str, **tensors: torch.Tensor) -> LikelihoodOutput:
    """Makes the output of an integration, with its tensors on the CPU.

    Args:
        scheme: name of the way in which the problem was integrated.
        **tensors: the tensors of `LikelihoodOutput` by name, without `log_prob`.
    """
    options = problem.integration
    tensors |= {"log_prob": tensors["prior_log_prob"] + tensors["trace_log_prob"]}
    return LikelihoodOutput(
        **{name: tensor.cpu() for name, tensor in tensors.items()}, dims=problem.start[0].numel(),
        num_denoiser_calls=problem.denoiser.num_calls - problem.calls_before, space=options.space,
        prior="standard" if options.prior_mean is None else "moment-matched",
        density="noised" if options.noised else "smoothed", halved=options.step_halving, scheme=scheme,
        trace=f"{problem.estimator.description}, {_probes(options)}", fixed_probes=options.fixed_probes,
        offset_bits=offset_bits(options.bins),
    )  # fmt: skip


def _probes(options: Integration) -> str:
    """Describes the probes of the trace."""
    count = options.num_probes
    if count is None:
        return "no probes"
    return f"{count} probe{'s' * (count > 1)} " + ("for all levels" if options.fixed_probes else "per level")


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)


def standard_noise(like: torch.Tensor, generator: Generators) -> torch.Tensor:
    """Draws standard normal noise in the shape and dtype of `like`, and returns it in float64."""
    from diffusers.utils.torch_utils import randn_tensor

    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype).double()


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


def check_prior(samples: torch.Tensor, mean: Moment, variance: Moment) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and variance of the data in float64, 0 and 1 where both are None.

    Raises:
        InputError: only one of them, values that do not broadcast to a sample, or that are not finite or negative.
    """
    if (mean is None) != (variance is None):
        raise InputError("Give both `prior_mean` and `prior_variance` (of the data), or neither for 0 and 1.")
    moments = (0.0, 1.0) if mean is None or variance is None else (mean, variance)
    mean, variance = (torch.as_tensor(value, dtype=torch.float64, device=samples.device) for value in moments)
    shape = tuple(samples.shape[1:])
    for name, value in (("prior_mean", mean), ("prior_variance", variance)):
        try:
            value.expand(shape)
        except RuntimeError:
            raise InputError(
                f"`{name}` has shape {tuple(value.shape)}; allowed: a number, or what broadcasts to {shape}."
            ) from None
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all() and (variance >= 0).all()):
        raise InputError("`prior_mean` must be finite, and `prior_variance` finite and not negative.")
    return mean, variance
