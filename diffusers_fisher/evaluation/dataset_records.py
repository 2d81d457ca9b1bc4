"""What a likelihood of a dataset keeps of each image."""

from __future__ import annotations

from typing import Any

import torch

from ..curvature import LikelihoodBound
from ..data import Caption, Example
from ..files import finite_number
from ..likelihood import LikelihoodOutput


def method_of(out: LikelihoodOutput | LikelihoodBound) -> dict[str, Any]:
    """Returns the description of the likelihoods for the report."""
    method: dict[str, Any] = {"space": out.space, "density": out.density, "prior": out.prior}
    if isinstance(out, LikelihoodOutput):
        return {**method, "latents": out.latents, "trace": out.trace, "scheme": out.scheme}
    steps, draws, _ = out.terms.shape
    scheme = f"upper bound by a chain of {steps} steps with {draws} draws per step"
    return {**method, "trace": f"variance {out.variance}", "scheme": scheme, "evaluations": steps * draws}


def image_record(
    position: int, example: Example, caption: Caption, out: LikelihoodOutput | LikelihoodBound, index: int
) -> dict[str, Any]:
    """Returns the record of one image. The numbers are in nats but for the bits."""
    record: dict[str, Any] = {"position": position, "name": example.name, "caption": caption}
    numbers = {"bits_per_dim": out.bits_per_dim, "standard_error": out.standard_error}
    rest: dict[str, Any] = {}
    if isinstance(out, LikelihoodOutput):
        numbers |= {
            "log_prob": out.log_prob, "prior_log_prob": out.prior_log_prob, "trace_log_prob": out.trace_log_prob,
            "discretisation_error": out.discretisation_error, "trace_error": out.trace_error,
            "prior_error": out.prior_error, "total_error": out.total_error,
        }  # fmt: skip
        if out.trace_check is not None:
            rest["trace_check"] = out.trace_check[index]
        if out.status is not None and out.denoiser_calls_per_image is not None:
            rest |= {"status": out.status[index], "levels": int(out.denoiser_calls_per_image[index])}
        rest["r"] = [round(value, 6) for value in out.unexplained_noise_fraction[:, index].tolist()]
    else:  # a bound holds for every number of steps
        numbers |= {"bound": out.value, "clamped": out.clamped, "discretisation_error": torch.zeros_like(out.value)}
    # An error that is not known is infinite.
    record |= {key: finite_number(float(values[index])) for key, values in numbers.items()}
    return {**record, "dims": out.dims, **({"transparent": True} if example.transparent else {}), **rest}
