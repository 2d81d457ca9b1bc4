"""Likelihoods of a handful of images by several ways, and their place among the likelihoods of a data set."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy
import torch

from ..curvature.pipeline import likelihood_bound
from ..errors import InputError
from ..evaluation.image_evaluator import ESTIMATORS
from ..files import finite_number, read_table
from ..fisher import AutodiffFisher, FiniteDifferenceFisher, FisherEstimator
from ..jobs.identity import pipeline_digests
from ..jobs.records import SETTINGS
from ..likelihood import LikelihoodOutput
from ..likelihood.pipeline import DEFAULT_STEPS, log_likelihood
from ..pipelines import fisher_pipeline
from .lines import CheckLine
from .subject import Subject

BOUND_DRAWS = 6  # the fewest whose scatter gives the error
RECORDS_FILE = "likelihoods.jsonl"
LEAST_RECORDS = 20
SETTINGS_READ = ("num_inference_steps", "tolerance", "scheme", "bins", "sample_latents")
"""Settings of the records that are arguments of `log_likelihood`."""


def check_likelihood(subject: Subject) -> CheckLine:
    """Compares the likelihoods of a few samples by the default, by another estimator of the trace, and the bound.

    Cost: two likelihoods (the second on one grid) and a bound of four samples.
    """
    trusted = subject.found_line("trace model").status != "failed"
    default = None if trusted else FiniteDifferenceFisher()
    has_model = trusted and subject.backbone.trace_model is not None
    other = FiniteDifferenceFisher() if has_model else AutodiffFisher()
    begin = time.perf_counter()
    first = _likelihood(subject, default)
    seconds = (time.perf_counter() - begin) / subject.few
    second = _likelihood(subject, other, DEFAULT_STEPS)
    bound = likelihood_bound(
        subject.backbone.pipe, num_draws=BOUND_DRAWS, estimator=default, generator=subject.generator("likelihood"),
        **_few_samples(subject),
    )  # fmt: skip
    bits, others, bounds = (out.bits_per_dim for out in (first, second, bound))
    errors = [out.to_bits(out.total_error) for out in (first, second)]
    bound_error = first.to_bits(bound.standard_error)
    # By the means, because of many images one in twenty is beyond its 95% by chance.
    agree = float((bits - others).mean().abs()) <= float((errors[0] + errors[1]).mean())
    holds = float((bits - errors[0] - bounds - 3 * bound_error).mean()) <= 0
    words = (
        f"{float(bits.mean()):.4f} bits/dim on average of {subject.few}, within {float(errors[0].mean()):.4f}, by "
        f"{first.num_denoiser_calls} calls and {seconds:.3g} s per image; by {type(other).__name__} "
        f"{float(others.mean()):.4f}; bound {float(bounds.mean()):.4f}"
    )
    figures: dict[str, Any] = {
        "bits_per_dim": _numbers(bits), "total_error": _numbers(errors[0]), "calls": first.num_denoiser_calls,
        "trace": first.trace, "other": _numbers(others), "other_total_error": _numbers(errors[1]),
        "other_trace": second.trace, "bound": _numbers(bounds), "bound_error": _numbers(bound_error),
        "seconds_per_image": seconds,
    }  # fmt: skip
    if agree and holds:
        return CheckLine("ok", words, figures=figures)
    cause = "The two estimators of the trace differ by more than their errors." if not agree else (
        "The likelihood is above its bound: the trace is wrong, or the network is no denoiser of these images."
    )  # fmt: skip
    return CheckLine("warning", words, cause, "See the lines 'step of differences' and 'calibration'.", figures)


def _likelihood(
    subject: Subject, estimator: FisherEstimator | None, num_inference_steps: int | None = None
) -> LikelihoodOutput:
    return log_likelihood(
        subject.backbone.pipe, num_inference_steps=num_inference_steps, estimator=estimator,
        generator=subject.generator("likelihood"), **_few_samples(subject),
    )  # fmt: skip


def _few_samples(subject: Subject) -> dict[str, Any]:
    """Returns the arguments that stand for a few images, or for the model's own samples, with their prompts."""
    prompts = subject.some_prompts(0, subject.few)
    if subject.images is None:
        return {"latents": subject.samples[: subject.few], "prompt": prompts}
    return {"images": subject.images[: subject.few], "prompt": prompts}


