"""What denoiser a trace model belongs to: a few numbers of its weights, its configuration and its schedule."""

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError, UnsupportedError
from ..noise import NoiseSchedule, noise_schedule

NUM_TENSORS = 16  # parameters that are looked at one by one
NUM_VALUES = 65536  # values of each that are read
NUM_SUMS = 32  # over all matrices: their root mean square is that of the changes to 12%
MATRIX_VALUES = 4096  # values of each matrix that are read
LEAST_WEIGHT = 1e-6  # of a matrix's root mean square: float16 has no digits left below
WEIGHT_TOLERANCE = 1e-2  # relative change of one parameter, by one projection: rounding to bfloat16 is up to 2.3e-3
MATRIX_TOLERANCE = 5e-3  # relative change of all matrices: rounding to bfloat16 is 1.6e-3
SCHEDULE_TOLERANCE = 1e-3  # of log(sigma/alpha)
LOG_LIMIT = 20.0  # stands for infinity: a schedule that ends in pure noise
COMPILED = "_orig_mod."  # what torch.compile puts before names


def denoiser_fingerprint(denoiser: Any) -> dict[str, Any]:
    """The fingerprint of a pipeline, or of a `PipelineDenoiser` over one; what can be stored as JSON.

    Keys: `denoiser` (class), `config` (hash of the settings that differ from their defaults), `parameters` (hash of
    names and shapes), `weights` (projections of 16 parameters on a fixed direction, relative to their norms), `counts`
    (how many values of each), `matrices` (32 sums of projections of all parameters with two axes or more, see
    `_sums_of_matrices`), `prediction_type`, `schedule` (log(sigma/alpha) at five timesteps). A denoiser without a
    network has only the last two; a compiled one is as it was before. The weights are compared to within the rounding
    of 16-bit dtypes; those in 8 bits or fewer, or not in memory, fit anything. Cost: reads a million numbers at most,
    and 4,096 of every matrix.

    Raises:
        UnsupportedError: an object without a scheduler, or with one that is not known.
    """
    scheduler = getattr(denoiser, "scheduler", None)
    if scheduler is None:
        raise UnsupportedError(
            f"A fingerprint needs a pipeline or a denoiser with a `scheduler`, got {type(denoiser).__name__}; pass "
            "the pipeline, or PipelineDenoiser(pipe, ...)."
        )
    noise = noise_schedule(scheduler)
    schedule = {"prediction_type": noise.prediction.kind, "schedule": _five_levels(noise)}
    network = _network(getattr(denoiser, "pipe", denoiser))
    if network is None:
        return schedule
    parameters = dict(sorted((name.replace(COMPILED, ""), value) for name, value in network.named_parameters()))
    sampled = [parameters[name] for name in _spread(list(parameters))]
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters.items()]
    return {
        "denoiser": type(network).__name__, "config": _hash(_settings(network)), "parameters": _hash(shapes),
        "weights": [_projection(parameter) for parameter in sampled],
        "counts": [min(parameter.numel(), NUM_VALUES) for parameter in sampled],
        "matrices": _sums_of_matrices(parameters.values()), **schedule,
    }  # fmt: skip


