"""Which of several checkpoints gives images the higher likelihood."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones import Backbone, backbone_of
from ..backbones.conditions import Condition
from ..backbones.parts import checkpoint_parts, set_checkpoint_parts
from ..backbones.stock_calls import shallow_copy
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from ..fisher.finite_difference import FiniteDifferenceFisher
from ..images import UNIT_RANGE, ImageLike
from ..models import autoencoder_differences
from ..noise import log_noise_to_signal_range
from .comparison import CheckpointComparison, check_shared_probes
from .pipeline import likelihood_samples, log_likelihood, replay

SAME_LEVEL = 1e-6  # difference of log(sigma/alpha) up to which two schedules end at one level


@check_kinds
def compare_checkpoints(
    pipes: Sequence[DiffusionPipeline],
    images: ImageLike | None = None,
    prompt: Condition = None,
    *,
    latents: torch.Tensor | None = None,
    estimator: FisherEstimator | None = None,
    generator: torch.Generator | None = None,
    data_range: tuple[float, float] = UNIT_RANGE,
    sample_latents: bool = False,
    **options: Any,
) -> CheckpointComparison:
    """Compares the likelihoods of images under several checkpoints: is a fine-tune better than its base?

    All checkpoints see the same latents, which are encoded once, and the same grid and random directions, so that most
    of the probes' errors cancel in the differences. All have the prior of the first checkpoint that has latent
    statistics, so that the differences are those of the networks.

    Args:
        pipes: two or more pipelines with one autoencoder (equal copies are allowed) and one range of noise levels.
            Nothing on them is changed.
        images, prompt, latents, data_range, sample_latents: as in `log_likelihood`.
        estimator: gives the trace, for all checkpoints, and has no denoiser of its own; None:
            `FiniteDifferenceFisher()`. Errors of trace models would not cancel between checkpoints.
        generator: its draws are repeated for every checkpoint. Without a generator the numbers change from call to
            call.
        **options: options of `log_likelihood`, and arguments of the pipelines' call. Without `tolerance` all
            checkpoints have one grid.

    Returns:
        `CheckpointComparison`; its method `differences` has the differences and their errors. Cost: for every
        checkpoint that of `log_likelihood`.

    Raises:
        InputError: fewer than two checkpoints, autoencoders or noise levels that differ, an estimator with a denoiser;
            else as `log_likelihood`.
    """
    if len(pipes) < 2:
        raise InputError(f"`pipes` has {len(pipes)} pipelines; allowed: two or more. `log_likelihood` takes one.")
    if estimator is not None and estimator.denoisers:
        raise InputError(
            f"The {type(estimator).__name__} has a denoiser, but each checkpoint needs its own. Pass an estimator "
            "without a denoiser, such as FiniteDifferenceFisher()."
        )
    check_shared_probes(options)
    backbones = [backbone_of(pipe) for pipe in pipes]
    first = backbones[0]
    for number, backbone in enumerate(backbones):
        backbone.check_scheduler()
        check_same_latents(first, backbone, number)
    if generator is None:  # as in `compare_likelihood`
        generator = torch.default_generator
    samples, kind, keys = likelihood_samples(
        first, images, latents, data_range, sample_latents, generator, options.pop("image_keys", None)
    )
    for backbone in backbones[1:]:
        backbone.samples_of(None, samples)  # refuses latents of another size before any work
    options.setdefault("tolerance", None)
    options |= {"estimator": FiniteDifferenceFisher() if estimator is None else estimator, "image_keys": keys}
    table = CheckpointComparison.of_ode([
        log_likelihood(pipe, None, prompt, latents=samples, generator=generator, **options)
        for pipe in replay(_with_one_prior(pipes), generator)
    ])  # fmt: skip
    return dataclasses.replace(table, latents=kind)


def check_same_latents(first: Backbone, other: Backbone, number: int) -> None:
    """Refuses checkpoint `number` if its likelihoods are densities of other samples than those of the first.

    Raises:
        InputError: the autoencoders differ, or the noise with which the densities are smoothed.
    """
    reason = "densities of different latents can't be compared"
    if first.space != other.space or (first.autoencoder is None) != (other.autoencoder is None):
        raise InputError(
            f"Checkpoint 0 ({first.name}) has samples in {first.space} space, checkpoint {number} ({other.name}) in "
            f"{other.space} space, and {reason}. Compare checkpoints of one family."
        )
    words = [] if first.standardises_latents == other.standardises_latents else ["scaling by the pipelines"]
    if first.autoencoder is not None and other.autoencoder is not None:
        words += autoencoder_differences(first.autoencoder, other.autoencoder)
    if words:
        raise InputError(
            f"The autoencoders of checkpoints 0 and {number} differ ({'; '.join(words)}), and {reason}. Pass "
            "checkpoints with one autoencoder."
        )
    ranges = [log_noise_to_signal_range(backbone.scheduler) for backbone in (first, other)]
    if any(abs(left - right) > SAME_LEVEL for left, right in zip(*ranges, strict=True)):
        texts = [f"{low:.4g} to {high:.4g}" for low, high in ranges]
        raise InputError(
            f"The noise levels log(sigma/alpha) of checkpoint 0 are {texts[0]}, those of checkpoint {number} "
            f"{texts[1]}, so their densities are smoothed differently. Pass checkpoints with one noise schedule."
        )


def _with_one_prior(pipes: Sequence[DiffusionPipeline]) -> list[DiffusionPipeline]:
    """Returns shallow copies that have the latent statistics of the first pipeline that has any."""
    parts = [checkpoint_parts(pipe) for pipe in pipes]
    known = next((each for each in parts if each.latent_statistics is not None), parts[0])
    copies = [shallow_copy(pipe) for pipe in pipes]
    for duplicate, own in zip(copies, parts, strict=True):
        set_checkpoint_parts(duplicate, dataclasses.replace(known, trace_model=own.trace_model))
    return copies
