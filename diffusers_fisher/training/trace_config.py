"""The configuration of trace matching: what YAML files in `configs/` say, checked before any work."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ..data import ImageData
from ..errors import InputError
from ..jobs.pipelines import DTYPES, DenoiserSettings
from .schedule import Optimisation

if TYPE_CHECKING:
    from ..models import FisherTraceModel

PRODUCTS = ("backward", "forward", "finite_difference")
PRECISIONS = (None, "bf16")
PRIORS = ("sample", "channel")


@dataclasses.dataclass
class ModelSettings:
    """The trace model; see `FisherTraceModel`.

    Args:
        prior: shape of the data's statistics: "sample" (a number a coordinate) or "channel". For packed tokens both
            are a number a channel, since a number a token would hold for one image size alone.
        pooled: take the pooled text embedding of the prompts.
        features: take a summary of the denoiser's last hidden layer, which likelihoods record on the way. Such models
            are more exact; where there is none (in a sampler's run, or by a compiled network) they do without.
    """

    output: str = "trace"
    basis: str = "pixel"
    prior: str = "sample"
    block_out_channels: list = dataclasses.field(default_factory=lambda: [32, 64, 128])
    layers_per_block: int = 1
    patch_size: int = 1
    head_channels: int = 128
    time_channels: int = 64
    pooled: bool = False
    use_prediction: bool = True
    features: bool = False


@dataclasses.dataclass
class TraceOptimisation(Optimisation):
    """Args:
    gradient_accumulation: pieces that a process's share of the batch is taken in.
    max_gradient_norm: gradients are clipped to it.
    mixed_precision: of the trace model: "bf16", or none.
    keep_checkpoints: how many are kept.
    log_every: steps between entries of loss.jsonl; divides `save_every`.
    workers: processes that read data.
    """

    gradient_accumulation: int = 1
    max_gradient_norm: float = 1.0
    mixed_precision: str | None = None
    keep_checkpoints: int = 2
    log_every: int = 50
    workers: int = 0


@dataclasses.dataclass
class ValidationSettings:
    """Held-out data and how it is asked.

    Args:
        every: steps between validations; one is at the end in any case.
        samples: held-out samples, the last of the data (the first of a stream).
        levels: noise levels, equal in log(sigma/alpha).
        probes: Hutchinson probes a sample, each a backward pass.
    """

    every: int = 1000
    samples: int = 32
    levels: int = 12
    probes: int = 4


@dataclasses.dataclass
class TraceMatchingConfig:
    """Everything a run depends on.

    Args:
        seed: of every random draw.
        output: folder for checkpoints, curves, plots and the finished `trace_model`.
        target: "residual", "jacobian" or "norm"; see `diffusers_fisher.training.trace_losses`.
        denoiser: the frozen denoiser.
        optimisation, model, validation: see there.
        data: images; or
        latents: folder of a cache made by `diffusers_fisher.training.cache_latents`, which takes `data` for its own.
        product: how "jacobian" differentiates the denoiser: "backward", "forward" or "finite_difference".
        on_path: for "jacobian": share of samples that are taken from the ways of clean images through the
            probability-flow ODE, where likelihoods ask: there the noise is less than the level says.
        path_images: images whose ways are taken, the first of the training data; integrated before the first step.
        path_change: share of those that are made unlike the data (inverted, noised, turned, ...), and of captions that
            are exchanged, so that likelihoods of unusual images are right as well.
        squared_weight: of (r - y)^2, added to the loss of r, in which relative errors count: more of it makes r more
            exact where it is neither near 0 nor near 1, which is where likelihoods have most of their error.
        caption_dropout: share of captions that are left out.
        prior_samples: samples from which the prior's statistics are taken.
        trackers: of accelerate, such as ["tensorboard"].
    """

    seed: int
    output: str
    target: str
    denoiser: DenoiserSettings
    optimisation: TraceOptimisation
    model: ModelSettings = dataclasses.field(default_factory=ModelSettings)
    validation: ValidationSettings = dataclasses.field(default_factory=ValidationSettings)
    data: ImageData | None = None
    latents: str | None = None
    product: str = "backward"
    on_path: float = 0.5
    path_images: int = 512
    path_change: float = 0.5
    squared_weight: float = 0.0
    caption_dropout: float = 0.1
    prior_samples: int = 1024
    trackers: list = dataclasses.field(default_factory=list)

    def piece_size(self, num_processes: int) -> int:
        """Samples that a process gives the denoiser at a time, outside of training's own steps too."""
        return max(1, self.optimisation.batch_size // (num_processes * self.optimisation.gradient_accumulation))

    def check(self, num_processes: int) -> None:
        """Refuses what can't be run. Raises `InputError` naming the key."""
        o = self.optimisation
        for key, value, allowed in (
            ("target", self.target, ("residual", "jacobian", "norm")), ("product", self.product, PRODUCTS),
            ("denoiser.dtype", self.denoiser.dtype, DTYPES), ("model.prior", self.model.prior, PRIORS),
            ("optimisation.mixed_precision", o.mixed_precision, PRECISIONS),
        ):  # fmt: skip
            if value not in allowed:
                raise InputError(f"{key} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")
        if self.model.features and self.denoiser.compile:
            raise InputError(
                "A compiled denoiser shows no features; leave out `denoiser.compile` or `model.features`."
            )
        if self.data is None and self.latents is None:
            raise InputError("The config has neither `data` nor `latents`; give one of them.")
        for key, share in (
            ("caption_dropout", self.caption_dropout),
            ("on_path", self.on_path),
            ("path_change", self.path_change),
        ):
            if not 0 <= share <= 1:
                raise InputError(f"{key} is {share}; allowed: from 0 to 1.")
        positive = {
            "optimisation.steps": o.steps, "optimisation.save_every": o.save_every,
            "optimisation.log_every": o.log_every, "optimisation.keep_checkpoints": o.keep_checkpoints,
            "optimisation.gradient_accumulation": o.gradient_accumulation,
            "prior_samples": self.prior_samples - 1, "path_images": self.path_images,
            "validation.every": self.validation.every, "validation.samples": self.validation.samples,
            "validation.levels": self.validation.levels - 1, "validation.probes": self.validation.probes,
        }  # fmt: skip
        wrong = [key for key, value in positive.items() if value < 1]
        if wrong or not 0 <= o.ema_decay < 1 or not o.learning_rate > 0 or not o.max_gradient_norm > 0:
            raise InputError(
                f"The config's numbers can't be used: {wrong or 'ema_decay, learning_rate or max_gradient_norm'} too "
                "small; allowed: positive (levels and prior_samples from 2), and ema_decay from 0 to below 1."
            )
        most = 0 if self.target == "norm" else 1e6  # the paper's loss for "norm" is a squared error already
        if not 0 <= self.squared_weight <= most:
            raise InputError(
                f"squared_weight is {self.squared_weight}; allowed with target {self.target!r}: from 0 to {most:g}."
            )
        if not 0 <= o.warmup_steps < o.steps:
            raise InputError(
                f"optimisation.warmup_steps is {o.warmup_steps}; allowed: from 0 to below optimisation.steps "
                f"({o.steps})."
            )
        if o.save_every % o.log_every:
            raise InputError(
                f"optimisation.save_every is {o.save_every}, log_every {o.log_every}; allowed: a multiple of it, so "
                "that a resumed run goes on with the same curve."
            )
        pieces = num_processes * o.gradient_accumulation
        if o.batch_size < 1 or o.batch_size % pieces:
            raise InputError(
                f"optimisation.batch_size is {o.batch_size}; allowed: multiples of {pieces}, the number of processes "
                f"({num_processes}) times gradient_accumulation ({o.gradient_accumulation})."
            )


def check_trackers(names: list) -> None:
    """Refuses a tracker that accelerate does not know, or leaves out because its package is missing.

    Raises:
        InputError: names it.
    """
    from accelerate.tracking import get_available_trackers

    installed = [str(tracker) for tracker in get_available_trackers()]
    wrong = [name for name in names if name not in (*installed, "all")]
    if wrong:
        raise InputError(
            f"trackers has {', '.join(map(repr, wrong))}; installed here: {', '.join(installed) or 'none'}. Install "
            "the tracker's package, or leave it out."
        )


def make_trace_model(
    config: TraceMatchingConfig,
    pipe: Any,
    shape: tuple[int, ...],
    pooled_channels: int | None = None,
    feature_channels: int | None = None,
) -> FisherTraceModel:
    """An untrained trace model for samples of `shape` in the pipeline's own layout."""
    import torch

    from ..models import FisherTraceModel

    settings, layout = config.model, "image" if len(shape) == 3 else "tokens"
    channels = shape[0] if layout == "image" else shape[-1]
    per_channel = (channels, 1, 1) if layout == "image" else (1, channels)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = FisherTraceModel(
            in_channels=channels, layout=layout, target=config.target, output=settings.output, basis=settings.basis,
            block_out_channels=settings.block_out_channels, layers_per_block=settings.layers_per_block,
            patch_size=settings.patch_size, head_channels=settings.head_channels,
            time_channels=settings.time_channels, use_prediction=settings.use_prediction,
            pooled_channels=pooled_channels, feature_channels=feature_channels,
            prior_shape=shape if settings.prior == "sample" and layout == "image" else per_channel,
        )  # fmt: skip
    model.set_fingerprint(pipe)
    return model
