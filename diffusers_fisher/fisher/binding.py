"""Estimators put together with the denoiser whose Fisher they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .gaussian_data import TraceCorrectedFisher
from .one_step import OneStepFisher
from .operator import FisherEstimator
from .trace_matching import TraceMatchingFisher


def parts_of(estimator: Any) -> tuple[Any, ...]:
    """The estimators that a combined one asks; itself alone where it is plain."""
    if isinstance(estimator, TraceCorrectedFisher):
        return parts_of(estimator.prior) + parts_of(estimator.trace)
    if isinstance(estimator, OneStepFisher):
        return parts_of(estimator.jacobian)
    return (estimator,)


def each_part(estimator: Any, change: Callable[[Any], Any]) -> Any:
    """The estimator with `change` made to its parts, see `parts_of`."""
    if isinstance(estimator, TraceCorrectedFisher):
        return TraceCorrectedFisher(each_part(estimator.prior, change), each_part(estimator.trace, change))
    if isinstance(estimator, OneStepFisher):
        return OneStepFisher(each_part(estimator.jacobian, change), estimator.noise_to_signal)
    return change(estimator)


def bound(estimator: Any, denoiser: Any) -> FisherEstimator:
    """The estimator with `denoiser` (a `Denoiser`), or the pooled vectors of its conditions, where its parts need them
    and have none; pooled vectors are those of our pipelines alone.

    Raises:
        InputError: a trace model of another denoiser; says what differs.
    """
    pooled_of = getattr(getattr(denoiser, "pipe", None), "_pooled", None)

    def one(part: Any) -> Any:
        if isinstance(part, TraceMatchingFisher) and part.pooled is None and pooled_of is not None:
            model = part.trace_model
            if model.config["pooled_channels"] is not None:
                part = TraceMatchingFisher(model, pooled_of(denoiser.call_arguments), part.check)
        return part.bind(denoiser) if hasattr(part, "bind") else part

    return each_part(estimator, one)


def check_trace_models(estimator: Any, pipe: Any) -> None:
    """For estimators that bring their own denoiser, if they need one: compares the trace models alone with `pipe`.

    Raises:
        InputError: a trace model of another denoiser; says what differs.
    """
    for part in parts_of(estimator):
        if isinstance(part, TraceMatchingFisher):
            part.bind(pipe)
