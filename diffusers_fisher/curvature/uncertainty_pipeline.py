"""Posterior uncertainties under a pipeline, at noised images, and in pixels."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones import backbone_of
from ..backbones.autoencoder import images_of
from ..backbones.base import Generators
from ..backbones.conditions import Condition
from ..backbones.inputs import check_arguments
from ..errors import InputError
from ..fisher.estimator import FisherEstimator, check_estimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..images import UNIT_RANGE, ImageLike
from ..likelihood.pipeline import likelihood_samples, unguided_denoiser
from ..likelihood.problem import samples_and_draws
from ..noise import expand, timestep_at
from .dimension import log_levels
from .uncertainty import DEFAULT_DIRECTIONS, DEFAULT_PROBES, PosteriorUncertainty, state_uncertainty


@check_kinds
def posterior_uncertainty(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    noise_to_signal: float,
    num_directions: int = DEFAULT_DIRECTIONS,
    num_probes: int | None = DEFAULT_PROBES,
    estimator: FisherEstimator | None = None,
    generator: Generators = None,
    **call_arguments: Any,
) -> PosteriorUncertainty:
    """Returns what a checkpoint leaves open about images that are noised to one level, without guidance.

    The image is noised, x_t = alpha x_0 + sigma eps, and the output describes the law of x_0 given x_t: its mean, the
    deviation of every element and the directions in which it varies most; of latents where the pipeline has an
    autoencoder (`space`), see `decode_uncertainty` for pixels. For a state of a run take `state_uncertainty`.

        out = posterior_uncertainty(pipe, images, "a photo of a coat", noise_to_signal=1.0)
        print(out.standard_deviation, out.explained)

    Args:
        pipe: a pipeline that has a backbone, stock or ours; nothing on it is changed.
        images, prompt, latents: as in `log_likelihood`; images have values from 0 to 1.
        noise_to_signal: sigma/alpha of the state, a level of the schedule.
        num_directions, num_probes: as in `state_uncertainty`.
        estimator: gives the products with the covariance; None: `FiniteDifferenceFisher`, which needs no graph. One of
            a trace model has no directions of its own.
        generator: gives the seed of the noise and of the probes. Both are functions of this seed and the image alone.
        **call_arguments: arguments of the pipeline's call, as in `log_likelihood`.

    Returns:
        `PosteriorUncertainty` with tensors (B, C, h, w). Cost: 1 + 6 (`num_directions` + 2) + `num_probes` evaluations
        of the denoiser for the whole batch.

    Raises:
        InputError: a level outside the schedule, a number that is not allowed; else as `log_likelihood`.
        UnsupportedError: as `log_likelihood`.
        NumericalError: a variance that is not finite.
    """
    backbone = backbone_of(pipe)
    backbone.check_scheduler()
    guidance_scale = backbone.unguided_scale(call_arguments)
    call_arguments = check_arguments(backbone.name, backbone.parameters, posterior_uncertainty, call_arguments)
    samples, _, keys = likelihood_samples(backbone, images, latents, UNIT_RANGE, False, generator, None)
    denoiser = unguided_denoiser(backbone, samples, guidance_scale, prompt, call_arguments)
    estimator = FiniteDifferenceFisher() if estimator is None else check_estimator(estimator)
    timestep = timestep_at(denoiser.scheduler, log_levels(denoiser.scheduler, noise_to_signal)[0])
    start, draws = samples_and_draws(backbone.pack(samples), generator, keys)
    with backbone.loaded(), torch.set_grad_enabled(estimator.needs_graph):
        level = denoiser.level(timestep)
        x = expand(level.alpha, start) * start + expand(level.sigma, start) * draws.normal("noise").to(start)
        state = denoiser.state(x.requires_grad_(estimator.needs_graph), timestep.to(torch.float32))
        out = state_uncertainty(
            estimator.bind(denoiser)(state), num_directions, num_probes, generator, keys, backbone.space
        )
    height, width = (side * backbone.factor for side in samples.shape[2:])

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return backbone.unpack(tensor, (height, width))

    return dataclasses.replace(
        out, mean=unpack(out.mean), variance=unpack(out.variance), variance_error=unpack(out.variance_error),
        directions=torch.stack([unpack(vectors) for vectors in out.directions]) if num_directions else
        out.directions.new_zeros(0, *samples.shape),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PixelUncertainty:
    """Holds a posterior uncertainty in pixels. All tensors are float32 on the CPU, of images in [0, 1].

    Args:
        mean: (B, 3, H, W) the decoded posterior mean.
        standard_deviation: (B, 3, H, W) deviation over the decoded draws, per pixel and channel.
        standard_error: (B, 3, H, W) standard error of this deviation by the number of draws, for a normal law.
        num_samples: number of draws.
    """

    mean: torch.Tensor
    standard_deviation: torch.Tensor
    standard_error: torch.Tensor
    num_samples: int


@check_kinds
@torch.no_grad()
def decode_uncertainty(
    pipe: DiffusionPipeline,
    uncertainty: PosteriorUncertainty,
    num_samples: int = 32,
    generator: torch.Generator | None = None,
) -> PixelUncertainty:
    """Returns what is left open of each pixel: the deviation over decoded draws of `PosteriorUncertainty.sample`.

    The draws are normal, with the posterior's mean, its leading directions and the variance of every latent. The
    decoder is not linear, and moves many pixels by one latent, so that the deviation comes from draws. It contains no
    error of the decoder itself.

    Args:
        uncertainty: of latents or pixels (B, C, h, w), as `posterior_uncertainty` returns it.
        num_samples: number of draws, at least 2.
        generator: draws them.

    Returns:
        `PixelUncertainty`. Cost: `num_samples` + 1 decodings per sample, and no evaluation of the denoiser.

    Raises:
        InputError: fewer than 2 draws, or latents in another layout.
        UnsupportedError: the pipeline has no autoencoder.
    """
    backbone = backbone_of(pipe)
    backbone.check_decoder()
    shape = tuple(uncertainty.mean.shape)
    if num_samples < 2 or len(shape) != 4:
        raise InputError(
            f"`num_samples` is {num_samples} and the samples have shape {shape}; allowed: at least 2, and "
            "(B, C, h, w). `posterior_uncertainty` returns such samples."
        )

    def decode(latents: torch.Tensor) -> torch.Tensor:
        pixels = backbone.decode_scaled(latents.float().to(backbone.device))
        return images_of(pixels).float().cpu()

    draws = torch.stack([decode(latents) for latents in uncertainty.sample(num_samples, generator)])
    deviation = draws.std(0)
    return PixelUncertainty(
        decode(uncertainty.mean), deviation, deviation / (2 * (num_samples - 1)) ** 0.5, num_samples
    )
