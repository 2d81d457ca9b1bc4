"""Fingerprints say which denoiser a trace model belongs to, by its outputs, weights, configuration and schedule.

A fingerprint reads up to a million weights of the network, and evaluates it twice on a small input. It is computed
again only when `network_key` has changed, which costs milliseconds.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import math
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..denoiser import Denoiser
from ..errors import InputError, UnsupportedError
from ..noise import noise_schedule
from .fixed_outputs import (
    NUM_SUMS,
    OUTPUT_TOLERANCE,
    fixed_direction,
    fixed_outputs,
    is_quantised,
    output_change,
    sums_of,
)

NUM_TENSORS = 16  # parameters that are compared one by one
NUM_VALUES = 65536  # values that are read of each of these parameters
MATRIX_VALUES = 4096  # values that are read of each matrix
LEAST_WEIGHT = 1e-6  # least root mean square of a matrix: float16 has no digits below it
WEIGHT_TOLERANCE = 1e-2  # relative change of one parameter, by one projection: rounding to bfloat16 is up to 2.3e-3
MATRIX_TOLERANCE = 5e-3  # relative change of all matrices: rounding to bfloat16 is 1.6e-3
SCHEDULE_TOLERANCE = 1e-3  # difference of log(sigma/alpha)
LOG_LIMIT = 20.0  # stands for infinity: a schedule that ends in pure noise
COMPILED = "_orig_mod."  # torch.compile puts it before names
KEY_VALUES = 64  # least number of weights that a key reads: `parameter.data.mul_()` moves no version counter
SIMPLE_TYPES = {bool, int, float, str, type(None)}
LATENT_SCALING = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
"""Settings of an autoencoder by which its latents are scaled."""

OF_TORCH = set(vars(torch.nn.Module())) - {"training", "_forward_hooks", "_forward_pre_hooks"}
"""Attributes of every module that are read elsewhere or have no part in an evaluation."""

OF_OFFLOAD = {"_hf_hook", "_old_forward", "forward"}
"""Attributes of a module with an offload hook of accelerate's, which a pipeline makes anew after every call."""


_FINGERPRINTS: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Hashable, dict[str, Any]]] = (
    weakref.WeakKeyDictionary()
)


def denoiser_fingerprint(denoiser: Denoiser | DiffusionPipeline) -> dict[str, Any]:
    """Returns the fingerprint of a pipeline or a `Denoiser`, which can be stored as JSON.

    The keys are `denoiser` (class), `config` (hash of settings that differ from their defaults), `parameters`
    (hash of names and shapes), `weights` (projections of 16 parameters on a fixed direction, relative to their norms),
    `counts` (number of values of each of them), `matrices` (32 sums of projections of all parameters with two axes or
    more, see `_sums_of_matrices`), `outputs` (32 sums of each of the network's outputs on two fixed inputs, see
    `fixed_outputs`; None where the network can't be evaluated so), `prediction_type`, and `schedule`
    (log(sigma/alpha) at five timesteps). A denoiser without a network has only the last two. `torch.compile` does not
    change the fingerprint. Outputs and weights are compared to within the rounding of the weights' dtypes. Weights in
    8 bits or fewer, quantised (torchao), or not in memory, agree with all others.

    Cost: reads a million numbers at most, and 4,096 of every matrix, and evaluates the network twice on a small input.
    A second call on the same network reads only the numbers of `network_key`, if the key is the same.

    Raises:
        UnsupportedError: the object has no scheduler, or one that is not known.
    """
    scheduler = getattr(denoiser, "scheduler", None)
    if scheduler is None:
        raise UnsupportedError(
            f"A fingerprint needs a pipeline or a denoiser with a `scheduler`, got {type(denoiser).__name__}; pass "
            "the pipeline, or PipelineDenoiser(pipe, ...)."
        )
    noise = noise_schedule(scheduler)
    levels = noise.log_noise_to_signal_at(noise.spread_timesteps(5)).clamp(-LOG_LIMIT, LOG_LIMIT)
    schedule = {"prediction_type": noise.prediction.kind, "schedule": levels.tolist()}
    network = _network(denoiser)
    if network is None:
        return schedule
    key = network_key(network)
    if network not in _FINGERPRINTS or _FINGERPRINTS[network][0] != key:
        _FINGERPRINTS[network] = key, _network_fingerprint(network)
    return copy.deepcopy(_FINGERPRINTS[network][1]) | schedule


