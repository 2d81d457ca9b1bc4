"""Likelihood by the probability-flow ODE, integrated in log(sigma/alpha).

Notation: x~ = x/alpha, s = sigma/alpha; the ODE is dx~/d(log s) = s eps(x~, s), the same for every schedule
(Song et al., 2011.13456; Karras et al., 2206.00364). r = tr Cov[eps|x]/d, so tr F = d (1 - r)/sigma^2 and
log p~_{s_0}(x~_0) = log p~_{s_T}(x~_T) + d * integral of (1 - r) d(log s).
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import CoarseGridWarning, InputError, NumericalError, ProbeNoiseWarning, TraceModelWarning, warn
from ..fisher.estimator import FisherEstimator
from ..noise import expand, timestep_at
from .bins import offset_bits
from .dealing import deal_probes
from .discretisation import estimated_error
from .output import DISAGREES, LikelihoodOutput
from .problem import (
    MANY_PROBES,
    Integration,
    OdeProblem,
    check_dealt_probes,
    check_standard_error,
    prepare_problem,
    prior_name,
)
from .refinement import NOT_CONVERGED, Foresight, check_refinement, refine
from .schemes import Scheme, Track, noise_grid, quadrature_weights, scheme_of
from .trace_check import TraceCheck, added, check_trace_options, replaced
from .traces import TraceRecord

COARSE = 0.05
"""Discretisation error, in bits/dim, above which a likelihood warns."""


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
    check_dealt_probes(options.dealt_probes, num_probes, options.fixed_probes)
    check_standard_error(options.max_standard_error, num_probes, options.fixed_probes)
    check_refinement(options.tolerance, options.max_denoiser_calls, steps, options.step_halving)
    check_trace_options(options.trace_checks, options.untrusted_trace)
    problem = prepare_problem(denoiser, samples, estimator, options)
    output = _solve(problem, scheme)
    rows = [row for row, word in enumerate(output.trace_check or []) if word == DISAGREES]
    if rows and options.untrusted_trace == "probes":
        options.on_grid(steps + 1)
        places = torch.tensor(rows)
        output = replaced(output, places, _solve(problem.by_differences(places), scheme))
    elif rows:
        warn(
            f"The trace model disagrees with differences of its denoiser for {len(rows)} of {len(output.log_prob)} "
            "samples: `trace_check` says which, and `trace_error` how large its error may be. Pass "
            "`untrusted_trace='probes'` for their trace by differences.",
            TraceModelWarning,
        )  # fmt: skip
    if options.max_standard_error is not None:
        output = _with_more_probes(problem, output, scheme, options.max_standard_error)
    if not torch.isfinite(output.discretisation_error).all():
        raise NumericalError(
            f"The discretisation error's estimates are not finite: {output.discretisation_error.tolist()}. Take more "
            "steps."
        )
    _warn_of_coarse_grids(output, options)
    return output


def _solve(problem: OdeProblem, scheme: Scheme) -> LikelihoodOutput:
    """Integrates over one grid, over as many as the tolerance needs, or over a second one for the error."""
    options = problem.integration
    steps = options.num_steps
    if options.tolerance is not None:
        return refine(
            lambda rows, number, foresight: integrate(problem.select_samples(rows), number, scheme, foresight),
            len(problem.start), steps, scheme, options.tolerance, options.max_denoiser_calls, options.on_grid,
        )  # fmt: skip
    output = integrate(problem, steps, scheme)
    if not torch.isfinite(output.log_prob).all():
        raise NumericalError(
            f"Log-likelihoods are not finite: {output.log_prob.tolist()}; unexplained noise fractions by noise level: "
            f"{output.unexplained_noise_fraction.tolist()}."
        )
    if not options.step_halving:
        return output
    half = integrate(problem, steps // 2, scheme)
    if not torch.isfinite(half.log_prob).all():
        raise NumericalError(
            "Log-likelihoods with half as many steps are not finite, so the discretisation error can't be "
            "measured. Take more steps, or pass `step_halving=False`."
        )
    error, calls = (output.log_prob - half.log_prob).abs(), half.num_denoiser_calls
    return dataclasses.replace(output, discretisation_error=error, num_denoiser_calls=calls)


def _with_more_probes(problem: OdeProblem, output: LikelihoodOutput, scheme: Scheme, most: float) -> LikelihoodOutput:
    """Integrates samples with more directions per level, until their standard error is at most `most` bits/dim.

    The first directions are those from before. The numbers of directions are powers of two, so that few groups of
    samples are integrated, and depend on nothing but the sample's own standard error.
    """
    counts = torch.full((len(output.log_prob),), problem.integration.num_probes or 1)
    largest = max(MANY_PROBES, int(counts.max()))
    while True:
        excess = output.to_bits(output.standard_error) / most
        more = (excess > 1) & (counts < largest)
        if not more.any():
            break
        counts = torch.where(more, 2 ** (counts * excess.square()).log2().ceil(), counts).clamp(max=largest).long()
        for count in counts[more].unique().tolist():
            places = (more & (counts == count)).nonzero()[:, 0]
            problem.integration.on_grid(problem.integration.num_steps + 1)
            part = _solve(problem.with_probes(places, count), scheme)
            output = added(output, places, part)
    if bool((excess > 1).any()):
        warn(
            f"{int((excess > 1).sum())} of {len(excess)} samples have a standard error above {most:g} bits/dim with "
            f"{largest} probes per level; `standard_error` says how large it is.",
            ProbeNoiseWarning,
        )  # fmt: skip
    return output


def _warn_of_coarse_grids(output: LikelihoodOutput, options: Integration) -> None:
    worst = float(output.discretisation_error.max()) / (output.dims * math.log(2))
    unconverged = output.status.count(NOT_CONVERGED) if output.status is not None else 0
    if unconverged:
        message = (
            f"{unconverged} of {len(output.log_prob)} samples did not reach the tolerance of {options.tolerance:g} "
            f"bits/dim in {options.max_denoiser_calls} evaluations: their error is estimated at up to {worst:.3f}. "
            "`status` says which."
        )
    elif output.status is None and worst > COARSE:
        message = (
            f"The grid of {options.num_steps} steps is coarse: its error is estimated at up to {worst:.3f} bits/dim. "
            "Take more steps."
        )
    else:
        return
    warn(message, CoarseGridWarning)


def integrate(
    problem: OdeProblem, num_steps: int, scheme: Scheme, foresight: Foresight | None = None
) -> LikelihoodOutput:
    """Carries x~ over the `num_steps` steps of `noise_grid` and integrates 1 - r.

    The evaluations lie on a path that knows nothing of the trace. Two more solutions follow it by the same
    evaluations, moved to their own points by (1 - r)/s: one of the scheme's order, whose end is the result's, and its
    companion of another order. `_error` compares the two. `foresight` sees the predicted noise at every node.
    """
    grid = noise_grid(problem.low, problem.high, num_steps)
    timesteps, nodes = timestep_at(problem.denoiser.scheduler, grid), grid.tolist()
    x, dimensions = problem.start, problem.start[0].numel()
    weights = dimensions * quadrature_weights(grid, scheme.quadrature)
    check = TraceCheck(problem.estimator, weights, grid, problem.integration.trace_checks, dimensions)
    node = problem.evaluate(x, timesteps[0], nodes[0], check.counts[0])
    if foresight is not None:
        foresight.add(nodes[0], node.epsilon)
    path = Track(x, node.epsilon, scheme.order)
    solution, companion = (
        Track(x, node.epsilon, order, linearised=True) for order in (scheme.order, scheme.companion)
    )
    # The solution of higher order is the nearest to the true one: the trace's points are measured against it.
    best = solution if scheme.order > scheme.companion else companion
    traces, shifts, evaluated = TraceRecord(), [], [node]
    traces.add(node.trace)
    check.add(node.trace, node.check)
    for index in range(1, len(nodes)):
        point, previous = path.predict(nodes, index), path.x
        node = problem.evaluate(point, timesteps[index], nodes[index], check.counts[index])
        if foresight is not None:
            foresight.add(nodes[index], node.epsilon)
        slope = expand(node.trace.rest.clamp(0, 1) / math.exp(nodes[index]), x)
        for track in (path, solution, companion):
            track.correct(nodes, index, point, node.epsilon, slope)
        shifts.append(_norm(best.x - point) / _norm(point - previous).clamp_min(torch.finfo(torch.float64).tiny))
        traces.add(node.trace)
        check.add(node.trace, node.check)
        if problem.integration.dealt_probes:
            evaluated.append(node)
    more_calls = 0
    if problem.integration.dealt_probes:
        traces, more_calls = deal_probes(problem, evaluated, nodes, weights)
    values, fixed = traces.rests, problem.integration.fixed_probes
    prior = problem.prior(solution.x)
    path_error = (problem.prior(companion.x) - prior).abs() / dimensions
    error = estimated_error(path_error, values, traces.variance(fixed), torch.stack(shifts), grid, scheme)
    output = make_output(
        problem, problem.integration.scheme, final_latents=solution.x, prior_log_prob=prior,
        trace_log_prob=torch.einsum("n,nb->b", weights, values),
        trace_by_level=weights[:, None, None] * traces.by_probe,
        trace_weights=weights, unexplained_noise_fraction=1 - values, noise_to_signal=grid.exp(),
        unexplained_noise_error=traces.deviation(),
        standard_error=traces.standard_error(weights, fixed), discretisation_error=dimensions * error,
        prior_error=problem.prior_error(point, node),
    )  # fmt: skip
    output = dataclasses.replace(output, num_denoiser_calls=output.num_denoiser_calls + more_calls)
    return check.apply(output)


def make_output(problem: OdeProblem, scheme: str, **tensors: torch.Tensor) -> LikelihoodOutput:
    """Makes the output of an integration, with its tensors on the CPU.

    Args:
        scheme: name of the way in which the problem was integrated.
        **tensors: the tensors of `LikelihoodOutput` by name, without `log_prob`; without `trace_error` it is zero.
    """
    options = problem.integration
    log_prob = tensors["prior_log_prob"] + tensors["trace_log_prob"]
    tensors = {"trace_error": torch.zeros_like(log_prob), **tensors, "log_prob": log_prob}
    return LikelihoodOutput(
        **{name: tensor.cpu() for name, tensor in tensors.items()}, dims=problem.start[0].numel(),
        num_denoiser_calls=problem.denoiser.num_calls - problem.calls_before, space=options.space,
        prior=prior_name(options.prior_mean, options.prior_basis),
        density="noised" if options.noised else "smoothed", halved=options.step_halving, scheme=scheme,
        trace=f"{problem.estimator.description}, {_probes(options)}", fixed_probes=options.fixed_probes,
        offset_bits=offset_bits(options.bins), latents="given", status=None, trace_check=None,
        guidance_scale=problem.denoiser.embedded_guidance_scale,
    )  # fmt: skip


def _probes(options: Integration) -> str:
    """Describes the probes of the trace."""
    count = options.num_probes
    if count is None:
        return "no probes"
    place = "for all levels" if options.fixed_probes else "per level" + " on average" * options.dealt_probes
    return f"{count} probe{'s' * (count > 1)} {place}"


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).norm(dim=1)
