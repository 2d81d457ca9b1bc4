"""Checks of what users pass to the pipelines' methods, before any long work."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import InputError


def one_each(name: str, value: str | Sequence[str], count: int, unit: str = "image") -> list[str]:
    """One string for all, or one each, as a list of `count`."""
    entries = _strings(name, [value] * count if isinstance(value, str) else value)
    if len(entries) != count:
        raise InputError(
            f"`{name}` has {len(entries)} entries for {count} {unit}s; give one string, or one for each {unit}."
        )
    return entries


def prompt_list(prompt: str | Sequence[str], num_images_per_prompt: int) -> list[str]:
    """The prompts as a list, at least one, to be taken `num_images_per_prompt` times each."""
    prompts = _strings("prompt", [prompt] if isinstance(prompt, str) else prompt)
    if not prompts or num_images_per_prompt < 1:
        raise InputError(
            f"{len(prompts)} prompts were given with `num_images_per_prompt` {num_images_per_prompt}; allowed: at "
            "least 1 of each."
        )
    return prompts


def _strings(name: str, value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise InputError(f"`{name}` is {value!r}; allowed: a string, or a list of strings.")
    return list(value)


def check_arguments(pipe: Any, method: Callable, arguments: Mapping[str, Any]) -> None:
    """Refuses arguments that neither our `method` nor the pipeline's call has, with the nearest names."""
    own, call = ({*inspect.signature(each).parameters} - {"self", "kwargs"} for each in (method, type(pipe).__call__))
    options = sorted(own - {"options", "call_arguments"})
    for name in sorted(set(arguments) - call):
        near = difflib.get_close_matches(name, [*options, *sorted(call)], n=3)
        meant = f" Did you mean {', '.join(f'`{each}`' for each in near)}?" if near else ""
        raise InputError(
            f"`{method.__name__}` does not take `{name}`.{meant} It takes {', '.join(options)}; and arguments of "
            f"{type(pipe).__name__}'s call."
        )


def check_likelihood(num_inference_steps: int) -> None:
    """Refuses numbers of steps that `log_likelihood` can't use."""
    if num_inference_steps < 2:
        raise InputError(f"`num_inference_steps` is {num_inference_steps}; allowed: at least 2, sensibly 20 or more.")


def check_guidance(num_guidance_steps: int, step_size: float, num_inference_steps: int, output_type: str) -> None:
    """Refuses numbers of steps, step sizes and output types that `guide` can't use."""
    whole = isinstance(num_guidance_steps, int) and isinstance(num_inference_steps, int)
    if not whole or num_guidance_steps < 0 or num_inference_steps < 1:
        raise InputError(
            f"`num_guidance_steps` is {num_guidance_steps}, `num_inference_steps` {num_inference_steps}; allowed: "
            "whole numbers, at least 0 and at least 1."
        )
    if not 0 < step_size < math.inf:
        raise InputError(f"`step_size` is {step_size}; allowed: positive, such as 0.2 of the noise's norm.")
    if output_type not in ("pil", "np", "pt"):
        raise InputError(f"`output_type` is '{output_type}'; allowed: pil, np, pt.")