@torch.no_grad()
def network_key(network: torch.nn.Module, with_places: bool = True) -> Hashable:
    """Returns a key that changes whenever a network's function may have changed. It is cheap enough for every call.

    Args:
        with_places: whether the key also changes when the network is moved, such as by offload.

    For each parameter the key has its name, shape, dtype, device, place in memory and version, and one value or more
    (64 in total). For each module it has the class, the hooks and every attribute of the module's own, among them
    adapters and their scales, attention processors, FreeU's factors and the configuration. The key holds no reference
    to any of them. Changes through `parameter.data` move no version, so only the sampled values show them.
    """
    entries: list[Hashable] = []  # flat, because there are thousands
    readable = []
    for path, module in network.named_modules():
        entries += (path, type(module).__qualname__)
        for name, parameter in vars(module)["_parameters"].items():
            if parameter is not None:
                place = (parameter.device, *_place(parameter)) if with_places else (id(parameter), _version(parameter))
                entries += (name, parameter.shape, parameter.dtype, *place)
                if _is_readable(parameter) and parameter.numel() > 0:
                    readable.append(parameter)
        ignored = OF_TORCH if with_places or "_hf_hook" not in vars(module) else OF_TORCH | OF_OFFLOAD
        for name, value in vars(module).items():
            if name not in ignored and (type(value) is not OrderedDict or value):  # most modules have no hooks
                entries += (name, value if type(value) in SIMPLE_TYPES else _summary(value))
    return tuple(entries), _sampled_values(readable)


def component_key(component: object) -> Hashable:
    """Returns a key that changes whenever a text encoder or tokenizer may have changed, and not when it is moved."""
    if isinstance(component, torch.nn.Module):
        return network_key(component, with_places=False)
    return _summary(component), len(component) if isinstance(component, Sized) else None  # the number of tokens


def _network_fingerprint(network: torch.nn.Module) -> dict[str, Any]:
    parameters = dict(sorted((name.replace(COMPILED, ""), value) for name, value in network.named_parameters()))
    samples = [parameters[name] for name in _spread(list(parameters))]
    shapes = [(name, list(parameter.shape)) for name, parameter in parameters.items()]
    return {
        "denoiser": type(network).__name__, "config": _hash(_settings(network)), "parameters": _hash(shapes),
        "weights": [_projection(parameter) for parameter in samples],
        "counts": [min(parameter.numel(), NUM_VALUES) for parameter in samples],
        "matrices": _sums_of_matrices(parameters.values()), "outputs": fixed_outputs(network),
    }  # fmt: skip


def fingerprint_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Says in words how fingerprint `actual` differs from `expected`; keys that one of them lacks are not compared.

    Networks whose outputs agree are the same denoiser, whatever their classes, settings and weights are. Fingerprints
    of earlier releases lack `outputs`, and those of the first one `counts` and `matrices`, too: then their weights are
    compared by 16 parameters alone.
    """
    words = []
    if _differ(expected, actual, "prediction_type"):
        words.append(f"prediction type: trained for {expected['prediction_type']}, got {actual['prediction_type']}")
    words += _network_differences(expected, actual)
    schedule = _largest_gap(expected.get("schedule"), actual.get("schedule"))
    if schedule > SCHEDULE_TOLERANCE:
        levels = [", ".join(f"{value:.3f}" for value in each["schedule"]) for each in (expected, actual)]
        words.append(f"schedule: trained for log(sigma/alpha) {levels[0]} at five timesteps, got {levels[1]}")
    return words


def _differ(expected: Mapping[str, Any], actual: Mapping[str, Any], key: str) -> bool:
    return key in expected and key in actual and expected[key] != actual[key]


def _network_differences(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Says in words how two networks differ; nothing if their outputs agree."""
    left, right = expected.get("outputs"), actual.get("outputs")
    if not left or not right:
        return _differences_of_parts(expected, actual)
    change, tolerance = output_change(left, right)
    # Rounding to 16 bits hides small changes of the outputs, which the weights show where their names are the same.
    is_fine = tolerance <= OUTPUT_TOLERANCE or _differ(expected, actual, "parameters")
    if change <= tolerance and is_fine:
        return []
    words = _differences_of_parts(expected, actual)
    if change > tolerance and not words:
        words = [f"outputs of the denoiser on a fixed input (by about {change:.2g} of their size)"]
    return words


