"""Likelihoods of images under a pipeline: from a user's arguments to the integration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_generators, check_kinds, fit, hints_of
from ..backbones import Backbone, PipelineDenoiser, backbone_of
from ..backbones.base import Generators, Moment
from ..backbones.conditions import NEGATIVE_PROMPTS, Condition
from ..backbones.distilled import warn_of_distillation
from ..backbones.inputs import check_arguments
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..fisher.trace_matching import TraceMatchingFisher
from ..images import UNIT_RANGE, ImageLike, image_tensor
from ..seeds import content_key
from .comparison import METHODS, LikelihoodComparison, check_shared_probes
from .draws import ImageDraws, unchanged_states
from .output import LikelihoodOutput
from .problem import Integration, check_dealt_probes, check_standard_error
from .refinement import MAX_DENOISER_CALLS, check_refinement
from .schemes import DEFAULT_SCHEME
from .solver import integrate_log_likelihood
from .squared_error import squared_error_log_likelihood
from .trace_check import NUM_CHECKS, check_trace_options

DEFAULT_STEPS = 32
DEFAULT_TOLERANCE = 0.05
"""Images like the data need no finer grid than the first one for this, see examples/benchmarks/total_error.py."""

STEPS_FOR_TOLERANCE = 38
"""More steps for a tolerance of the caller's, because an image that they do not suffice for starts anew, with twice as
many."""

NUM_LEVELS = 64
SQUARED_ERROR_OPTIONS = ("prior_mean", "prior_variance", "bins", "data_range")


@check_kinds
def log_likelihood(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    num_inference_steps: int | None = None,
    estimator: FisherEstimator | None = None,
    num_probes: int | Literal["auto"] | None = "auto",
    dealt_probes: bool = False,
    fixed_probes: bool = False,
    noised: bool = False,
    step_halving: bool = False,
    prior_mean: Moment = None,
    prior_variance: Moment = None,
    generator: Generators = None,
    scheme: str = DEFAULT_SCHEME,
    data_range: tuple[float, float] = UNIT_RANGE,
    bins: int | None = None,
    image_keys: Sequence[str] | None = None,
    sample_latents: bool = False,
    tolerance: float | Literal["auto"] | None = "auto",
    max_denoiser_calls: int = MAX_DENOISER_CALLS,
    trace_checks: int = NUM_CHECKS,
    untrusted_trace: str = "warn",
    max_standard_error: float | None = None,
    **call_arguments: Any,
) -> LikelihoodOutput:
    """Scores images by their log-likelihood under a checkpoint, without classifier-free guidance.

    With an autoencoder it is a density of the latents, not of pixels (the output's `space`): comparable between images
    of one size under one autoencoder. The mean of the autoencoder's posterior stands for the image, or with
    `sample_latents` a draw of it.

    Args:
        pipe: a pipeline, stock or ours; nothing on it is changed. Without a backbone of its class it takes `latents`
            alone.
        images: PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W), in `data_range`; height and width multiples
            of 8 and of the autoencoder's factor.
        prompt: one prompt for all images, or one per image; None: the empty prompt. Class labels where the pipeline
            takes class labels.
        latents: scaled latents, instead of `images`: (B, C, h, w), or for pipelines without a backbone in the layout
            of their call's own `latents`, such as (B, C, F, h, w) for videos, with its `height`, `width` and
            `num_frames`.
        num_inference_steps: steps of the integration, with a tolerance of its first grid; None: 32, or 38 with a
            tolerance that is given.
        estimator: gives the trace of the diffusion Fisher; None: `TraceMatchingFisher` with the checkpoint's trace
            model, or without a trace model `FiniteDifferenceFisher()`, which needs no graph.
        num_probes: number of random directions of the trace per level; None: the exact trace, for which
            `AutodiffFisher` takes C*h*w backward passes per level; "auto": None for trace models, else 1.
        dealt_probes, fixed_probes, noised, step_halving, generator, scheme: see
            `diffusers_fisher.likelihood.Integration`.
        prior_mean, prior_variance: moments of the training data's latents; None: the checkpoint's `latent_statistics`,
            or 0 and 1 where it has none. The output's `prior` names the choice.
        data_range: lowest and highest value of arrays and tensors of images, such as (0, 255).
        bins: for pipelines in pixels, the number of values an image can have, 256 for 8 bits: each pixel is moved to a
            random point of its bin, and `bits_per_dim` is that of the discrete image. None: that of the density.
        image_keys: one key per image, which stands for it in its random draws: images of equal keys have equal draws.
            None: a key of the image's values, so that an image has the same number in every batch and every order.
        sample_latents: whether a random draw of the autoencoder's posterior stands for an image, as in the training of
            most networks, instead of the posterior's mean. The draw is a function of the seed and of the image's key.
        tolerance: bits/dim; each image's grid is refined until its discretisation error is at most this, and the
            output's `status` says which images reached it. None: one grid of `num_inference_steps` for all images.
            "auto": 0.05, or None where `num_inference_steps` or `step_halving` is given.
        max_denoiser_calls: largest number of evaluations per image along its path with a tolerance; those of the
            trace's directions come on top.
        trace_checks: number of levels at which a trace model is checked on every image by a difference of the
            denoiser; 0: no checks. Without a trace model there is nothing to check.
        untrusted_trace: "warn" keeps the number of an image whose checks disagree with the trace model, and states the
            larger error; "probes" takes the trace of such an image by differences at all levels instead.
        max_standard_error: bits/dim; images with a larger standard error get more random directions per level, up to
            64. None: all images have `num_probes`.
        **call_arguments: arguments of the pipeline's call, such as `prompt_embeds` with the tensors that belong to
            them. Negative prompts have no effect without guidance, and are refused.

    Returns:
        `LikelihoodOutput`. Cost: `num_inference_steps` + 1 levels, half as many again with `step_halving`, each with
        one evaluation of the denoiser and one of the trace model; without a trace model one more of the denoiser per
        probe instead (`AutodiffFisher`: a backward pass); with a tolerance further levels for the images that need
        them, which images unlike the data often do. Warns where the discretisation error exceeds 0.05 bits/dim, or the
        tolerance after the last evaluation (`CoarseGridWarning`).

    Raises:
        InputError: images, latents or conditions of the wrong kind, size, range or number; guidance; a trace model of
            another denoiser; `sample_latents` where there is no posterior. UnsupportedError: images for a pipeline
            without a backbone, or a scheduler of another family than the model's.
    """
    backbone = backbone_of(pipe)
    backbone.check_bins(bins)
    num_inference_steps, tolerance = first_grid(num_inference_steps, tolerance, step_halving)
    if num_inference_steps < 2:
        raise InputError(f"`num_inference_steps` is {num_inference_steps}; allowed: at least 2, sensibly 20 or more.")
    check_refinement(tolerance, max_denoiser_calls, num_inference_steps, step_halving, "num_inference_steps")
    check_trace_options(trace_checks, untrusted_trace)
    backbone.check_scheduler()
    guidance_scale = backbone.unguided_scale(call_arguments)
    call_arguments = check_arguments(backbone.name, backbone.parameters, log_likelihood, call_arguments)
    samples, kind, keys = likelihood_samples(
        backbone, images, latents, data_range, sample_latents, generator, image_keys
    )
    denoiser = unguided_denoiser(backbone, samples, guidance_scale, prompt, call_arguments)
    estimator = default_estimator(backbone) if estimator is None else estimator
    if num_probes == "auto":
        num_probes = estimator.default_num_probes
    check_dealt_probes(dealt_probes, num_probes, fixed_probes)
    check_standard_error(max_standard_error, num_probes, fixed_probes)
    mean, variance, basis = backbone.prior(prior_mean, prior_variance, samples)
    nodes = num_inference_steps + 1 + (num_inference_steps // 2 + 1 if step_halving else 0)
    with backbone.loaded(), backbone.progress_bar(nodes) as progress:

        def extend(number: int) -> None:
            progress.total = (progress.total or 0) + number

        integration = Integration(
            num_steps=num_inference_steps, num_probes=num_probes, dealt_probes=dealt_probes,
            fixed_probes=fixed_probes, prior_mean=mean, prior_variance=variance, prior_basis=basis, noised=noised,
            step_halving=step_halving, generator=generator, keys=keys, scheme=scheme, bins=bins, space=backbone.space,
            tolerance=tolerance, max_denoiser_calls=max_denoiser_calls, trace_checks=trace_checks,
            untrusted_trace=untrusted_trace, max_standard_error=max_standard_error, on_step=progress.update,
            on_grid=extend,
        )  # fmt: skip
        output = integrate_log_likelihood(denoiser, backbone.pack(samples), estimator, integration)
    return dataclasses.replace(output, latents=kind)


@check_kinds
def compare_likelihood(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompts: Sequence[Condition] | None = None,
    *,
    latents: torch.Tensor | None = None,
    method: str = "squared error",
    num_levels: int | None = None,
    generator: torch.Generator | None = None,
    sample_latents: bool = False,
    **options: Any,
) -> LikelihoodComparison:
    """Compares the likelihoods of each image under each prompt. All prompts have the same random draws.

    "squared error" needs no graph: the denoiser's squared errors at random levels, as diffusion classifiers take them
    (Li et al., 2303.16203), weighted to a log-likelihood. "ode" is `log_likelihood` for every prompt, with the same
    grid and probes. Differences and their standard errors are methods of the output; between images those of "ode" are
    no smaller than those of each side, because every image has its own probes.

    Args:
        images, latents: as in `log_likelihood`.
        prompts: prompts (class labels where the pipeline takes those), each for all images; None: unconditional.
        method: "squared error" or "ode".
        num_levels: number of draws of "squared error", even; None: 64.
        generator: its draws are repeated for every prompt. Without a generator the numbers change from call to call.
        sample_latents: as in `log_likelihood`; all prompts see the same latents.
        **options: for "ode" the options of `log_likelihood`, except that a trace model is checked and grids are
            refined only if `trace_checks` and `tolerance` say so; for "squared error" `prior_mean`, `prior_variance`,
            `data_range`, `bins`, and arguments of the pipeline's call.

    Returns:
        `LikelihoodComparison`. Cost: for every prompt `num_levels` evaluations, or those of `log_likelihood`.

    Raises:
        InputError: no prompts, an unknown method, options of the other method; else as `log_likelihood`.
    """
    backbone = backbone_of(pipe)
    if method not in METHODS:
        raise InputError(f"`method` is {method!r}; allowed: {', '.join(METHODS)}.")
    options = _check_options(backbone, method, num_levels, options)
    candidates = [None] if prompts is None else prompts
    if not candidates:
        raise InputError(f"`prompts` is {prompts!r}; allowed: a list of at least one, each for all images.")
    if generator is None:  # for None, noise on a GPU would come from the GPU's generator, which is not replayed
        generator = torch.default_generator
    data_range = options.pop("data_range", UNIT_RANGE)
    samples, kind, keys = likelihood_samples(
        backbone, images, latents, data_range, sample_latents, generator, options.pop("image_keys", None)
    )
    if method == "ode":
        table = LikelihoodComparison.of_ode([
            log_likelihood(
                pipe, None, prompt, latents=samples, generator=generator, image_keys=keys,
                **{"trace_checks": 0, "tolerance": None, **options},
            )
            for prompt in replay(candidates, generator)
        ])  # fmt: skip
        return dataclasses.replace(table, latents=kind)
    backbone.check_scheduler()
    bins = options.pop("bins", None)
    backbone.check_bins(bins)
    mean, variance, basis = backbone.prior(
        options.pop("prior_mean", None), options.pop("prior_variance", None), samples
    )
    scale = backbone.unguided_scale(options)
    denoisers = [unguided_denoiser(backbone, samples, scale, prompt, dict(options)) for prompt in candidates]
    levels = NUM_LEVELS if num_levels is None else num_levels
    with backbone.loaded(), backbone.progress_bar(levels * len(denoisers)) as progress:
        table = LikelihoodComparison.of_squared_errors([
            squared_error_log_likelihood(
                denoiser, backbone.pack(samples), levels, mean, variance, generator, backbone.space, progress.update,
                bins, basis,
            )
            for denoiser in replay(denoisers, generator)
        ])  # fmt: skip
    return dataclasses.replace(table, latents=kind)


def first_grid(
    num_steps: int | None, tolerance: float | Literal["auto"] | None, step_halving: bool
) -> tuple[int, float | None]:
    """Returns the number of steps of the first grid, and the tolerance; None: there is no other grid."""
    if isinstance(tolerance, str):
        if tolerance != "auto":
            raise InputError(f"`tolerance` is {tolerance!r}; allowed: a number of bits/dim, None, or 'auto'.")
        tolerance = DEFAULT_TOLERANCE if num_steps is None and not step_halving else None
        default = DEFAULT_STEPS
    else:
        default = DEFAULT_STEPS if tolerance is None else STEPS_FOR_TOLERANCE
    return default if num_steps is None else num_steps, tolerance


def default_estimator(backbone: Backbone) -> FisherEstimator:
    """Returns the estimator of the checkpoint's trace model; without a trace model, one that needs no graph."""
    trace_model = backbone.trace_model
    return FiniteDifferenceFisher() if trace_model is None else TraceMatchingFisher(trace_model)