def fingerprint_differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In words, what of fingerprint `found` is not as `expected`; keys that either lacks are not compared.

    `expected` may lack `counts` and `matrices`, as fingerprints did at first: its weights are then compared by 16
    parameters alone.
    """
    words = []
    for key, label in (("denoiser", "class of the denoiser"), ("prediction_type", "prediction type")):
        if key in expected and key in found and expected[key] != found[key]:
            words.append(f"{label}: trained for {expected[key]}, got {found[key]}")
    for key, label in (("config", "configuration of the denoiser"), ("parameters", "names or shapes of parameters")):
        if key in expected and key in found and expected[key] != found[key]:
            words.append(f"{label} (hash {found[key]}, trained for {expected[key]})")
    one, all_matrices = _changes_of_weights(expected, found)
    if one > WEIGHT_TOLERANCE or all_matrices > MATRIX_TOLERANCE:
        words.append(
            f"weights of the denoiser (by about {max(one, all_matrices):.2g} of their size): another checkpoint, a "
            "fine-tune or a fused LoRA"
        )
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
            return getattr(network, COMPILED[:-1], network)
    return None


def _five_levels(schedule: NoiseSchedule) -> list[float]:
    """log(sigma/alpha) at five timesteps from the first to the last."""
    return schedule.log_noise_to_signal_at(schedule.spread_timesteps(5)).clamp(-LOG_LIMIT, LOG_LIMIT).tolist()


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


@functools.cache
def _direction(count: int) -> torch.Tensor:
    """A fixed direction without a pattern, (count,) float64, entries of mean square 1/2."""
    return torch.cos(torch.arange(count, dtype=torch.float64) ** 2 * 0.7548776662466927)


def _values(parameter: torch.Tensor, count: int) -> torch.Tensor | None:
    """The first values, float64; None where they are not at hand, or too coarse to tell a change from rounding."""
    if parameter.is_meta or not parameter.is_floating_point() or parameter.element_size() < 2:
        return None
    return parameter.detach().flatten()[:count].cpu().double()


@torch.no_grad()
def _projection(parameter: torch.Tensor) -> float | None:
    """<w, u>/|w| with u a fixed direction of norm one; None, which fits anything, where the values are not at hand.

    Whatever the weights, it is about 1/sqrt(n), so that a change of w by a part rho moves it by about rho/sqrt(n).
    """
    values = _values(parameter, NUM_VALUES)
    if values is None:
        return None
    direction = _direction(NUM_VALUES)[: len(values)]
    size = float(values.norm() * direction.norm())
    return float(values @ direction) / size if size > 0 else 0.0


@torch.no_grad()
def _sums_of_matrices(parameters: Iterable[torch.Tensor]) -> list[float] | None:
    """Random projections of all matrices together, each of which counts by its relative change.

    The values of a matrix, divided by their norm, are dealt out to the sums in turn. If matrix i changes by a part
    rho_i of its norm, the sums change by the root mean square of rho over the matrices, in root mean square
    (Johnson & Lindenstrauss): a LoRA fused into a few kinds of layers shows, wherever they are. None where values of a
    matrix are not at hand.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim > 1 and parameter.numel() > 0]
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
    for parameter in matrices:
        values = _values(parameter, MATRIX_VALUES)
        if values is None:
            return None
        size = values.norm().clamp_min(LEAST_WEIGHT * len(values) ** 0.5)
        terms = values * _direction(NUM_VALUES)[: len(values)] / size
        sums += torch.nn.functional.pad(terms, (0, -len(terms) % NUM_SUMS)).view(-1, NUM_SUMS).sum(0)
    scale = math.sqrt(2 * NUM_SUMS / max(1, len(matrices)))  # the direction's entries have mean square 1/2
    return [round(value, 6) for value in (scale * sums).tolist()]


def _changes_of_weights(expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[float, float]:
    """About how much, relative to its norm, the one parameter changed that did most, and all matrices together."""
    counts = found.get("counts") or expected.get("counts")
    one = all_matrices = 0.0
    if counts:
        scales = [math.sqrt(count) for count in counts]
        one = _largest_gap(expected.get("weights"), found.get("weights"), scales)
    left, right = expected.get("matrices"), found.get("matrices")
    if left is not None and right is not None:
        all_matrices = math.dist(left, right) / math.sqrt(NUM_SUMS)
    return one, all_matrices


def _largest_gap(left: Any, right: Any, scales: Sequence[float] | None = None) -> float:
    if left is None or right is None:
        return 0.0
    if len(left) != len(right):
        return math.inf
    scales = [1.0] * len(left) if scales is None else scales
    gaps = [s * abs(a - b) for s, a, b in zip(scales, left, right, strict=True) if a is not None and b is not None]
    return max(gaps, default=0.0)
