"""Checks of prompts and of the names of arguments, before any long work."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..arguments import check_call
from ..errors import InputError, check_floats

RUN_ARGUMENTS = {
    "num_images_per_prompt", "num_videos_per_prompt", "output_type", "return_dict", "timesteps", "sigmas", "eta",
    "callback", "callback_steps", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
}  # fmt: skip
"""Call arguments that have no effect where there is no sampling run and no image."""


def one_each(name: str, value: object, count: int, unit: str = "image") -> list[str]:
    """Makes a list of `count` strings from one string for all, or from one string for each."""
    entries = _strings(name, [value] * count if isinstance(value, str) else value)
    if len(entries) != count:
        raise InputError(
            f"`{name}` has {len(entries)} entries for {count} {unit}s; give one string, or one for each {unit}."
        )
    return entries


def prompt_list(prompt: object, num_images_per_prompt: int) -> list[str]:
    """Makes a list of at least one prompt. Each prompt will be used `num_images_per_prompt` times."""
    prompts = _strings("prompt", [prompt] if isinstance(prompt, str) else prompt)
    if not prompts or num_images_per_prompt < 1:
        raise InputError(
            f"{len(prompts)} prompts were given with `num_images_per_prompt` {num_images_per_prompt}; allowed: at "
            "least 1 of each."
        )
    return prompts


def _strings(name: str, value: object) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise InputError(f"`{name}` is {value!r}; allowed: a string, or a list of strings.")
    return list(value)


def check_arguments(
    pipeline: str, parameters: Mapping[str, inspect.Parameter], function: Callable, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns `arguments` of the pipeline's call in the kinds that the call takes (`arguments.check_call`).

    Args:
        pipeline: class of the pipeline.
        parameters: parameters of its call.

    Raises:
        InputError: an argument that neither our `function` nor the pipeline's call takes (the message names similar
            ones), that has no effect in `function`, or that is of the wrong kind.
    """
    options = sorted(set(inspect.signature(function).parameters) - {"pipe", "options", "call_arguments"})
    call = set(parameters) - {"self", "pipe", "kwargs"}
    for name in sorted(set(arguments) - call):
        similar: Sequence[str] = difflib.get_close_matches(name, [*options, *sorted(call)], n=3)
        suggestion = f" Did you mean {', '.join(f'`{each}`' for each in similar)}?" if similar else ""
        raise InputError(
            f"`{function.__name__}` does not take `{name}`.{suggestion} It takes {', '.join(options)}; and arguments "
            f"of {pipeline}'s call."
        )
    if function.__name__ != "guide":
        for name in sorted(RUN_ARGUMENTS & set(arguments)):
            raise InputError(
                f"`{name}` belongs to a sampling run, and `{function.__name__}` makes none; got {arguments[name]!r}. "
                "Leave it out."
            )
    return check_call(parameters, arguments)


def form_of(value: object) -> str:
    """Describes, for a message, a value that is not a fitting tensor: by its shape or its type."""
    if isinstance(value, torch.Tensor):
        return f"have shape {tuple(value.shape)}"
    return f"are a {type(value).__name__}"


def check_latents(latents: torch.Tensor, channels: int, multiple: int) -> None:
    """Refuses anything but finite latents (B, channels, h, w), h and w multiples of `multiple`, by an `InputError`."""
    shape = tuple(latents.shape) if isinstance(latents, torch.Tensor) else ()
    if len(shape) != 4 or shape[1] != channels or any(side % multiple for side in shape[2:]):
        raise InputError(
            f"Latents {form_of(latents)}; allowed: a tensor (B, {channels}, h, w), h and w multiples of {multiple}."
        )
    check_floats("`latents`", latents)
