"""Bounds on likelihoods and intrinsic dimensions of images under a pipeline: from a user's arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones import backbone_of
from ..backbones.base import Generators, Moment
from ..backbones.conditions import Condition
from ..backbones.inputs import check_arguments
from ..fisher.estimator import FisherEstimator
from ..images import UNIT_RANGE, ImageLike
from ..likelihood.pipeline import default_estimator, likelihood_samples, unguided_denoiser
from ..settings import ChainVariance
from .bound import denoiser_likelihood_bound
from .dimension import NUM_LEVELS, IntrinsicDimension, NoiseLevels, denoiser_intrinsic_dimension
from .options import BoundOptions
from .output import LikelihoodBound


@check_kinds
def likelihood_bound(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    variance: ChainVariance = "optimal",
    num_inference_steps: int | None = None,
    num_draws: int | None = None,
    estimator: FisherEstimator | None = None,
    num_probes: int | Literal["auto"] | None = "auto",
    prior_mean: Moment = None,
    prior_variance: Moment = None,
    generator: Generators = None,
    data_range: tuple[float, float] = UNIT_RANGE,
    bins: int | None = None,
    image_keys: Sequence[str] | None = None,
    maps: bool = False,
    **call_arguments: Any,
) -> LikelihoodBound:
    """Bounds the negative log-likelihoods of images from above, without an ODE and without guidance.

    The density is that of `log_likelihood`: of latents where the pipeline has an autoencoder (`space`), smoothed with
    the schedule's lowest noise. The bound is the negative ELBO of the reverse chain. It holds whatever the trace's
    estimator says: a wrong trace loosens it.

        bound = likelihood_bound(pipe, images, "a photo of a coat", generator=torch.Generator().manual_seed(0))
        print(bound.bits_per_dim, bound.standard_error)

    Args:
        pipe: a pipeline that has a backbone, stock or ours; nothing on it is changed.
        images, prompt, latents, prior_mean, prior_variance, generator, data_range, bins, image_keys: as in
            `log_likelihood`.
        variance: variance of the reverse chain: "optimal", one number per state from the trace; "diagonal", one per
            element from the diagonal; "fixed_small", "fixed_large" or "learned", those of the papers on pixel models,
            on all steps of the training schedule. See `BoundOptions`.
        num_inference_steps: number of steps of the chain, for the optimal variances; None: 20.
        num_draws: number of noises per level: 1, 2, or an even number from 6 on; None: 8, or 1 for the variances of
            the papers.
        estimator: gives the trace of the diffusion Fisher, for the optimal variances; None: that of `log_likelihood`.
        num_probes: number of random directions of the trace per state; None: the exact one; "auto": None for trace
            models, else 1.
        maps: whether to keep the bound's parts by element of a sample, (B, C, h, w) of latents or pixels, for
            `LikelihoodBound.image_maps`.
        **call_arguments: arguments of the pipeline's call, as in `log_likelihood`.

    Returns:
        `LikelihoodBound`. Cost: `num_inference_steps` * `num_draws` evaluations of the denoiser for the whole batch,
        each with one of the trace model, or with one more of the denoiser per probe.

    Raises:
        InputError: a number of steps, draws or probes that is not allowed; else as `log_likelihood`.
        UnsupportedError: as `log_likelihood`.
        NumericalError: a bound or a trace that is not finite.
    """
    backbone = backbone_of(pipe)
    backbone.check_bins(bins)
    backbone.check_scheduler()
    options = BoundOptions(variance, num_inference_steps, num_draws, bins=bins, space=backbone.space, maps=maps)
    guidance_scale = backbone.unguided_scale(call_arguments)
    call_arguments = check_arguments(backbone.name, backbone.parameters, likelihood_bound, call_arguments)
    samples, _, keys = likelihood_samples(backbone, images, latents, data_range, False, generator, image_keys)
    denoiser = unguided_denoiser(backbone, samples, guidance_scale, prompt, call_arguments)
    steps, mean, moment, basis = options.steps, prior_mean, prior_variance, options.prior_basis
    if options.uses_schedule:
        steps = backbone.pipe.scheduler.config["num_train_timesteps"]
        num_probes = None if num_probes == "auto" else num_probes
    else:
        estimator = default_estimator(backbone) if estimator is None else estimator
        num_probes = estimator.default_num_probes if num_probes == "auto" else num_probes
        mean, moment, basis = backbone.prior(prior_mean, prior_variance, samples)
    with backbone.loaded(), backbone.progress_bar(steps * options.draws) as progress:
        options = dataclasses.replace(
            options, num_probes=num_probes, prior_mean=mean, prior_variance=moment, generator=generator,
            prior_basis=basis, keys=keys, on_step=progress.update,
        )  # fmt: skip
        out = denoiser_likelihood_bound(denoiser, backbone.pack(samples), estimator, options)
    if out.maps is None:
        return out
    height, width = (side * backbone.factor for side in samples.shape[2:])
    return dataclasses.replace(out, maps=backbone.unpack(out.maps, (height, width)))


@check_kinds
def intrinsic_dimension(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    noise_to_signal: NoiseLevels = None,
    estimator: FisherEstimator | None = None,
    num_probes: int | Literal["auto"] | None = "auto",
    generator: Generators = None,
    image_keys: Sequence[str] | None = None,
    **call_arguments: Any,
) -> IntrinsicDimension:
    """Returns in how many directions a checkpoint's data extend about each image, without guidance.

    The dimension at a noise level counts the directions in which the data extend further than the noise: of latents
    where the pipeline has an autoencoder (`space`). The encoder's own noise counts too: docs/curvature.md shows what
    that means for simple and complex images.

        out = intrinsic_dimension(pipe, images, "a photo of a coat", generator=torch.Generator().manual_seed(0))
        print(out.value, out.standard_error, out.has_plateau)

    Args:
        pipe: a pipeline that has a backbone, stock or ours; nothing on it is changed.
        images, prompt, latents, generator, image_keys: as in `log_likelihood`; images have values from 0 to 1.
        noise_to_signal: sigma/alpha of the levels, increasing; None: 16 levels at equal distances in the logarithm,
            from the schedule's lowest to 1.
        estimator: gives the trace of the diffusion Fisher; None: that of `log_likelihood`.
        num_probes: number of random directions of the trace per level; None: the exact one; "auto": None for trace
            models, else 1.
        **call_arguments: arguments of the pipeline's call, as in `log_likelihood`.

    Returns:
        `IntrinsicDimension`. Cost: one evaluation of the denoiser per level for the whole batch, each with one of the
        trace model, or with one more of the denoiser per probe.

    Raises:
        InputError: levels outside the schedule or in another order, a number of probes that is not allowed; else as
            `log_likelihood`.
        UnsupportedError: as `log_likelihood`.
        NumericalError: a dimension that is not finite.
    """
    backbone = backbone_of(pipe)
    backbone.check_scheduler()
    guidance_scale = backbone.unguided_scale(call_arguments)
    call_arguments = check_arguments(backbone.name, backbone.parameters, intrinsic_dimension, call_arguments)
    samples, _, keys = likelihood_samples(backbone, images, latents, UNIT_RANGE, False, generator, image_keys)
    denoiser = unguided_denoiser(backbone, samples, guidance_scale, prompt, call_arguments)
    estimator = default_estimator(backbone) if estimator is None else estimator
    num_probes = estimator.default_num_probes if num_probes == "auto" else num_probes
    total = NUM_LEVELS if noise_to_signal is None else torch.as_tensor(noise_to_signal).numel()
    with backbone.loaded(), backbone.progress_bar(total) as progress:
        return denoiser_intrinsic_dimension(
            denoiser, backbone.pack(samples), estimator, noise_to_signal, num_probes, generator, keys, backbone.space,
            progress.update,
        )  # fmt: skip
