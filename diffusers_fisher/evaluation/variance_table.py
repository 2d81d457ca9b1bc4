"""Fits the table of a stochastic sampler's optimal variance to the images of a dataset."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from tqdm.auto import tqdm

from ..backbones import backbone_of
from ..console import say
from ..curvature.level_table import fit_level_fisher
from ..data import ImageData, UnreadableImageError, no_images, open_images
from ..errors import InputError
from ..files import write_json
from ..fisher.level import LevelFisher
from ..jobs.folder_lock import FolderLock
from ..jobs.pipelines import DenoiserSettings, load_pipeline
from ..likelihood.pipeline import likelihood_samples, unguided_denoiser
from ..pipelines import FisherPipelineMixin
from ..schedulers import optimal_variance_scheduler
from ..settings import settings_class


@settings_class
class VarianceSettings:
    """Settings of a table of variances.

    Args:
        denoiser: the pipeline.
        data: the images; `limit` says how many. Their captions are the prompts.
        num_levels: number of noise levels of the table.
        seed: seed of the noise and of the draws of the latents.
    """

    denoiser: DenoiserSettings
    data: ImageData
    num_levels: Annotated[int, Field(ge=2)] = 40
    seed: int = 0


def fit_variance(output: Path, settings: VarianceSettings, batch_size: int = 16) -> dict[str, Any]:
    """Writes the scheduler `OptimalVarianceDDPMScheduler`, or that of flow models, with a table of squared errors.

    Latents are drawn from the encoder's posterior, because the samples of a network follow the law that it was trained
    on. Images that can't be read are left out.

    Args:
        output: folder of `scheduler_config.json`, which the scheduler's `from_pretrained` reads, and of
            `variance.json` with the table and what it was made of.
        batch_size: number of images that are evaluated at once; all images must have one size.

    Returns:
        The content of `variance.json`. Cost: 2 `num_levels` evaluations of the denoiser per image.

    Raises:
        InputError: the data or the pipeline can't be opened, there are no images, or they have several sizes.
        NumericalError: squared errors that are not finite.
    """
    if batch_size < 1:
        raise InputError(f"`batch_size` is {batch_size}; allowed: at least 1.")
    with FolderLock(output):
        pipe = load_pipeline(settings.denoiser)
        images = open_images(settings.data, backbone_of(pipe).image_channels)
        total: torch.Tensor | None = None
        levels, count, left_out = torch.empty(0), 0, 0
        for first in tqdm(range(0, len(images), batch_size), "squared errors"):
            examples = []
            for position in range(first, min(first + batch_size, len(images))):
                try:
                    examples.append(images[position])
                except UnreadableImageError:
                    left_out += 1
            if examples:
                table = _table(pipe, [each.pixels for each in examples], [each.caption for each in examples], settings)
                part, levels = len(examples) * table.unexplained_noise_fraction, table.noise_to_signal
                total, count = part if total is None else total + part, count + len(examples)
        if total is None:
            raise no_images(settings.data)
        scheduler = optimal_variance_scheduler(pipe.scheduler, LevelFisher(levels, total / count))
        scheduler.save_pretrained(output)
        result = {
            "scheduler": type(scheduler).__name__, "images": count, "images_left_out": left_out,
            "noise_to_signal": levels.tolist(), "unexplained_noise_fraction": (total / count).tolist(),
            "settings": dataclasses.asdict(settings),
        }  # fmt: skip
        write_json(output / "variance.json", result)
    say(f"{type(scheduler).__name__} with the squared errors of {count} images at {len(levels)} levels: {output}")
    return result


def _table(
    pipe: FisherPipelineMixin, pixels: list[torch.Tensor], captions: list[Any], settings: VarianceSettings
) -> LevelFisher:
    """Returns the table of one batch."""
    if len({each.shape for each in pixels}) > 1:
        raise InputError(
            f"The images have several sizes: {sorted({tuple(each.shape[1:]) for each in pixels})}. Set `resolution`."
        )
    backbone, generator = backbone_of(pipe), torch.Generator().manual_seed(settings.seed)
    sampled = backbone.space == "latent"
    samples, _, keys = likelihood_samples(backbone, torch.stack(pixels), None, (0, 1), sampled, generator, None)
    arguments: dict[str, Any] = {}
    scale = backbone.unguided_scale(arguments)
    prompt = None if all(caption is None for caption in captions) else [caption or "" for caption in captions]
    denoiser = unguided_denoiser(backbone, samples, scale, prompt, arguments)
    with backbone.loaded():
        return fit_level_fisher(denoiser, backbone.pack(samples), settings.num_levels, 1, generator, keys)
