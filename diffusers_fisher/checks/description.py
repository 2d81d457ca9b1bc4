"""What a checkpoint is, by its components and configurations alone."""

from __future__ import annotations

from ..backbones.distilled import sign_of_distillation
from ..backbones.networks import cache_hooks
from ..backbones.unguided import default_guidance, embeds_guidance
from ..fisher import TraceMatchingFisher
from ..noise import log_noise_to_signal_range, noise_schedule
from ..noise.state import LEARNED_VARIANCES
from .lines import CheckLine
from .subject import Subject


def describe_checkpoint(subject: Subject) -> CheckLine:
    """Says what the checkpoint is: class, network, prediction type, scheduler, guidance, samples."""
    backbone, schedule = subject.backbone, noise_schedule(subject.backbone.scheduler)
    network, autoencoder = backbone.network, backbone.autoencoder
    guidance = {name: value for name, value in default_guidance(backbone.parameters).items() if value is not None}
    parameters = 0 if network is None else sum(each.numel() for each in network.parameters())
    shape = tuple(subject.samples.shape[1:])
    low, high = log_noise_to_signal_range(backbone.scheduler)
    figures = {
        "pipeline": backbone.name, "family": type(backbone).__name__.removesuffix("Backbone"),
        "network": type(network).__name__, "parameters": parameters, "dtype": str(backbone.dtype),
        "prediction_type": schedule.prediction.kind, "scheduler": type(backbone.scheduler).__name__,
        "log_noise_to_signal": [max(low, -99.0), min(high, 99.0)], "flow": backbone.predicts_flow,
        "default_guidance": guidance, "guidance_is_an_input": embeds_guidance(backbone.config),
        "space": backbone.space, "shape": list(shape), "dimensions": subject.samples[0].numel(),
        "autoencoder": None if autoencoder is None else type(autoencoder).__name__,
        "pixels_per_latent": backbone.factor, "samples": len(subject.samples), "origin": subject.origin,
        "trace_model": backbone.trace_model is not None, "latent_statistics": backbone.latent_statistics is not None,
    }  # fmt: skip
    scales = ", ".join(f"{name} {value:g}" for name, value in guidance.items()) or "none"
    scales += " as an input of the network" if embeds_guidance(backbone.config) else ""
    words = (
        f"{backbone.name}: {figures['network']} of {parameters / 1e6:.3g} million parameters in {backbone.dtype}, "
        f"predicts {schedule.prediction.kind}; {figures['scheduler']}; guidance of the call by default: {scales}; "
        f"samples of {backbone.space}s {shape}"
    )
    return CheckLine("ok", words, figures=figures)


def check_distillation(subject: Subject) -> CheckLine:
    """Asks whether the network looks distilled to few steps."""
    sign = sign_of_distillation(subject.backbone)
    if sign is None:
        return CheckLine("ok", "no sign of a network distilled to few steps", figures={"sign": None})
    return CheckLine(
        "warning", "the network looks distilled to few steps",
        f"{sign}: the output of a distilled network is not the score of a density, so likelihoods mean little.",
        "Score images with the model that it was distilled from. If the network is not distilled, set DDIMScheduler "
        "or FlowMatchEulerDiscreteScheduler.",
        {"sign": sign},
    )  # fmt: skip


def check_variance(subject: Subject) -> CheckLine:
    """Asks whether the scheduler knows of a network that also predicts its variance."""
    config = subject.backbone.config
    channels, outputs = config.get("in_channels"), config.get("out_channels")
    variance = subject.backbone.pipe.scheduler.config.get("variance_type")
    figures = {"in_channels": channels, "out_channels": outputs, "variance_type": variance}
    is_learned = channels is not None and outputs == 2 * channels
    # Pipelines with a transformer leave the second half out themselves.
    if is_learned and subject.backbone.network_name == "unet" and variance not in LEARNED_VARIANCES:
        return CheckLine(
            "failed", f"the network has {outputs} output channels for {channels} input channels",
            f"The network learned its variance, but `variance_type` of the scheduler is {variance!r}, so the second "
            "half of the output is taken for a prediction.",
            'Set it: scheduler = DDPMScheduler.from_config(pipe.scheduler.config, variance_type="learned_range").',
            figures,
        )  # fmt: skip
    words = "learned variance, of which the mean's half is taken" if is_learned else "no learned variance"
    return CheckLine("ok", words, figures=figures)


def check_cache(subject: Subject) -> CheckLine:
    """Asks whether a cache makes sampling runs another function than the network."""
    network = subject.backbone.network
    hooks = [] if network is None else cache_hooks(network)
    if not hooks:
        return CheckLine("ok", "no cache", figures={"cache": None})
    name = type(hooks[0]).__name__
    return CheckLine(
        "warning", f"the network has a cache ({name})",
        "With the cache a sampling run is another function than the network: gradients of runs are refused, and "
        "likelihoods are those of the network without its cache.",
        "Turn it off with the network's `disable_cache()`.", {"cache": name},
    )  # fmt: skip


def check_trace_model(subject: Subject) -> CheckLine:
    """Compares the fingerprint of the checkpoint's trace model with that of the network."""
    model = subject.backbone.trace_model
    if model is None:
        return CheckLine(
            "not run", "", "The checkpoint has no trace model.",
            "None is needed: likelihoods take differences of the network. docs/training.md shows how to train one.",
        )  # fmt: skip
    estimator = TraceMatchingFisher(model)
    estimator.check_denoiser(subject.denoiser(0, 1))
    calibration = estimator.calibration
    error = None if calibration is None else calibration.error
    words = "no calibration" if error is None else f"error within {error:.4f} bits/dim on its held-out images"
    return CheckLine("ok", f"its fingerprint is that of the network; {words}", figures={"calibrated_error": error})
