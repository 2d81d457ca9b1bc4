"""Memorised prompts of a pipeline: from a user's arguments to the comparison of its two branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_generators, check_kinds
from ..backbones import PipelineDenoiser, backbone_of
from ..backbones.base import Generators
from ..backbones.conditions import EMBEDDINGS, PROMPT_ARGUMENTS, Condition
from ..backbones.inputs import check_arguments
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from ..likelihood.draws import ImageDraws
from ..likelihood.pipeline import unguided_denoiser
from .memorisation import denoiser_memorisation, level_grid
from .memorisation_output import Memorisation


@check_kinds
def memorisation(
    pipe: DiffusionPipeline,
    prompts: Condition,
    *,
    noise_to_signal: float | Sequence[float] | None = None,
    num_draws: int = 4,
    estimator: FisherEstimator | None = None,
    num_probes: int | Literal["auto"] | None = "auto",
    maps: bool = False,
    generator: Generators = None,
    height: int | None = None,
    width: int | None = None,
    **call_arguments: Any,
) -> Memorisation:
    """Scores prompts by how far the model has memorised their images, from initial noise alone.

    For a memorised prompt the law of the images has collapsed to a point. This shows at the first steps of a run in
    two differences between the network with the prompt and the same network without: that of the scores
    (`score_difference`), and that of the traces of the diffusion Fisher (`trace_difference`).

        prompts = ["a photo of a coat", "a photo of a bag"]
        found = memorisation(pipe, prompts, generator=torch.Generator().manual_seed(0))
        print(found.score_difference, found.trace_difference, found.trace_error)

    Args:
        pipe: a pipeline that has a backbone and an unconditional branch, stock or ours; nothing on it is changed.
        prompts: prompts, or class labels where the pipeline takes class labels.
        noise_to_signal: sigma/alpha of the noise levels, decreasing; one to three are sensible, and the scores are
            means over them. None: the schedule's highest alone.
        num_draws: number of initial noises per prompt; one has no standard error.
        estimator: gives the traces of both branches; None: `FiniteDifferenceFisher()`, which asks the network itself.
            `TraceMatchingFisher(trace_model)` takes no further evaluations, but a model that was not trained on
            memorised prompts need not know their curvature.
        num_probes: number of random directions per state, the same for both branches; None: exact traces; "auto":
            None for trace models, else 1; 0: no traces, the score difference alone.
        maps: whether to keep coordinate-wise differences for `Memorisation.image_maps`. By random directions they are
            noisy (`trace_maps_error`): take more draws. A trace model with one number per sample has no maps.
        generator: gives the seed by one draw; a list gives one seed per prompt. Noises and directions of a prompt are
            functions of the seed, the prompt and the draw alone.
        height, width: size of the images in pixels; None: the network's own.
        **call_arguments: arguments of the pipeline's call, such as `prompt_2`.

    Returns:
        `Memorisation`. Cost per draw and level: 2 evaluations per prompt without traces, 4 with one random direction.

    Raises:
        InputError: prompts of the wrong kind; embeddings in the place of prompts; guidance; levels outside of the
            schedule; a number of draws that is not allowed; an estimator with its own denoiser.
        UnsupportedError: a pipeline without a backbone or without an unconditional branch (unconditional models, and
            networks that take the guidance scale as an input).
        NumericalError: a score that is not finite.
    """
    backbone = backbone_of(pipe)
    backbone.null_conditions(1)  # refuses a pipeline without an unconditional branch before the prompts are looked at
    if num_draws < 1:
        raise InputError(f"`num_draws` is {num_draws}; allowed: at least 1, or 2 for a standard error.")
    backbone.check_scheduler()
    guidance_scale = backbone.unguided_scale(call_arguments)
    call_arguments = check_arguments(backbone.name, backbone.parameters, memorisation, call_arguments)
    embeddings = [name for name in EMBEDDINGS if call_arguments.get(name) is not None]
    if embeddings:
        raise InputError(
            f"`{embeddings[0]}` was passed, but the draws of a prompt depend on its text. Pass the texts as `prompts`."
        )
    conditions, _ = backbone.conditions(prompts, call_arguments, None)
    size = backbone.image_size(height, width)
    shape = (len(conditions), backbone.latent_channels, *(side // backbone.factor for side in size))
    samples = torch.empty(shape, device="meta")
    check_generators(generator, len(samples))
    draws = ImageDraws(samples, generator, [str(condition) for condition in conditions])
    conditional = unguided_denoiser(backbone, samples, guidance_scale, prompts, call_arguments)
    # A second prompt is part of the condition, so the unconditional branch goes without.
    rest = {name: value for name, value in call_arguments.items() if name not in PROMPT_ARGUMENTS}
    unconditional = PipelineDenoiser(
        backbone, guidance_scale,
        **{**backbone.size_arguments_of(samples), **rest, **backbone.null_conditions(len(samples))},
    )  # fmt: skip
    # In the network's precision, so that a call with this noise as `latents` begins with the very same numbers.
    noise = torch.stack([
        backbone.pack(draws.normal("memorisation", draw).to(backbone.device, backbone.dtype))
        for draw in range(num_draws)
    ])  # fmt: skip
    total = num_draws * len(level_grid(conditional, unconditional, noise_to_signal))
    with backbone.loaded(), backbone.progress_bar(total) as progress:
        out = denoiser_memorisation(
            conditional, unconditional, noise, noise_to_signal, estimator, num_probes, maps, generator, progress.update
        )

    def unpack(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else backbone.unpack(values, size)

    return dataclasses.replace(
        out, noise=noise, space=backbone.space, score_maps=unpack(out.score_maps), trace_maps=unpack(out.trace_maps),
        trace_maps_error=unpack(out.trace_maps_error),
    )  # fmt: skip