def check_reference(subject: Subject) -> CheckLine:
    """Places the images among the images of a data set: percentile and two-sided p-value of their bits/dim.

    The likelihoods have the settings of the records.
    """
    if subject.reference is None or subject.images is None:
        cause = "No reference was passed." if subject.reference is None else "There are no images to compare."
        return CheckLine(
            "not run", "", cause,
            "Run `diffusers-fisher likelihood` on images that count as usual, and pass its folder as --reference, "
            "with the images as --data.",
        )  # fmt: skip
    folder = Path(subject.reference)
    settings, known = read_reference(folder)
    differing = [
        name
        for name, digest in pipeline_digests(fisher_pipeline(subject.backbone.pipe)).items()
        if settings.get(name, digest) != digest
    ]
    if differing:
        return CheckLine(
            "failed", "",
            f"The records of '{folder}' are of another checkpoint: {' and '.join(differing)} are different.",
            "Run `diffusers-fisher likelihood` with this checkpoint.",
        )  # fmt: skip
    bits = torch.cat([
        _like_the_records(subject, settings, images, start)
        for start, images in zip(
            range(0, len(subject.images), subject.batch_size), subject.images.split(subject.batch_size), strict=True
        )
    ])  # fmt: skip
    rows = [{"bits_per_dim": value, **place_among(value, known)} for value in bits.tolist()]
    unusual = [index for index, row in enumerate(rows) if row["p_value"] <= 0.05]
    words = (
        f"{len(rows)} images among {len(known)} records ({numpy.quantile(known, 0.05):.4f} to "
        f"{numpy.quantile(known, 0.95):.4f} bits/dim for 90%): {len(unusual)} with p <= 0.05; smallest p "
        f"{min(row['p_value'] for row in rows):.3g}"
    )
    return CheckLine("ok", words, figures={"records": len(known), "images": rows, "unusual": unusual})


def read_reference(folder: Path) -> tuple[dict[str, Any], numpy.ndarray]:
    """Returns the settings of a folder of `diffusers-fisher likelihood`, and its sorted bits/dim.

    Raises:
        InputError: the folder has no records of likelihoods, too few, of a bound or of images of several sizes.
    """
    file = folder / RECORDS_FILE
    try:
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        rows = [(float(record["bits_per_dim"]), int(record["dims"])) for record in records if "error" not in record]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"The reference '{folder}' has no readable {RECORDS_FILE} ({type(error).__name__}); allowed: a folder of "
            "`diffusers-fisher likelihood`. Give its --output."
        ) from error
    sizes = sorted({dims for _, dims in rows})
    if len(rows) < LEAST_RECORDS or len(sizes) != 1:
        raise InputError(
            f"The reference '{folder}' has {len(rows)} likelihoods of {sizes} dimensions; allowed: {LEAST_RECORDS} or "
            "more, of images of one size. Give the folder of a larger run, with --resolution."
        )
    settings = read_table(folder / SETTINGS)
    if settings.get("method", "ode") != "ode":
        raise InputError(
            f"The reference '{folder}' has bounds, not likelihoods; allowed: records with --method ode. Give another "
            "folder."
        )
    return settings, numpy.sort(numpy.array([bits for bits, _ in rows]))


def place_among(value: float, known: numpy.ndarray) -> dict[str, float]:
    """Returns the percentile of a value among sorted known ones, and its two-sided p-value by rank.

    The p-value is at least 2/(n + 1): n values can't show more.
    """
    below, up_to = (int(numpy.searchsorted(known, value, side)) for side in ("left", "right"))
    count = len(known)
    tails = (up_to + 1) / (count + 1), (count - below + 1) / (count + 1)
    return {"percentile": 100 * (below + up_to) / (2 * count), "p_value": min(1.0, 2 * min(tails))}


def _like_the_records(subject: Subject, settings: dict[str, Any], images: torch.Tensor, start: int) -> torch.Tensor:
    """Returns the bits/dim of the `images` from place `start` on, with the settings of the records."""
    options = {name: settings[name] for name in SETTINGS_READ if name in settings}
    if settings.get("estimator") in ESTIMATORS:
        options |= {
            "estimator": ESTIMATORS[settings["estimator"]](),
            "num_probes": settings.get("num_probes", 1) or None,
        }
    prompts = settings.get("prompt") or subject.some_prompts(start, start + len(images))
    generator = torch.Generator().manual_seed(settings.get("seed", 0))
    return log_likelihood(subject.backbone.pipe, images, prompts, generator=generator, **options).bits_per_dim


def _numbers(values: torch.Tensor) -> list[float | None]:
    return [finite_number(value) for value in values.tolist()]