def _differences_of_parts(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Says in words how the class, the settings and the weights of two networks differ."""
    words = []
    if _differ(expected, actual, "denoiser"):
        words.append(f"class of the denoiser: trained for {expected['denoiser']}, got {actual['denoiser']}")
    for key, label in (("config", "configuration of the denoiser"), ("parameters", "names or shapes of parameters")):
        if _differ(expected, actual, key):
            words.append(f"{label} (hash {actual[key]}, trained for {expected[key]})")
    largest, all_matrices = _changes_of_weights(expected, actual)
    if largest > WEIGHT_TOLERANCE or all_matrices > MATRIX_TOLERANCE:
        words.append(
            f"weights of the denoiser (by about {max(largest, all_matrices):.2g} of their size): another checkpoint, "
            "a fine-tune or a fused LoRA"
        )
    return words


def autoencoder_differences(first: torch.nn.Module, second: torch.nn.Module) -> list[str]:
    """Says in words how two autoencoders differ, in all on which scaled latents depend; copies in other dtypes agree.

    Cost: reads a million numbers of each at most, and 4,096 of every matrix.
    """
    if first is second:
        return []
    configs = [_config(autoencoder) for autoencoder in (first, second)]
    words = [
        f"`{name}` is {configs[0].get(name)} and {configs[1].get(name)}"
        for name in LATENT_SCALING
        if not _equal(configs[0].get(name), configs[1].get(name))
    ]
    left, right = (_network_fingerprint(autoencoder) for autoencoder in (first, second))
    for key, label in (("denoiser", "classes"), ("parameters", "names or shapes of parameters")):
        words += [label] * _differ(left, right, key)
    largest, all_matrices = _changes_of_weights(left, right)
    if not words and (largest > WEIGHT_TOLERANCE or all_matrices > MATRIX_TOLERANCE):
        words.append(f"weights, by about {max(largest, all_matrices):.2g} of their size")
    return words


def check_fingerprint(
    expected: Mapping[str, Any] | None, denoiser: Denoiser | DiffusionPipeline, name: str = "trace model"
) -> None:
    """Refuses a denoiser whose fingerprint differs from `expected`; None allows every denoiser.

    Raises:
        InputError: says what differs.
    """
    if not expected:
        return
    words = fingerprint_differences(expected, denoiser_fingerprint(denoiser))
    if words:
        raise InputError(
            f"The {name} was trained for another denoiser. What differs: {'; '.join(words)}. Use the one it was "
            "trained for, train another, or pass check=False to TraceMatchingFisher if you know that they agree."
        )


def _network(denoiser: Denoiser | DiffusionPipeline) -> torch.nn.Module | None:
    """Returns the network as it was before `torch.compile`; None if there is no network."""
    if isinstance(denoiser, Denoiser):
        candidates = [denoiser.network]
    else:
        candidates = [getattr(denoiser, name, None) for name in ("unet", "transformer")]
    networks = [network for network in candidates if isinstance(network, torch.nn.Module)]
    return getattr(networks[0], COMPILED[:-1], networks[0]) if networks else None


def _place(parameter: torch.Tensor) -> tuple[int, int]:
    """Returns the address in memory and the version."""
    try:
        return parameter.data_ptr(), _version(parameter)
    except RuntimeError:  # a subclass without memory of its own
        return id(parameter), 0


def _version(parameter: torch.Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _sampled_values(parameters: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """Returns at least `KEY_VALUES` values, spread over all parameters and over the entries of each."""
    count = math.ceil(KEY_VALUES / max(1, len(parameters)))
    values: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}  # for one transfer from each device
    for parameter in parameters:
        entries = values.setdefault((parameter.device, parameter.dtype), [])
        for number in range(count):
            place, position = parameter.storage_offset(), (2 * number + 1) * parameter.numel() // (2 * count)
            for size, stride in zip(reversed(parameter.shape), reversed(parameter.stride()), strict=True):
                position, index = divmod(position, size)
                place += index * stride
            entries.append(torch.as_strided(parameter, (), (), place))  # half the time of an index
    return tuple(value for entries in values.values() for value in torch.stack(entries).cpu().double().tolist())


def _summary(value: object) -> Hashable:
    """Returns numbers, strings and containers of them by value, other objects by class, identity and attributes."""
    if type(value) in SIMPLE_TYPES:
        return value
    if isinstance(value, dict):
        return tuple([(_summary(key), _summary(entry)) for key, entry in value.items()])
    if isinstance(value, (list, tuple, set)):
        return tuple([_summary(entry) for entry in value])
    attributes = getattr(value, "__dict__", {}).items()  # an attention processor's, for example
    return type(value).__qualname__, id(value), *(entry for entry in attributes if type(entry[1]) in SIMPLE_TYPES)


def _settings(network: torch.nn.Module) -> dict[str, Any]:
    """Returns settings that differ from the class's defaults: a newer diffusers may add keys, not change the model."""
    defaults = inspect.signature(type(network).__init__).parameters
    settings = {key: value for key, value in _config(network).items() if not key.startswith("_")}
    return {k: v for k, v in sorted(settings.items()) if k not in defaults or not _equal(v, defaults[k].default)}


def _config(network: torch.nn.Module) -> dict[str, Any]:
    """Returns the settings with which a network was made; none for networks without a configuration."""
    return dict(getattr(network, "config", {}))


def _equal(value: object, default: object) -> bool:
    left, right = (list(entry) if isinstance(entry, (list, tuple)) else entry for entry in (value, default))
    return left == right


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _spread(names: list[str]) -> list[str]:
    """Returns up to `NUM_TENSORS` of `names`, evenly spaced."""
    count = min(NUM_TENSORS, len(names))
    return [names[index * (len(names) - 1) // max(1, count - 1)] for index in range(count)]


def _is_readable(parameter: torch.Tensor) -> bool:
    """Returns whether values are in memory, and fine enough to tell a change from rounding."""
    if parameter.is_meta or is_quantised(parameter):
        return False
    return parameter.is_floating_point() and parameter.element_size() >= 2


def _values(parameter: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the first `count` values, float64."""
    return parameter.detach().flatten()[:count].cpu().double()


@torch.no_grad()
def _projection(parameter: torch.Tensor) -> float | None:
    """Returns <w, u>/|w| with a fixed direction u of norm one, or None if the values can't be read.

    For all weights it is about 1/sqrt(n), so a change of w by a part rho moves it by about rho/sqrt(n).
    """
    if not _is_readable(parameter):
        return None
    values = _values(parameter, NUM_VALUES)
    direction = fixed_direction(NUM_VALUES)[: len(values)]
    size = float(values.norm() * direction.norm())
    return float(values @ direction) / size if size > 0 else 0.0


@torch.no_grad()
def _sums_of_matrices(parameters: Iterable[torch.Tensor]) -> list[float] | None:
    """Returns random projections of all matrices together, or None if values of a matrix can't be read.

    Each matrix counts by its relative change. The values of a matrix, divided by their norm, go to the sums in turn.
    If matrix i changes by a part rho_i of its norm, the root mean square of the sums' changes is the root mean square
    of rho over the matrices (Johnson & Lindenstrauss). So a LoRA that is fused into a few kinds of layers shows,
    wherever these layers are.
    """
    matrices = [parameter for parameter in parameters if parameter.ndim > 1 and parameter.numel() > 0]
    if not all(map(_is_readable, matrices)):
        return None
    sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
    for parameter in matrices:
        values = _values(parameter, MATRIX_VALUES)
        sums += sums_of(values / values.norm().clamp_min(LEAST_WEIGHT * len(values) ** 0.5))
    scale = math.sqrt(2 * NUM_SUMS / max(1, len(matrices)))  # the direction's entries have mean square 1/2
    return [round(value, 6) for value in (scale * sums).tolist()]


def _changes_of_weights(expected: Mapping[str, Any], actual: Mapping[str, Any]) -> tuple[float, float]:
    """Returns about how much the most changed parameter differs, relative to its norm, and all matrices together."""
    counts = actual.get("counts") or expected.get("counts") or ()
    scales = [math.sqrt(count) for count in counts]
    largest = _largest_gap(expected.get("weights"), actual.get("weights"), scales) if scales else 0.0
    left, right = expected.get("matrices"), actual.get("matrices")
    return largest, 0.0 if left is None or right is None else math.dist(left, right) / math.sqrt(NUM_SUMS)


def _largest_gap(
    left: Sequence[float | None] | None, right: Sequence[float | None] | None, scales: Sequence[float] = (1.0,)
) -> float:
    """Returns the largest difference, times its scale; entries of None fit every number."""
    if left is None or right is None:
        return 0.0
    if len(left) != len(right):
        return math.inf
    gaps = np.array(scales) * np.abs(np.array(left, dtype=float) - np.array(right, dtype=float))  # NaN for None
    return float(np.nanmax(gaps, initial=0.0))
