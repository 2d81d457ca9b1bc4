"""Does the network predict the noise of images as a calibrated denoiser does, and if not, which setting is wrong?

Notation: s = sigma/alpha, v = mean square of the latents. The predicted noise eps_theta of a calibrated denoiser is
the mean of the noise eps at the noisy sample, so E<eps - eps_theta, eps_theta> = 0: the slope of eps on eps_theta is
1. Its squared error is at most that of the best multiple of the noisy sample, v/(v + s^2) per dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..backbones import Backbone
from ..backbones.distilled import sign_of_distillation
from ..backbones.stock_calls import shallow_copy
from ..backbones.unguided import embeds_guidance
from ..errors import FisherError
from ..noise import log_noise_to_signal_range, noise_schedule
from .lines import CheckLine
from .subject import Subject, noised_state

MIN_IMAGES = 64
NUM_LEVELS = 8
LEVEL_RANGE = (0.1, 5.0)
"""sigma/alpha of the lowest and of the highest level. Below, small networks that are right otherwise are off (the
embedded checkpoint has a slope of 0.72 at 0.03); above, almost all of the noise is seen, and errors tell little."""

SLOPE_TOLERANCE = 0.02
STANDARD_ERRORS = 3.0
LEAST_EXPLAINED = 0.1
"""A network is untrained if it explains, at every level, a smaller share of what the noisy sample by itself leaves of
the noise."""

NUM_TRIALS = 16  # images by which other settings are compared, at half as many levels
NUM_CANDIDATES = 3  # settings that are then tried on all images
SCALES = (0.25, 0.5, 2.0, 4.0)
"""Factors of the latents' scaling that are tried."""