def likelihood_samples(
    backbone: Backbone, images: ImageLike | None, latents: torch.Tensor | None, data_range: tuple[float, float],
    sample_latents: bool, generator: Generators, keys: Sequence[str] | None,
) -> tuple[torch.Tensor, str, Sequence[str]]:  # fmt: skip
    """Returns the samples (B, C, h, w) float32 of a likelihood, the output's word for them, and their keys.

    Args:
        sample_latents: draw them from the autoencoder's posterior. The generator is left as it was, so that all other
            draws are those without.
        keys: keys of the images; None: keys of their contents.

    Raises:
        InputError: both or neither of `images` and `latents`, or of a kind that the pipeline does not take;
            `sample_latents` without an autoencoder, with `latents`, or where the posterior has no variance.
    """
    if images is None or latents is not None:
        samples, deviation, kind = backbone.samples_of(images, latents), None, "given"
        own_keys, reason = [content_key(sample) for sample in samples], "`latents` were passed"
    else:
        _ = backbone.latent_channels  # refuses networks that take more than latents
        pixels = image_tensor(images, backbone.size_multiple, backbone.image_channels, data_range)
        samples, deviation = backbone.posterior_of(pixels)
        own_keys, kind = pixel_keys(pixels), "encoded" if deviation is None else "mean"
        reason = f"{type(backbone.autoencoder).__name__} has no posterior with a variance"
        if backbone.space == "pixel":
            kind, reason = "pixels", f"samples of {backbone.name} are pixels"
    keys = keys or own_keys  # those of the input, because encoders round by batch
    if not sample_latents:
        return samples, kind, keys
    if deviation is None:
        raise InputError(
            f"`sample_latents` draws latents of images from the posterior of an autoencoder, but {reason}. Leave it "
            "out, or pass `images` to a pipeline with an AutoencoderKL."
        )
    check_generators(generator, len(samples))
    if len(keys) != len(samples):
        raise InputError(f"{len(keys)} image keys were given for {len(samples)} images; give as many.")
    with unchanged_states(generator):
        noise = ImageDraws(samples, generator, keys).normal("latents")
    return samples + deviation * noise.to(samples), "sampled", keys


