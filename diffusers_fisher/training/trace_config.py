"""Defines the configuration of trace matching, which the YAML files in `configs/` hold."""

import dataclasses
from typing import Annotated, Literal

import torch
from accelerate.tracking import get_available_trackers
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from pydantic import Field

from ..data import ImageData
from ..denoiser import Denoiser
from ..errors import InputError
from ..jobs.pipelines import DenoiserSettings
from ..models import FisherTraceModel
from ..settings import Fraction, NotNegative, Positive, settings_class
from .schedule import Optimisation

AtLeastTwo = Annotated[int, Field(ge=2)]
LARGEST_WEIGHT = {"residual": 1e6, "jacobian": 1e6, "norm": 0.0}
"""Largest `squared_weight` for every target: the paper's loss for "norm" is a squared error already."""


@settings_class
class ModelSettings:
    """The trace model; see `FisherTraceModel`.

    Args:
        prior: shape of the data's statistics: "sample" (one number per coordinate) or "channel" (one number per
            channel). Packed tokens have one number per channel in both cases, since one number per token would fit
            one image size alone.
        pooled: give the model the pooled text embedding of the prompts.
        features: give the model a summary of the denoiser's last hidden layer, which likelihoods record at no cost.
            Such models are more exact. Where there is no summary (in a sampler's run, or of a compiled network), they
            work without it.
    """

    output: str = "trace"
    basis: str = "pixel"
    prior: Literal["sample", "channel"] = "sample"
    block_out_channels: list[int] = dataclasses.field(default_factory=lambda: [32, 64, 128])
    layers_per_block: int = 1
    patch_size: int = 1
    head_channels: int = 128
    time_channels: int = 64
    pooled: bool = False
    use_prediction: bool = True
    features: bool = False


@settings_class
class TraceOptimisation(Optimisation):
    """The optimisation of a trace model.

    Args:
        gradient_accumulation: number of pieces into which a process's part of a batch is cut.
        max_gradient_norm: norm to which gradients are clipped.
        mixed_precision: precision of the trace model, "bf16"; None means float32.
        keep_checkpoints: number of checkpoints that are kept.
        log_every: steps between entries of loss.jsonl; it divides `save_every`.
        workers: number of processes that read data.
    """

    gradient_accumulation: Positive = 1
    max_gradient_norm: Annotated[float, Field(gt=0)] = 1.0
    mixed_precision: Literal["bf16"] | None = None
    keep_checkpoints: Positive = 2
    log_every: Positive = 50
    workers: NotNegative = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_every % self.log_every:
            raise InputError(
                f"`save_every` is {self.save_every}, `log_every` {self.log_every}; allowed: multiples of `log_every`, "
                "so that a resumed run goes on with the same curve."
            )


@settings_class
class ValidationSettings:
    """The data of the validation and how often it is evaluated.

    Args:
        every: steps between validations; the last step is always followed by one.
        samples: number of held-out samples: the last of the data, or the first of a stream.
        levels: number of noise levels, equally spaced in log(sigma/alpha).
        probes: Hutchinson probes per sample; each costs a backward pass.
    """

    every: Positive = 1000
    samples: Positive = 32
    levels: AtLeastTwo = 12
    probes: Positive = 4