@dataclasses.dataclass(frozen=True)
class LevelCalibration:
    """Holds how a denoiser's predicted noise relates to the noise at one level.

    Args:
        log_noise: log(sigma/alpha).
        slope: slope of the noise on the predicted noise; 1 for a calibrated denoiser.
        slope_error: its standard error, by the scatter over the images.
        squared_error: squared error of the predicted noise relative to the noise's own square.
        squared_error_error: its standard error.
        gaussian: squared error of the best multiple of the noisy sample, v/(v + s^2).
        explained: share of what the noisy sample leaves of the noise that the network's output explains.
    """

    log_noise: float
    slope: float
    slope_error: float
    squared_error: float
    squared_error_error: float
    gaussian: float
    explained: float

    @property
    def is_calibrated(self) -> bool:
        """Whether the slope is 1 and the squared error below the Gaussian's, within their errors."""
        has_slope = abs(self.slope - 1) <= STANDARD_ERRORS * self.slope_error + SLOPE_TOLERANCE
        return has_slope and self.squared_error <= self.gaussian + STANDARD_ERRORS * self.squared_error_error

    @property
    def miscalibration(self) -> float:
        """A number that compares settings: 0 for a calibrated denoiser."""
        return abs(self.slope - 1) + max(0.0, self.squared_error / self.gaussian - 1)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Describes another setting of a checkpoint.

    Args:
        cause: what is wrong if this setting is right.
        cure: how to set it.
        backbone: backbone of the pipeline with it.
        scale: factor of the latents.
    """

    cause: str
    cure: str
    backbone: Backbone
    scale: float = 1.0


def check_calibration(subject: Subject) -> CheckLine:
    """Compares the predicted noise with the noise of at least 64 images at eight levels.

    Cost: 8 evaluations per image, and where the denoiser is not calibrated about 60 evaluations of 16 images.
    """
    if subject.images is None or len(subject.samples) < MIN_IMAGES:
        count = 0 if subject.images is None else len(subject.samples)
        return CheckLine(
            "not run", "", f"There are {count} images, and slopes need {MIN_IMAGES} of the kind that the model knows.",
            "Pass images with their prompts: check(pipe, images, prompts), or --data FOLDER.",
        )  # fmt: skip
    levels = calibrate(subject, subject.backbone, NUM_LEVELS, len(subject.samples))
    slopes, ratios = [level.slope for level in levels], [level.squared_error / level.gaussian for level in levels]
    right = sum(level.is_calibrated for level in levels)
    words = (
        f"slope of the noise on the predicted noise {min(slopes):.3f} to {max(slopes):.3f} (1 is right), squared "
        f"error {min(ratios):.2f} to {max(ratios):.2f} of a Gaussian's; {right} of {len(levels)} levels are right"
    )
    figures = {"levels": [dataclasses.asdict(level) for level in levels], "images": len(subject.samples)}
    if right == len(levels):
        return CheckLine("ok", words, figures=figures)
    return CheckLine("failed", words, *find_cause(subject, levels), figures=figures)


@torch.no_grad()
def calibrate(
    subject: Subject, backbone: Backbone, num_levels: int, count: int, scale: float = 1.0
) -> list[LevelCalibration]:
    """Returns the calibration at each of `num_levels` levels, by the first `count` samples, times `scale`."""
    low, high = log_noise_to_signal_range(backbone.scheduler)
    low, high = max(low, math.log(LEVEL_RANGE[0])), min(high, math.log(LEVEL_RANGE[1]))
    size = subject.batch_size
    denoisers = [subject.denoiser(start, min(start + size, count), backbone) for start in range(0, count, size)]
    batches = [scale * batch for batch in backbone.pack(subject.samples[:count]).split(size)]
    result = []
    for index, log_s in enumerate(torch.linspace(low, high, num_levels, dtype=torch.float64).tolist()):
        rows = []
        for number, (denoiser, clean) in enumerate(zip(denoisers, batches, strict=True)):
            noise = subject.noise(clean, "calibration", index, number)
            state = noised_state(denoiser, clean, noise, log_s)
            columns = (noise, state.epsilon, state.sample, state.model_output)
            rows.append(torch.stack([column.double().cpu().flatten(1) for column in columns]))
        variance = float(torch.cat([batch.double().cpu().square().flatten() for batch in batches]).mean())
        result.append(_calibration(log_s, variance, torch.cat(rows, dim=1)))
    return result


def _calibration(log_s: float, variance: float, columns: torch.Tensor) -> LevelCalibration:
    """Returns the calibration at one level.

    Args:
        log_s: log(sigma/alpha).
        variance: mean square of the clean samples.
        columns: noise, predicted noise, noisy samples and outputs of the network, (4, N, d) float64.
    """
    noise, predicted, sample, output = columns
    products, squares = (noise * predicted).sum(1), predicted.square().sum(1)
    slope = float(products.sum() / squares.sum().clamp_min(1e-30))
    slope_error = float((products - slope * squares).square().sum().sqrt() / squares.sum().clamp_min(1e-30))
    # Relative to the noise's own square, whose scatter is most of the error's at low noise.
    errors, sizes = (noise - predicted).square().sum(1), noise.square().sum(1)
    error = float(errors.sum() / sizes.sum())
    scatter = float((errors - error * sizes).square().sum().sqrt() / sizes.sum())
    left = [_rest(noise, columns) for columns in ((sample,), (sample, output))]
    s = math.exp(2 * log_s)
    return LevelCalibration(
        log_s, slope, slope_error, error, scatter, variance / (variance + s), 1 - left[1] / max(left[0], 1e-30)
    )


def _rest(noise: torch.Tensor, columns: Sequence[torch.Tensor]) -> float:
    """Returns the mean square of what the best linear combination of the columns leaves of the noise."""
    matrix = torch.stack([torch.ones_like(noise), *columns], dim=-1).flatten(0, 1)
    target = noise.flatten()
    solution = torch.linalg.lstsq(matrix.mT @ matrix, (matrix.mT @ target)[:, None], driver="gelsd").solution
    return float((target - (matrix @ solution)[:, 0]).square().mean())


def find_cause(subject: Subject, levels: Sequence[LevelCalibration]) -> tuple[str, str]:
    """Returns the cause of a wrong calibration, and its cure, by trying other settings of the checkpoint.

    A setting with which all levels are right is the cause. An untrained network is none of them.
    """
    sign = sign_of_distillation(subject.backbone)
    if sign is not None:
        return (
            f"The network looks distilled to few steps ({sign}). Such networks do not predict the mean of the noise.",
            "Score images with the model that it was distilled from.",
        )
    if embeds_guidance(subject.backbone.config):
        return (
            "The network takes the guidance scale as an input (distilled guidance), so its output is a guided "
            "one, which is not the mean of the noise.",
            "This is no sign of wrong settings. Its likelihoods are those of one guidance scale.",
        )
    if max(level.explained for level in levels) < LEAST_EXPLAINED:
        return (
            "The network looks untrained: its output tells less than "
            f"{LEAST_EXPLAINED:.0%} of what the noisy sample leaves of the noise.",
            "Check that its weights were loaded, and that the images are of the kind that it was trained on.",
        )
    present, hint = sum(level.miscalibration for level in levels), ""
    # Sixteen images don't tell near settings apart, so several are tried on all of them.
    settings = list(other_settings(subject.backbone))
    scores = [_miscalibration(subject, setting) for setting in settings]
    for index in sorted(range(len(settings)), key=scores.__getitem__)[:NUM_CANDIDATES]:
        setting = settings[index]
        if math.isinf(scores[index]):
            break
        trial = calibrate(subject, setting.backbone, NUM_LEVELS, len(subject.samples), setting.scale)
        if all(level.is_calibrated for level in trial):
            return f"{setting.cause} With this change all levels are right.", setting.cure
        if not hint and sum(level.miscalibration for level in trial) < present / 2:
            hint = f" Nearest comes: {setting.cause}"
    return (
        f"No single change of the prediction type, the noise schedule or the latents' scaling explains it.{hint}",
        "Check that the images and prompts are of the kind that the model was trained on, and that its weights belong "
        "to its configuration.",
    )


def _miscalibration(subject: Subject, setting: Setting) -> float:
    """Returns how far a setting is from calibrated, by a few images; infinity where the pipeline does not take it."""
    count = min(NUM_TRIALS, len(subject.samples))
    try:
        trial = calibrate(subject, setting.backbone, NUM_LEVELS // 2, count, setting.scale)
    except FisherError:
        return math.inf
    return sum(level.miscalibration for level in trial)


def other_settings(backbone: Backbone) -> Iterator[Setting]:
    """Yields other settings of a checkpoint that its configuration could have meant."""
    schedule, config = noise_schedule(backbone.scheduler), backbone.pipe.scheduler.config
    for kind in schedule.prediction_types:
        if kind != schedule.prediction.kind and "prediction_type" in config:
            yield _with_scheduler(
                backbone, f"`prediction_type` is {schedule.prediction.kind!r}, but the network predicts {kind}.",
                f'pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="{kind}")',
                prediction_type=kind,
            )  # fmt: skip
    if "beta_start" in config and config.get("trained_betas") is None:
        for factor in (0.5, 2.0):
            start, end = factor * config["beta_start"], factor * config["beta_end"]
            if end < 1:
                yield _with_betas(backbone, start, end, config["beta_schedule"])
        for start, end, name in ((0.0001, 0.02, "linear"), (0.00085, 0.012, "scaled_linear")):
            yield _with_betas(backbone, start, end, name)
    if backbone.space == "latent" and backbone.autoencoder is not None:
        scaling = getattr(backbone.autoencoder, "config", {}).get("scaling_factor")
        for scale in SCALES:
            value = "" if scaling is None else f" (`scaling_factor` {scaling:g} instead of {scale * scaling:g})"
            yield Setting(
                f"The latents' scaling is {1 / scale:g} times what the network was trained on{value}.",
                "Set the `scaling_factor` of the autoencoder's configuration that the network was trained with"
                + ("." if scaling is None else f": pipe.vae.register_to_config(scaling_factor={scale * scaling:g})."),
                backbone, scale,
            )  # fmt: skip


def _with_betas(backbone: Backbone, start: float, end: float, name: str) -> Setting:
    config = backbone.pipe.scheduler.config
    return _with_scheduler(
        backbone,
        f"The betas are {config['beta_start']:g} to {config['beta_end']:g} ({config['beta_schedule']}), but the "
        f"network was trained with {start:g} to {end:g} ({name}).",
        f"pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, beta_start={start:g}, "
        f'beta_end={end:g}, beta_schedule="{name}")',
        beta_start=start, beta_end=end, beta_schedule=name,
    )  # fmt: skip


def _with_scheduler(backbone: Backbone, cause: str, cure: str, **changes: str | float) -> Setting:
    """Makes a setting by other entries of the scheduler's configuration."""
    pipe: DiffusionPipeline = backbone.pipe
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    return Setting(cause, cure, type(backbone)(shallow_copy(pipe, scheduler=scheduler)))
