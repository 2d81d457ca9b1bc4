"""Checks a trace model on every image of a likelihood, by differences of the denoiser at some of the levels.

Notation: 1 - r is the model's trace at a level and y an unbiased estimate of it by one random direction, so that
w (y - (1 - r)), with the level's weight w in the trace's integral, estimates what the model's error there adds.
"""

from __future__ import annotations

import dataclasses
import math

import numpy
import torch

from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from .output import AGREES, DISAGREES, REPLACED, LikelihoodOutput, with_samples
from .traces import NodeTrace, TraceRecord

NUM_CHECKS = 12
"""Default number of levels at which a trace model is checked."""

SUSPICIOUS = 3.0
"""Number of standard errors from which on a difference between the model and the checks counts."""

UNUSUAL = 4.0
"""Mean square of the checks' differences, in units of those on held-out images, from which on they count.

It sees errors that cancel between levels. It was set on the embedded checkpoint: 256 test images have at most 3.7, and
192 latents that are shuffled, random or three times too large are all flagged.
"""

NORMAL_95 = 1.96

UNTRUSTED = ("warn", "probes")


class TraceCheck:
    """Chooses the levels of the checks, and sums up what they find.

    The levels are those in the middle of equal shares of the differences' noise over the grid. They are the same for
    all images, so that a batch shares the evaluations, and each image has directions of its own. Between the levels
    the model's error is interpolated.

    Args:
        estimator: gives the trace. One that has no trained model is not checked.
        weights: (levels,) weights of the levels in the trace's integral, for 1 - r.
        log_noise: (levels,) log(sigma/alpha) of the grid.
        count: number of checks.
        dimensions: d.

    Attributes:
        counts: number of directions at each level, 1 or 0.
    """

    def __init__(
        self, estimator: FisherEstimator, weights: torch.Tensor, log_noise: torch.Tensor, count: int, dimensions: int
    ):
        self._has_model, self._calibration = estimator.models_trace, estimator.calibration
        self._dimensions, self._trace = dimensions, TraceRecord()
        self._gaps: list[torch.Tensor] = []
        share, usual = weights.abs(), None
        if self._calibration is not None:
            usual = self._calibration.scatter_at(log_noise)
            share = share * usual
        middles = (torch.arange(count if self._has_model else 0, dtype=torch.float64) + 0.5) / count
        places = torch.searchsorted((share / share.sum()).cumsum(0), middles).clamp_max(len(weights) - 1).unique()
        if len(places) == 1:  # a grid of few levels; the noise is estimated from two levels or more
            places = torch.arange(len(weights))
        self._usual_gaps = None if usual is None else usual[places]
        self.counts: list[int] = torch.bincount(places, minlength=len(weights)).tolist()
        if len(places):
            # One row per check: the piecewise linear function that is 1 at its level and 0 at those of the others.
            rows = [numpy.interp(log_noise, log_noise[places], row) for row in numpy.eye(len(places))]
            self._weights = torch.from_numpy(numpy.stack(rows)) @ weights

    def add(self, trace: NodeTrace, check: NodeTrace | None) -> None:
        """Adds the trace at the next level and the same by differences, where it was checked."""
        if check is not None:
            self._trace.add(check)
            self._gaps.append(check.rest - trace.rest)

    def apply(self, output: LikelihoodOutput) -> LikelihoodOutput:
        """Returns the output with the trace model's error, and with what the checks found.

        The standard error of the checks is that of their directions. Without checks the error is that of the
        calibration, and without a calibration that which the checks leave possible.
        """
        if not self._has_model:
            return output
        usual = torch.full_like(output.trace_error, torch.inf)
        if self._calibration is not None:
            usual = torch.full_like(usual, self._calibration.error * self._dimensions * math.log(2))
        if not self._gaps:
            return dataclasses.replace(output, trace_error=usual)
        gaps = torch.stack(self._gaps)
        difference = torch.einsum("n,nb->b", self._weights, gaps)
        error = self._trace.standard_error(self._weights, fixed=False)
        explained = error if self._calibration is None else torch.hypot(error, usual / NORMAL_95)
        disagrees = difference.abs() > SUSPICIOUS * explained
        if self._usual_gaps is not None:
            disagrees |= (gaps / self._usual_gaps[:, None].clamp_min(1e-6)).square().mean(0) > UNUSUAL
        possible = difference.abs() + NORMAL_95 * error
        return dataclasses.replace(
            output, trace_error=torch.where(disagrees | usual.isinf(), possible, usual),
            trace_check=[DISAGREES if each else AGREES for each in disagrees.tolist()],
            trace_difference=difference, trace_difference_error=error,
        )  # fmt: skip


def replaced(output: LikelihoodOutput, rows: torch.Tensor, part: LikelihoodOutput) -> LikelihoodOutput:
    """Returns `output` with the samples at `rows` from `part`, whose trace is by probes. All calls are counted."""
    words = list(output.trace_check or [])
    for row in rows.tolist():
        words[row] = REPLACED
    return dataclasses.replace(added(output, rows, part), trace_check=words)


def added(output: LikelihoodOutput, rows: torch.Tensor, part: LikelihoodOutput) -> LikelihoodOutput:
    """Returns `output` with the samples at `rows` from `part`, with the calls of both."""
    calls, status = output.denoiser_calls_per_image, output.status
    if calls is not None and part.denoiser_calls_per_image is not None:
        calls = calls.index_add(0, rows, part.denoiser_calls_per_image)
    if status is not None and part.status is not None:
        status = list(status)
        for row, word in zip(rows.tolist(), part.status, strict=True):
            status[row] = word
    return dataclasses.replace(
        with_samples(output, rows, part), denoiser_calls_per_image=calls, status=status,
        num_denoiser_calls=output.num_denoiser_calls + part.num_denoiser_calls,
    )  # fmt: skip


def check_trace_options(trace_checks: int, untrusted_trace: str) -> None:
    """Checks the options of a likelihood that are about its trace model.

    Raises:
        InputError: a negative number of checks or a single one, an unknown choice, or a choice that needs checks.
    """
    if untrusted_trace not in UNTRUSTED:
        raise InputError(f"`untrusted_trace` is {untrusted_trace!r}; allowed: {', '.join(UNTRUSTED)}.")
    if trace_checks < 0 or trace_checks == 1:
        raise InputError(
            f"`trace_checks` is {trace_checks}; allowed: 2 or more levels, whose scatter tells their error, or 0 for "
            "no checks."
        )
    if trace_checks == 0 and untrusted_trace == "probes":
        raise InputError("`untrusted_trace='probes'` needs checks of the trace model; leave `trace_checks` at 12.")
