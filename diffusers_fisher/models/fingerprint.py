"""What denoiser a trace model belongs to: a few numbers of its weights, its configuration and its schedule."""

import hashlib
import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import InputError, UnsupportedError
from ..noise import SchedulerFamily, log_noise_to_signal_at, log_noise_to_signal_range, prediction_of, scheduler_family

NUM_TENSORS = 16  # parameters whose values are sampled
NUM_VALUES = 65536  # values of each that are read
WEIGHT_TOLERANCE = 2e-3  # bfloat16 moves the sums by up to about 6e-4
SCHEDULE_TOLERANCE = 1e-3  # of log(sigma/alpha)
LOG_LIMIT = 20.0  # stands for infinity: a schedule that ends in pure noise


def denoiser_fingerprint(denoiser: Any) -> dict[str, Any]:
    """The fingerprint of a pipeline, or of a `PipelineDenoiser` over one; what can be stored as JSON.

    Keys: `denoiser` (class), `config` (hash of the settings that differ from their defaults), `parameters` (hash of
    names and shapes), `weights` (projections of some tensors on a fixed direction, relative to their norms: the same
    in every floating-point dtype to 1e-3), `prediction_type`, `schedule` (log(sigma/alpha) at five timesteps). A
    denoiser without a network has only the last two. Cost: reads a million numbers at most.

    Raises:
        UnsupportedError: an object without a scheduler, or with one that is not known.
    """
    scheduler = getattr(denoiser, "scheduler", None)
    if scheduler is None:
        raise UnsupportedError(
            f"A fingerprint needs a pipeline or a denoiser with a `scheduler`, got {type(denoiser).__name__}; pass "
            "the pipeline, or PipelineDenoiser(pipe, ...)."
        )
    schedule = {"prediction_type": prediction_of(scheduler).kind, "schedule": _schedule(scheduler)}
    network = _network(getattr(denoiser, "pipe", denoiser))
    if network is None:
        return schedule
    parameters = dict(sorted(network.named_parameters()))
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters.items()]
    return {
        "denoiser": type(network).__name__, "config": _hash(_settings(network)), "parameters": _hash(shapes),
        "weights": [_projection(parameters[name]) for name in _spread(list(parameters))], **schedule,
    }  # fmt: skip


def fingerprint_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words, what of fingerprint `found` is not as `expected`; keys that either lacks are not compared."""
    words = []
    for key, label in (("denoiser", "class of the denoiser"), ("prediction_type", "prediction type")):
        if key in expected and key in found and expected[key] != found[key]:
            words.append(f"{label}: trained for {expected[key]}, got {found[key]}")
    for key, label in (("config", "configuration of the denoiser"), ("parameters", "names or shapes of parameters")):
        if key in expected and key in found and expected[key] != found[key]:
            words.append(f"{label} (hash {found[key]}, trained for {expected[key]})")
    weights = _largest_gap(expected.get("weights"), found.get("weights"))
    if weights > WEIGHT_TOLERANCE:
        words.append(f"weights of the denoiser (relative difference {weights:.2g}): another checkpoint or a fine-tune")
    schedule = _largest_gap(expected.get("schedule"), found.get("schedule"))
    if schedule > SCHEDULE_TOLERANCE:
        shown = [", ".join(f"{value:.3f}" for value in each["schedule"]) for each in (expected, found)]
        words.append(f"schedule: trained for log(sigma/alpha) {shown[0]} at five timesteps, got {shown[1]}")
    return words


def check_fingerprint(expected: Mapping[str, Any] | None, denoiser: Any, name: str = "trace model") -> None:
    """Refuses a denoiser that the `expected` fingerprint does not fit; None fits everything.

    Raises:
        InputError: says what differs.
    """
    if not expected:
        return
    words = fingerprint_differences(expected, denoiser_fingerprint(denoiser))
    if words:
        raise InputError(
            f"The {name} was trained for another denoiser. What differs: {'; '.join(words)}. Use the one it was "
            "trained for, train another, or pass check=False if you know that they agree."
        )


def _network(pipe: Any) -> torch.nn.Module | None:
    for name in ("unet", "transformer"):
        network = getattr(pipe, name, None)
        if isinstance(network, torch.nn.Module):
            return network
    return None


def _schedule(scheduler: Any) -> list[float]:
    """log(sigma/alpha) at five timesteps from the first to the last."""
    fractions = torch.linspace(0, 1, 5, dtype=torch.float64)
    family = scheduler_family(scheduler)
    if family is SchedulerFamily.EDM:
        low, high = log_noise_to_signal_range(scheduler)
        return (low + fractions * (high - low)).tolist()
    flow = family is SchedulerFamily.FLOW or scheduler.config.get("use_flow_sigmas", False)
    count = scheduler.config.num_train_timesteps
    timesteps = fractions * count if flow else (fractions * (count - 1)).round()
    return log_noise_to_signal_at(scheduler, timesteps).clamp(-LOG_LIMIT, LOG_LIMIT).tolist()


def _settings(network: torch.nn.Module) -> dict[str, Any]:
    """Settings that differ from the class's defaults: a newer diffusers may add keys, not change the model."""
    defaults = inspect.signature(type(network).__init__).parameters
    config = getattr(network, "config", {})
    own = {key: value for key, value in dict(config).items() if not key.startswith("_")}
    return {k: v for k, v in sorted(own.items()) if k not in defaults or not _equal(v, defaults[k].default)}


def _equal(value: Any, default: Any) -> bool:
    return _plain(value) == _plain(default)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _spread(names: list[str]) -> list[str]:
    """Up to `NUM_TENSORS` of `names`, evenly spaced."""
    count = min(NUM_TENSORS, len(names))
    return [names[index * (len(names) - 1) // max(1, count - 1)] for index in range(count)]


@torch.no_grad()
def _projection(parameter: torch.Tensor) -> float | None:
    """<w, u>/|w| with u a fixed direction of norm one; None, which fits anything, where the values are not at hand."""
    if parameter.is_meta or not parameter.is_floating_point():
        return None
    values = parameter.detach().flatten()[:NUM_VALUES].cpu().double()
    direction = torch.cos(torch.arange(len(values), dtype=torch.float64) ** 2 * 0.7548776662466927)
    size = float(values.norm() * direction.norm())
    return float(values @ direction) / size if size > 0 else 0.0


def _largest_gap(left: Any, right: Any) -> float:
    if left is None or right is None:
        return 0.0
    if len(left) != len(right):
        return math.inf
    gaps = [abs(a - b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return max(gaps, default=0.0)