def pixel_keys(pixels: torch.Tensor) -> list[str]:
    """Returns a key of each image (B, C, H, W) in [0, 1], by its values in 8 bits.

    Arrays and PIL images of the same pixels differ in their last digits.
    """
    return [content_key(image) for image in (255 * pixels).round()]


def unguided_denoiser(
    backbone: Backbone,
    samples: torch.Tensor,
    guidance_scale: float | None,
    prompt: Condition,
    call_arguments: dict[str, Any],
) -> PipelineDenoiser:
    """Makes the pipeline's denoiser for samples (B, C, h, w) with one condition per sample.

    Args:
        guidance_scale: guidance scale at which the network's output is a score, see `Backbone.unguided_scale`.

    Raises:
        InputError: negative prompts, which have no effect; conditions that the pipeline does not take.
    """
    warn_of_distillation(backbone)
    texts = {name: call_arguments[name] for name in NEGATIVE_PROMPTS if call_arguments.get(name) is not None}
    negative = [name for name, text in texts.items() if not isinstance(text, (str, list, tuple)) or text]
    if negative:
        raise InputError(
            f"`{negative[0]}` is {call_arguments[negative[0]]!r}; likelihoods and curvature are without guidance, "
            "where negative prompts count for nothing. Leave it out; `compare_likelihood` compares two prompts."
        )
    _, conditions = backbone.conditions(prompt, call_arguments, len(samples))
    arguments = {**backbone.size_arguments_of(samples), **call_arguments, **conditions}
    denoiser = PipelineDenoiser(backbone, guidance_scale, **arguments)
    denoiser.check_layout(samples)
    return denoiser


