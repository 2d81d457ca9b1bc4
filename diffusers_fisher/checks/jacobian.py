"""How well do differences and other estimators stand for the network's Jacobian?

Notation: J is the Jacobian of the predicted noise with respect to the noisy sample, r = tr Cov[eps|x]/d, and
1 - r = sigma tr J/d. The Jacobian of a true score is symmetric.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..backbones import PipelineDenoiser
from ..errors import FisherError
from ..fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    GaussianFisher,
    OneStepFisher,
    TraceMatchingFisher,
    gaussian,
    rademacher,
)
from ..fisher.finite_difference import RELATIVE_STEP, RELATIVE_STEPS
from ..fisher.numerics import dot
from .lines import CheckLine
from .subject import LEVELS, Subject

STEPS = (0.1, 0.05, 0.03, 0.01, 0.003, 0.001)
"""Relative steps of the differences that are compared with automatic differentiation."""

LARGEST_ERROR = 0.05
"""Relative error of a difference's product, up to which the default step is right. A learned Jacobian is asymmetric by
more than this, which limits gradients by differences in any case."""

LARGEST_TRACE_ERROR = 0.003
"""Error of r by one difference, at any level, up to which the default step is right for likelihoods."""

NUM_PRODUCTS = 4
MOST_ASYMMETRIC = 0.5


def check_step(subject: Subject) -> CheckLine:
    """Compares products by differences with forward-mode automatic differentiation, at three levels and six steps."""
    rows: list[dict[str, float]] = []
    for state, denoiser, _ in subject.states:
        v = rademacher(1, state.sample, subject.generator("step")).vectors[0]
        try:
            exact = AutodiffFisher(denoiser, forward_mode=True)(state).epsilon_jacobian(v)
        except RuntimeError as error:
            return CheckLine(
                "not run", "", f"torch has no forward derivatives of this network: {str(error).splitlines()[0]}",
                "None are needed: the line 'estimators' compares differences with back-propagation.",
            )  # fmt: skip
        for step in STEPS:
            product = FiniteDifferenceFisher(denoiser, step)(state).epsilon_jacobian(v)
            trace = state.level.sigma * (dot(v, product - exact) / v[0].numel()).cpu()
            rows.append({
                "noise_to_signal": float(state.level.noise_to_signal), "step": step, **_agreement(product, exact),
                "trace_error": float(trace.abs().max()),
            })  # fmt: skip
    default = RELATIVE_STEPS.get(subject.backbone.dtype, RELATIVE_STEP)
    worst = {
        step: {key: max(row[key] for row in rows if row["step"] == step) for key in ("error", "trace_error")}
        for step in STEPS
    }
    best = min(STEPS, key=lambda step: worst[step]["error"])
    words = (
        f"products by differences of step {default:g} (the default) differ from automatic differentiation by "
        f"{worst[default]['error']:.2g} of their size at most, the trace by {worst[default]['trace_error']:.1g} of "
        f"the dimensions; best step {best:g} ({worst[best]['error']:.2g})"
    )
    figures = {"default": default, "best": best, "rows": rows}
    if worst[default]["error"] <= LARGEST_ERROR and worst[default]["trace_error"] <= LARGEST_TRACE_ERROR:
        return CheckLine("ok", words, figures=figures)
    reason = "rounds too coarsely for this step" if best > default else "bends too much within this step"
    return CheckLine(
        "warning", words, f"The network {reason}.",
        f"Pass estimator=FiniteDifferenceFisher(relative_step={best:g}), or AutodiffFisher() where memory allows.",
        figures,
    )  # fmt: skip


def check_symmetry(subject: Subject) -> CheckLine:
    """Measures |J - J^T|/|J| by random products <u, J v> - <v, J u> of differences, at three levels, without a graph.

    A gradient by differences has J in the place of its transpose, which caps its cosine with the exact gradient. The
    cap is that of the Jacobian of the predicted clean sample, by which gradients of runs are multiplied.
    """
    rows = []
    for state, denoiser, _ in subject.states:
        vectors = gaussian(NUM_PRODUCTS, state.sample, subject.generator("symmetry")).vectors
        operator = FiniteDifferenceFisher(denoiser, central=True)(state)
        products = torch.stack([operator.epsilon_jacobian(v) for v in vectors]).double().flatten(2)
        vectors, level = vectors.double().flatten(2), state.level
        clean_products = (vectors - float(level.sigma) * products) / float(level.alpha)
        rows.append({
            "noise_to_signal": float(level.noise_to_signal), "asymmetry": _asymmetry(vectors, products),
            "largest_cosine": max(0.0, 1 - _asymmetry(vectors, clean_products) ** 2 / 2),
        })  # fmt: skip
    worst = max(row["asymmetry"] for row in rows)
    words = (
        f"|J - J^T|/|J| is {_listed(row['asymmetry'] for row in rows)} at {_levels()}, which caps the cosine of "
        f"products by differences at about {_listed(row['largest_cosine'] for row in rows)}"
    )
    if worst <= MOST_ASYMMETRIC:
        return CheckLine("ok", words, figures={"levels": rows})
    return CheckLine(
        "warning", words,
        "The network's Jacobian is far from symmetric, so its output is not the gradient of any log density: the "
        "network is hardly trained, guided or distilled, or the settings are wrong (see the line 'calibration').",
        "Take AutodiffFisher() for gradients, which has the transposed Jacobian itself.", {"levels": rows},
    )  # fmt: skip


def _asymmetry(vectors: torch.Tensor, products: torch.Tensor) -> float:
    """Returns |A - A^T|/|A| by the products A v of a few standard normal vectors; both (k, B, d) float64."""
    entries = torch.einsum("ibd,jbd->ijb", vectors, products)  # <u, A v>
    # The mean of (<u, A v> - <v, A u>)^2 over pairs is |A - A^T|^2, that of |A v|^2 is |A|^2.
    difference = (entries - entries.transpose(0, 1)).square().sum() / (len(vectors) * (len(vectors) - 1))
    return float((difference * len(vectors) / products.square().sum().clamp_min(1e-30)).sqrt())


def check_estimators(subject: Subject) -> CheckLine:
    """Compares each estimator's product with the Jacobian of the predicted clean sample with the exact one.

    The vectors are random, and the exact product is by back-propagation, at three levels.
    """
    rows: dict[str, dict[str, Any]] = {}
    for state, denoiser, clean in subject.states:
        v = gaussian(1, state.sample, subject.generator("estimators")).vectors[0]
        exact = AutodiffFisher(denoiser)(state).original_jacobian(v)
        for name, estimator in _estimators(subject, denoiser):
            row = rows.setdefault(name, {"cosine": [], "length": [], "seconds": []})
            begin = time.perf_counter()
            try:
                product = estimator(state, clean).original_jacobian(v)
            except (FisherError, RuntimeError) as error:  # as of networks without forward derivatives
                row["refused"] = str(error)
                continue
            seconds, agreement = time.perf_counter() - begin, _agreement(product, exact)
            row["calls_per_product"] = estimator.calls_per_state + estimator.calls_per_product
            for key, value in (("cosine", agreement["cosine"]), ("length", agreement["length"]), ("seconds", seconds)):
                row[key].append(value)
    words = f"cosines with the exact product at {_levels()}: " + "; ".join(
        f"{name} {_listed(row['cosine']) or 'refused'}" for name, row in rows.items()
    )
    return CheckLine("ok", words, figures={"noise_to_signal": list(LEVELS), "estimators": rows})


def _estimators(subject: Subject, denoiser: PipelineDenoiser) -> Iterator[tuple[str, FisherEstimator]]:
    """Yields every estimator that the checkpoint allows, with its name."""
    yield "autodiff", AutodiffFisher(denoiser)
    yield "autodiff, forward mode", AutodiffFisher(denoiser, forward_mode=True)
    yield "differences", FiniteDifferenceFisher(denoiser)
    yield "differences, central", FiniteDifferenceFisher(denoiser, central=True)
    yield "one step", OneStepFisher(FiniteDifferenceFisher(denoiser))
    yield "direct", DirectFisher()
    yield "endpoint, centred", EndpointFisher(centred=True)
    yield "endpoint", EndpointFisher()
    if len(subject.samples) > 1:
        samples = subject.backbone.pack(subject.samples).cpu()
        yield "Gaussian", GaussianFisher.fit_diagonal(samples, dct=samples.ndim == 4)
    model = subject.backbone.trace_model
    if model is not None and subject.found_line("trace model").status == "ok":
        yield "trace model", TraceMatchingFisher(model).bind(denoiser)


def _agreement(product: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """Returns cosine, ratio of the lengths, and relative error of a product; the worst of the samples."""
    sizes, exact_sizes = dot(product, product).sqrt(), dot(exact, exact).sqrt().clamp_min(1e-30)
    cosines = dot(product, exact) / (sizes * exact_sizes).clamp_min(1e-30)
    error = dot(product - exact, product - exact).sqrt() / exact_sizes
    lengths = (sizes / exact_sizes).log().abs()
    return {
        "cosine": float(cosines.min()), "error": float(error.max()),
        "length": float((sizes / exact_sizes)[lengths.argmax()]),
    }  # fmt: skip


def _listed(values: Iterable[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def _levels() -> str:
    return f"sigma/alpha {', '.join(f'{level:g}' for level in LEVELS)}"