@settings_class
class TraceMatchingConfig:
    """All settings of a run.

    Args:
        seed: seed of every random draw.
        output: folder for checkpoints, curves, plots and the finished `trace_model`.
        target: "residual", "jacobian" or "norm"; see `diffusers_fisher.training.trace_losses`.
        denoiser: the frozen denoiser.
        optimisation, model, validation: see `TraceOptimisation`, `ModelSettings` and `ValidationSettings`.
        data: the images.
        latents: folder of a cache that `diffusers_fisher.training.cache_latents` made of `data`. Training reads it
            in the place of the images.
        product: how target "jacobian" differentiates the denoiser.
        on_path: for target "jacobian", the fraction of samples that lie on the paths of clean images through the
            probability-flow ODE. A likelihood evaluates the trace there, and the noise is less than the level says.
        path_images: number of images whose paths are integrated, before the first step; the first of the training
            data.
        path_change: fraction of these images that are made unlike the data (inverted, noised, turned and so on), and
            of captions that are exchanged, so that likelihoods of unusual images are right as well.
        squared_weight: weight of (r - y)^2, which is added to the loss of r. The loss of r counts relative errors. A
            larger weight makes r more exact where it is neither near 0 nor near 1; most of the error of a likelihood
            arises there.
        caption_dropout: fraction of captions that are left out.
        prior_samples: number of samples from which the prior's statistics are computed.
        trackers: trackers of accelerate, such as ["tensorboard"].
    """

    seed: int
    output: str
    target: Literal["residual", "jacobian", "norm"]
    denoiser: DenoiserSettings
    optimisation: TraceOptimisation
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    validation: ValidationSettings = dataclasses.field(default_factory=ValidationSettings)
    data: ImageData | None = None
    latents: str | None = None
    product: Literal["backward", "forward", "finite_difference"] = "backward"
    on_path: Fraction = 0.5
    path_images: Positive = 512
    path_change: Fraction = 0.5
    squared_weight: float = 0.0
    caption_dropout: Fraction = 0.1
    prior_samples: AtLeastTwo = 1024
    trackers: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.model.features and self.denoiser.compile:
            raise InputError(
                "A compiled denoiser shows no features; leave out `denoiser.compile` or `model.features`."
            )
        limit = LARGEST_WEIGHT[self.target]
        if not 0 <= self.squared_weight <= limit:
            raise InputError(
                f"`squared_weight` is {self.squared_weight}; allowed with target {self.target!r}: from 0 to {limit:g}."
            )

    def piece_size(self, num_processes: int) -> int:
        """Returns how many samples a process gives the denoiser at once, in training steps and elsewhere."""
        return max(1, self.optimisation.batch_size // (num_processes * self.optimisation.gradient_accumulation))

    def check(self, num_processes: int) -> None:
        """Checks that there are data, and that the processes can share the batches equally.

        Raises:
            InputError: names the key.
        """
        o = self.optimisation
        if self.data is None and self.latents is None:
            raise InputError("The config has neither `data` nor `latents`; give one of them.")
        pieces = num_processes * o.gradient_accumulation
        if o.batch_size % pieces:
            raise InputError(
                f"`optimisation.batch_size` is {o.batch_size}; allowed: multiples of {pieces}, the number of "
                f"processes ({num_processes}) times `gradient_accumulation` ({o.gradient_accumulation})."
            )


def check_trackers(names: list[str]) -> None:
    """Refuses trackers that accelerate does not know, or whose package is missing.

    Raises:
        InputError: names the trackers.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    unknown = [name for name in names if name not in (*available, "all")]
    if unknown:
        raise InputError(
            f"trackers has {', '.join(map(repr, unknown))}; installed here: {', '.join(available) or 'none'}. Install "
            "the tracker's package, or leave it out."
        )


def make_trace_model(
    config: TraceMatchingConfig,
    denoiser: Denoiser | DiffusionPipeline,
    shape: tuple[int, ...],
    pooled_channels: int | None = None,
    feature_channels: int | None = None,
) -> FisherTraceModel:
    """Makes an untrained trace model for samples of `shape`, in the layout of the pipeline's latents.

    Args:
        denoiser: the pipeline, or its denoiser at samples of this shape; the model gets its fingerprint.
        shape: (C, h, w), or (tokens, C) for packed tokens.
        pooled_channels: size of the pooled text embedding; None means that the model takes none.
        feature_channels: size of the denoiser's features; None means that the model takes none.
    """
    layout, channels = ("image", shape[0]) if len(shape) == 3 else ("tokens", shape[-1])
    per_channel = (channels, 1, 1) if layout == "image" else (1, channels)
    options = dataclasses.asdict(config.model)
    prior = options.pop("prior")
    del options["pooled"], options["features"]  # the channels that the arguments give say both
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = FisherTraceModel(
            in_channels=channels, layout=layout, target=config.target, pooled_channels=pooled_channels,
            feature_channels=feature_channels,
            prior_shape=shape if prior == "sample" and layout == "image" else per_channel, **options,
        )  # fmt: skip
    model.set_fingerprint(denoiser)
    return model
