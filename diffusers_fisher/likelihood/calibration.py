"""How far a trace model is from its denoiser's own trace on images that it was not trained on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones import backbone_of
from ..backbones.conditions import Condition
from ..denoiser import Denoiser
from ..errors import InputError
from ..fisher.calibration import TraceCalibration
from ..fisher.estimate import Generators
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..fisher.trace_matching import TraceMatchingFisher, TraceModel
from ..images import ImageLike
from .pipeline import DEFAULT_STEPS, likelihood_samples, unguided_denoiser
from .problem import Integration, prepare_problem
from .schemes import scheme_of
from .solver import integrate
from .trace_check import NORMAL_95

LEAST_IMAGES = 8
PROBES = 2
"""Directions per level: two, because the difference of two tells their noise."""


@dataclasses.dataclass(frozen=True)
class TraceErrors:
    """Holds r of a trace model and of its denoiser on the path of a likelihood, float64.

    Args:
        log_noise: (levels,) rising log(sigma/alpha).
        weights: (levels,) weights of the levels in the trace's integral, for 1 - r, bits/dim.
        model: (levels, B) r of the trace model.
        probes: (levels, k, B) r by each of k random directions.
    """

    log_noise: torch.Tensor
    weights: torch.Tensor
    model: torch.Tensor
    probes: torch.Tensor

    @classmethod
    def measure(
        cls, denoiser: Denoiser, samples: torch.Tensor, trace_model: TraceModel, num_steps: int = DEFAULT_STEPS,
        generator: Generators = None,
    ) -> TraceErrors:  # fmt: skip
        """Measures both along the path of samples (B, ...), which is the same for both.

        Cost: 4 (`num_steps` + 1) evaluations of the denoiser.
        """
        options = Integration(num_steps=num_steps, num_probes=None, trace_checks=0, generator=generator)
        scheme = scheme_of(options.scheme)
        problem = prepare_problem(denoiser, samples, TraceMatchingFisher(trace_model, check=False), options)
        model = integrate(problem, num_steps, scheme)
        options = dataclasses.replace(options, num_probes=PROBES)
        problem = prepare_problem(denoiser, samples, FiniteDifferenceFisher(denoiser), options)
        probes = integrate(problem, num_steps, scheme)
        values = 1 - probes.trace_by_level / probes.trace_weights[:, None, None]
        return cls(
            model.noise_to_signal.log(), model.to_bits(model.trace_weights), model.unexplained_noise_fraction, values
        )

    @classmethod
    def join(cls, parts: Iterable[TraceErrors]) -> TraceErrors:
        """Joins the errors of several batches on one grid."""
        parts = list(parts)
        model, probes = (torch.cat([vars(part)[name] for part in parts], dim=-1) for name in ("model", "probes"))
        return cls(parts[0].log_noise, parts[0].weights, model, probes)

    def calibration(self) -> TraceCalibration:
        """Sums up the errors. The noise of the directions is taken away from the scatter over the images.

        The variance over n images is known to a factor 1 +- sqrt(2/(n - 1)); its upper end is taken.

        Raises:
            InputError: fewer than 8 images, whose scatter tells little.
        """
        count = self.model.shape[1]
        if count < LEAST_IMAGES:
            raise InputError(f"A trace model is calibrated on {LEAST_IMAGES} held-out images or more; got {count}.")
        gaps, noise = self.model - self.probes.mean(1), self.probes.var(1) / self.probes.shape[1]
        totals, total_noise = self.weights @ gaps, self.weights.square() @ noise
        spread = ((1 + math.sqrt(2 / (count - 1))) * totals.var() - total_noise.mean()).clamp_min(0).sqrt()
        single = (self.model[:, None] - self.probes).square()
        return TraceCalibration(
            error=float(totals.mean().abs() + NORMAL_95 * spread), samples=count, log_noise=self.log_noise.tolist(),
            bias=gaps.mean(1).tolist(), deviation=(gaps.var(1) - noise.mean(1)).clamp_min(0).sqrt().tolist(),
            scatter=single.flatten(1).mean(1).sqrt().tolist(),
        )  # fmt: skip


@check_kinds
def calibrate_trace_model(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    num_inference_steps: int = DEFAULT_STEPS,
    batch_size: int = 16,
    generator: torch.Generator | None = None,
    **call_arguments: Any,
) -> TraceCalibration:
    """Measures how far a checkpoint's trace model is from its denoiser's own trace, on held-out images.

        pipe.trace_model.set_calibration(calibrate_trace_model(pipe, images, prompts))
        pipe.save_pretrained(folder)

    From then on `log_likelihood` states the error as `trace_error`. Training by trace matching does it at its end.

    Args:
        pipe: a pipeline with a trace model; nothing on it is changed.
        images, prompt, latents: 8 or more images that the trace model was not trained on, as in `log_likelihood`.
        num_inference_steps: steps of the path on which both are compared.
        batch_size: images per evaluation of the network.
        **call_arguments: arguments of the pipeline's call.

    Returns:
        The calibration. Cost: 4 (`num_inference_steps` + 1) evaluations of the denoiser per image.

    Raises:
        InputError: the pipeline has no trace model, too few images; else as `log_likelihood`.
    """
    backbone = backbone_of(pipe)
    if backbone.trace_model is None:
        raise InputError(f"{backbone.name} has no trace model to calibrate; train one first, see docs/training.md.")
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; allowed: 1 or more images.")
    backbone.check_scheduler()
    scale = backbone.unguided_scale(call_arguments)
    samples, _, _ = likelihood_samples(backbone, images, latents, (0.0, 1.0), False, generator, None)
    denoiser = unguided_denoiser(backbone, samples, scale, prompt, call_arguments)
    if len(samples) < LEAST_IMAGES:
        raise InputError(f"A trace model is calibrated on {LEAST_IMAGES} held-out images or more; got {len(samples)}.")
    parts = []
    with backbone.loaded():
        for rows in torch.arange(len(samples)).split(batch_size):
            packed = backbone.pack(samples[rows])
            selected = denoiser.select_samples(rows)
            parts.append(TraceErrors.measure(selected, packed, backbone.trace_model, num_inference_steps, generator))
    return TraceErrors.join(parts).calibration()
