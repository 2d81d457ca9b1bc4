"""Likelihoods of images under a pipeline: from a user's arguments to the integration."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds, fit, hints_of
from ..backbones import Backbone, PipelineDenoiser, backbone_of
from ..backbones.base import Generators, Moment
from ..backbones.conditions import NEGATIVE_PROMPTS, Condition
from ..backbones.inputs import check_arguments
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..fisher.trace_matching import TraceMatchingFisher
from ..images import UNIT_RANGE, ImageLike, image_tensor
from ..seeds import content_key
from .comparison import METHODS, LikelihoodComparison
from .output import LikelihoodOutput, SquaredErrorOutput
from .schemes import DEFAULT_SCHEME
from .solver import Integration, integrate_log_likelihood
from .squared_error import squared_error_log_likelihood

NUM_LEVELS = 64
SQUARED_ERROR_OPTIONS = ("prior_mean", "prior_variance", "bins", "data_range")


@check_kinds
def log_likelihood(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    num_inference_steps: int = 32,
    estimator: FisherEstimator | None = None,
    num_probes: int | Literal["auto"] | None = "auto",
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
    **call_arguments: Any,
) -> LikelihoodOutput:
    """Scores images by their log-likelihood under a checkpoint, without classifier-free guidance.

    With an autoencoder it is a density of the latents, not of pixels (the output's `space`): comparable between images
    of one size under one autoencoder. The mean of the autoencoder's posterior stands for the image.

    Args:
        pipe: a pipeline that has a backbone, stock or ours; nothing on it is changed.
        images: PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W), in `data_range`; height and width multiples
            of 8 and of the autoencoder's factor.
        prompt: one prompt for all images, or one per image; None: the empty prompt. Class labels where the pipeline
            takes class labels.
        latents: (B, C, h, w) scaled latents, instead of `images`.
        num_inference_steps: steps of the integration.
        estimator: gives the trace of the diffusion Fisher; None: `TraceMatchingFisher` with the checkpoint's trace
            model, or without a trace model `FiniteDifferenceFisher()`, which needs no graph.
        num_probes: number of random directions of the trace per level; None: the exact trace, for which
            `AutodiffFisher` takes C*h*w backward passes per level; "auto": None for trace models, else 1.
        fixed_probes, noised, step_halving, generator, scheme: see `diffusers_fisher.likelihood.Integration`.
        prior_mean, prior_variance: moments of the training data's latents; None: the checkpoint's `latent_statistics`,
            or 0 and 1 where it has none. The output's `prior` names the choice.
        data_range: lowest and highest value of arrays and tensors of images, such as (0, 255).
        bins: for pipelines in pixels, the number of values an image can have, 256 for 8 bits: each pixel is moved to a
            random point of its bin, and `bits_per_dim` is that of the discrete image. None: that of the density.
        image_keys: one key per image, which stands for it in its random draws: images of equal keys have equal draws.
            None: a key of the image's values, so that an image has the same number in every batch and every order.
        **call_arguments: arguments of the pipeline's call, such as `prompt_embeds` with the tensors that belong to
            them. Negative prompts have no effect without guidance, and are refused.

    Returns:
        `LikelihoodOutput`. Cost: `num_inference_steps` + 1 levels, half as many again with `step_halving`, each with
        one evaluation of the denoiser and one of the trace model; without a trace model one more of the denoiser per
        probe instead (`AutodiffFisher`: a backward pass). Warns where the discretisation
        error exceeds 0.05 bits/dim (`CoarseGridWarning`).

    Raises:
        InputError: images, latents or conditions of the wrong kind, size, range or number; guidance; a trace model of
            another denoiser. UnsupportedError: a pipeline without a backbone, or a scheduler of another family than
            the model's.
    """
    backbone = backbone_of(pipe)
    backbone.check_bins(bins)
    if num_inference_steps < 2:
        raise InputError(f"`num_inference_steps` is {num_inference_steps}; allowed: at least 2, sensibly 20 or more.")
    backbone.check_scheduler()
    guidance_scale = backbone.unguided_scale(call_arguments)
    call_arguments = check_arguments(backbone.name, backbone.parameters, log_likelihood, call_arguments)
    samples, keys = keyed_images(backbone, images, latents, data_range)
    denoiser = unguided_denoiser(backbone, samples, guidance_scale, prompt, call_arguments)
    if estimator is None:
        estimator = (
            FiniteDifferenceFisher() if backbone.trace_model is None else TraceMatchingFisher(backbone.trace_model)
        )
    if num_probes == "auto":
        num_probes = estimator.default_num_probes
    mean, variance = backbone.prior(prior_mean, prior_variance, samples)
    nodes = num_inference_steps + 1 + (num_inference_steps // 2 + 1 if step_halving else 0)
    with backbone.loaded(), backbone.progress_bar(nodes) as progress:
        integration = Integration(
            num_inference_steps, num_probes, fixed_probes, mean, variance, noised, step_halving, generator,
            image_keys or keys,
            scheme, bins, backbone.space, progress.update,
        )  # fmt: skip
        return integrate_log_likelihood(denoiser, backbone.pack(samples), estimator, integration)


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
        **options: for "ode" the options of `log_likelihood`; for "squared error" `prior_mean`, `prior_variance`,
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
    samples, keys = keyed_images(backbone, images, latents, options.pop("data_range", UNIT_RANGE))
    rows: list[LikelihoodOutput] | list[SquaredErrorOutput]
    if method == "ode":
        options.setdefault("image_keys", keys)
        rows = scores = [
            log_likelihood(pipe, None, prompt, latents=samples, generator=generator, **options)
            for prompt in _replay(candidates, generator)
        ]
        errors = torch.stack([row.discretisation_error for row in scores])
        draws = [row.trace_by_level for row in scores]
        weights, fixed = scores[0].trace_weights, scores[0].fixed_probes
    else:
        backbone.check_scheduler()
        bins = options.pop("bins", None)
        backbone.check_bins(bins)
        mean, variance = backbone.prior(options.pop("prior_mean", None), options.pop("prior_variance", None), samples)
        scale = backbone.unguided_scale(options)
        denoisers = [unguided_denoiser(backbone, samples, scale, prompt, dict(options)) for prompt in candidates]
        levels = NUM_LEVELS if num_levels is None else num_levels
        with backbone.loaded(), backbone.progress_bar(levels * len(denoisers)) as progress:
            rows = squares = [
                squared_error_log_likelihood(
                    denoiser, backbone.pack(samples), levels, mean, variance, generator, backbone.space,
                    progress.update, bins,
                )
                for denoiser in _replay(denoisers, generator)
            ]  # fmt: skip
        errors = torch.zeros(len(squares), len(samples), dtype=torch.float64)
        draws = [row.contributions for row in squares]
        weights, fixed = None, False
    return LikelihoodComparison(
        log_prob=torch.stack([row.log_prob for row in rows]), contributions=torch.stack(draws, dim=-2),
        discretisation_error=errors, dims=rows[0].dims,
        num_denoiser_calls=sum(row.num_denoiser_calls for row in rows), space=rows[0].space, method=method,
        trace_weights=weights, fixed_probes=fixed,
    )  # fmt: skip


def keyed_images(
    backbone: Backbone, images: ImageLike | None, latents: torch.Tensor | None, data_range: tuple[float, float]
) -> tuple[torch.Tensor, list[str]]:
    """Returns the samples of images or latents, see `Backbone.samples_of`, and a key of each image's values.

    Keys are those of the input, because encoders round by batch, in 8 bits, because arrays and PIL images of the same
    pixels differ in their last digits.
    """
    if images is None or latents is not None:
        samples = backbone.samples_of(images, latents)
        return samples, [content_key(sample) for sample in samples]
    pixels = image_tensor(images, backbone.size_multiple, backbone.image_channels, data_range)
    return backbone.samples_of(pixels), [content_key(image) for image in (255 * pixels).round()]


def unguided_denoiser(
    backbone: Backbone, samples: torch.Tensor, guidance_scale: float, prompt: Condition, call_arguments: dict[str, Any]
) -> PipelineDenoiser:
    """Makes the pipeline's denoiser for samples (B, C, h, w) with one condition per sample.

    Args:
        guidance_scale: guidance scale at which the network's output is a score, see `Backbone.unguided_scale`.

    Raises:
        InputError: negative prompts, which have no effect; conditions that the pipeline does not take.
    """
    texts = {name: call_arguments[name] for name in NEGATIVE_PROMPTS if call_arguments.get(name) is not None}
    negative = [name for name, text in texts.items() if not isinstance(text, (str, list, tuple)) or text]
    if negative:
        raise InputError(
            f"`{negative[0]}` is {call_arguments[negative[0]]!r}; a likelihood is without guidance, where negative "
            "prompts count for nothing. Leave it out; `compare_likelihood` compares two prompts."
        )
    _, conditions = backbone.conditions(prompt, call_arguments, len(samples))
    arguments = {**backbone.size_arguments_of(samples), **call_arguments, **conditions}
    return PipelineDenoiser(backbone, guidance_scale, **arguments)


def _check_options(backbone: Backbone, method: str, num_levels: int | None, options: dict[str, Any]) -> dict[str, Any]:
    """Returns the options, checked. Refuses options of the other method, so that none is ignored."""
    if "prompt" in options:
        raise InputError(
            "`compare_likelihood` takes its prompts as `prompts`, a list, each for all images; got `prompt`."
        )
    if method == "ode":
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


def _replay(entries: Sequence[Any], generator: torch.Generator) -> Iterator[Any]:
    """Yields the entries, with the generator in the same state before each entry."""
    state = generator.get_state()
    for entry in entries:
        generator.set_state(state)
        yield entry
