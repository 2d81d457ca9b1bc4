"""Checks a pipeline: from a user's arguments to the report."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones import Backbone, backbone_of
from ..backbones.conditions import Condition
from ..errors import InputError
from ..images import UNIT_RANGE, ImageLike
from ..seeds import step_generator
from .calibration import check_calibration
from .costs import check_cost, estimate_time, recommend_settings
from .description import check_cache, check_distillation, check_trace_model, check_variance, describe_checkpoint
from .doors import check_runs, check_unguided, sampling_run
from .jacobian import check_estimators, check_step, check_symmetry
from .likelihoods import check_likelihood, check_reference
from .lines import CheckLine, CheckReport, run_line
from .subject import NUM_FEW, Subject, encoded_samples, run_arguments

LINES: dict[str, Callable[[Subject], CheckLine]] = {
    "checkpoint": describe_checkpoint,
    "distillation": check_distillation,
    "learned variance": check_variance,
    "cache": check_cache,
    "pipeline's run": check_runs,
    "no guidance": check_unguided,
    "calibration": check_calibration,
    "trace model": check_trace_model,
    "step of differences": check_step,
    "symmetry": check_symmetry,
    "estimators": check_estimators,
    "cost": check_cost,
    "likelihood": check_likelihood,
    "reference": check_reference,
    "settings": recommend_settings,
    "time": estimate_time,
}
"""The lines of a check, in their order: a line may read what earlier ones have found."""

STEPS_OF_OWN_SAMPLES = 20


@check_kinds
def check(
    pipe: DiffusionPipeline,
    images: ImageLike | None = None,
    prompts: Condition = None,
    *,
    lines: Sequence[str] | None = None,
    reference: str | os.PathLike | None = None,
    data_range: tuple[float, float] = UNIT_RANGE,
    batch_size: int = 16,
    seed: int = 0,
    on_line: Callable[[CheckLine], object] | None = None,
) -> CheckReport:
    """Checks whether the package is right on a checkpoint, and measures what it costs there.

        report = check(pipe, images, prompts)
        print(report)
        print(report["calibration"].status, report["likelihood"].figures["bits_per_dim"])

    An error of one line becomes its cause, and the other lines run all the same.

    Args:
        pipe: a pipeline that has a backbone, stock or ours; nothing on it is changed.
        images: 64 or more images of the kind that the model was trained on, as in `log_likelihood`; None: the model
            draws four samples itself, and what needs images is not run.
        prompts: one prompt for all images, or one per image; class labels where the pipeline takes class labels.
        lines: names of the lines, of `diffusers_fisher.checks.LINES`; None: all of them.
        reference: folder of `diffusers-fisher likelihood`, among whose images the images are placed.
        data_range: lowest and highest value of arrays and tensors of images.
        batch_size: number of images that are evaluated at once.
        seed: seed of all draws.
        on_line: called with each line as it ends.

    Returns:
        `CheckReport`. Cost: about 10 evaluations per image, 400 more of four images, and some backward passes. A
        checkpoint whose calibration is wrong costs 60 evaluations of 16 images more.

    Raises:
        InputError: images or prompts of the wrong kind, size, range or number, an unknown line. UnsupportedError: a
            pipeline without a backbone.
    """
    backbone = backbone_of(pipe)
    unknown = sorted(set(lines or ()) - set(LINES))
    if unknown or (lines is not None and not lines):
        raise InputError(f"`lines` is {lines!r}; allowed: some of {', '.join(LINES)}, or None for all.")
    subject = _subject(backbone, images, prompts, data_range, batch_size, seed)
    subject.reference = None if reference is None else os.fspath(reference)
    with backbone.loaded():
        for name, measure in LINES.items():
            if lines is not None and name not in lines:
                continue
            subject.found[name] = line = run_line(name, measure, subject)
            if on_line is not None:
                on_line(line)
    model = str(pipe.config.get("_name_or_path") or backbone.name)
    pictures = None if subject.images is None else subject.images[: subject.few].cpu()
    return CheckReport(model, f"{backbone.device}, {backbone.dtype}", list(subject.found.values()), pictures)


def _subject(
    backbone: Backbone, images: ImageLike | None, prompts: Condition, data_range: tuple[float, float], batch_size: int,
    seed: int,
) -> Subject:  # fmt: skip
    """Makes the subject of a check: with samples of the images, or with samples that the model draws itself."""
    if images is not None:
        _ = backbone.latent_channels  # refuses networks that take more than latents
        generator = step_generator(seed, "latents")
        pixels, samples, origin = encoded_samples(backbone, images, data_range, max(1, batch_size), generator)
        conditions = None if prompts is None and not backbone.takes_text else _conditions(backbone, prompts, samples)
        return Subject(backbone, samples, conditions, pixels, origin, batch_size, seed)
    size = backbone.image_size()
    shape = (NUM_FEW, backbone.latent_channels, *(side // backbone.factor for side in size))
    samples = torch.zeros(shape, device=backbone.device)
    conditions = None if prompts is None and not backbone.takes_text else _conditions(backbone, prompts, samples)
    subject = Subject(backbone, samples, conditions, None, "drawn by the model itself", batch_size, seed)
    arguments = run_arguments(backbone, conditions, NUM_FEW, size)
    noise = backbone.pack(subject.noise(samples, "own samples"))
    with backbone.loaded():
        latents, _ = sampling_run(subject, noise, arguments, recorded=False, num_steps=STEPS_OF_OWN_SAMPLES)
    subject.samples = backbone.unpack(latents, size)
    return subject


def _conditions(backbone: Backbone, prompts: Condition, samples: torch.Tensor) -> list[str] | list[int]:
    """Returns one condition per sample. Raises `InputError` for another number or kind."""
    return list(backbone.conditions(prompts, {}, len(samples))[0])  # type: ignore[return-value]