def _check_options(backbone: Backbone, method: str, num_levels: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options, checked. Refuses options of the other method, so that none is ignored."""
    if "prompt" in options:
        raise InputError(
            "`compare_likelihood` takes its prompts as `prompts`, a list, each for all images; got `prompt`."
        )
    if method == "ode":
        check_shared_probes(options)
        if num_levels is not None:
            raise InputError("`num_levels` belongs to method 'squared error'; 'ode' takes `num_inference_steps`.")
        return options
    ode_options = {field.name for field in dataclasses.fields(Integration)} | {"num_inference_steps", "estimator"}
    for name in sorted((ode_options - set(SQUARED_ERROR_OPTIONS)) & set(options)):
        raise InputError(
            f"`{name}` belongs to method='ode'; 'squared error' takes num_levels, "
            f"{', '.join(SQUARED_ERROR_OPTIONS)} and arguments of the pipeline's call."
        )
    result = {
        name: fit(name, options[name], hints_of(log_likelihood)) for name in SQUARED_ERROR_OPTIONS if name in options
    }
    arguments = {name: value for name, value in options.items() if name not in result}
    return result | check_arguments(backbone.name, backbone.parameters, compare_likelihood, arguments)


def replay(entries: Sequence[Any], generator: torch.Generator) -> Iterator[Any]:
    """Yields the entries, with the generator in the same state before each entry."""
    state = generator.get_state()
    for entry in entries:
        generator.set_state(state)
        yield entry
