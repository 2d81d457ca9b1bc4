"""What a pipeline's samples are conditioned on: prompts or their embeddings, class labels, or nothing."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import InputError
from .inputs import one_each, prompt_list

Condition = str | int | Sequence[str | int | None] | torch.Tensor | None
"""What samples are conditioned on: one prompt or class label, or several; None: nothing, or the empty prompt."""

Conditions = tuple[Sequence[str] | Sequence[int], dict[str, Any]]
"""One condition per sample, in the form that rewards take, and the call arguments that hold them."""

NEGATIVE_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_3", "negative_prompt_4")

PROMPT_ARGUMENTS = ("prompt_2", "prompt_3", "prompt_4", *NEGATIVE_PROMPTS)
"""Arguments beside `prompt` that take a string or one for each prompt."""

EMBEDDINGS = (
    "prompt_embeds", "prompt_embeds_2", "prompt_embeds_t5", "prompt_embeds_llama3", "prompt_embeds_qwen",
    "prompt_embeds_clip", "pooled_prompt_embeds", "prompt_attention_mask", "prompt_attention_mask_2",
    "prompt_embeds_mask", "prompt_cu_seqlens",
)  # fmt: skip
"""Arguments that stand for a prompt together, where a call takes them. Each has a counterpart for the negative prompt,
whose name begins with negative_."""

OPTIONAL = ("prompt_embeds_mask",)
"""Embeddings that `encode_prompt` may return as None, and that must be passed all the same."""

CONDITIONS = ("prompt", "class_labels", "image_embeds", *EMBEDDINGS)
"""Arguments that have one entry per sample, of which a call takes at least one."""

BATCH_AXES: dict[str, int | None] = {"prompt_embeds_llama3": 1, "prompt_cu_seqlens": None}
"""Axis of embeddings along which the prompts are counted, where it is not the first; None: there is no such axis."""


def text_conditions(
    name: str,
    parameters: Mapping[str, inspect.Parameter],
    prompt: Condition,
    arguments: dict[str, Any],
    count: int | None,
    num_images_per_prompt: int = 1,
) -> tuple[list[str], dict[str, Any]]:
    """Makes one prompt (or embedding) per sample.

    Args:
        name: class of the pipeline, for messages.
        parameters: parameters of its call.
        prompt: a string, several, or None where `arguments` has `prompt_embeds`.
        arguments: the call's other arguments.
        count: number of samples, for which there must be one condition each, or one for all; None: as many as
            conditions.
        num_images_per_prompt: how often every condition is taken.

    Returns:
        The prompts (empty strings for embeddings), and the call arguments that hold them.

    Raises:
        InputError: prompts of the wrong kind or number, both or neither of prompts and embeddings, embeddings without
            the tensors that belong to them.
    """
    if any(arguments.get(sign + name) is not None for sign in ("", "negative_") for name in EMBEDDINGS):
        if prompt is not None:
            raise InputError("Give either `prompt` or `prompt_embeds`: exactly one of them.")
        return repeat_embeddings(_embeddings(name, parameters, arguments), arguments, count, num_images_per_prompt)
    if count is None:
        prompts = prompt_list(prompt, num_images_per_prompt)
    else:
        prompts = one_each("prompt", "" if prompt is None else prompt, count)
    texts: dict[str, Any] = {"prompt": prompts}
    for name in PROMPT_ARGUMENTS:
        if arguments.get(name) is not None:
            texts[name] = one_each(name, arguments[name], len(prompts), "prompt")
    texts = {name: [text for text in entries for _ in range(num_images_per_prompt)] for name, entries in texts.items()}
    return texts["prompt"], texts


def _embeddings(
    pipeline: str, parameters: Mapping[str, inspect.Parameter], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns the embeddings among the arguments by name. Raises `InputError` where they do not belong together."""
    embeddings: dict[str, torch.Tensor] = {}
    for sign in ("", "negative_"):
        names = [sign + name for name in EMBEDDINGS if sign + name in parameters]
        present = [name for name in names if arguments.get(name) is not None]
        allowed = [name for name in names if name.removeprefix("negative_") in OPTIONAL and name in arguments]
        missing = [name for name in names if name not in (*present, *allowed)]
        if missing and (present or not sign):
            have = f"`{'`, `'.join(present)}` without " if present else "no "
            raise InputError(
                f"{pipeline} was given {have}`{'`, `'.join(missing)}`; they belong together, as the "
                "pipeline's `encode_prompt` returns them."
            )
        embeddings |= {name: arguments[name] for name in present}
    for name in EMBEDDINGS:
        values = [embeddings[key] for key in (name, f"negative_{name}") if key in embeddings]
        pair = [tuple(value.shape[1:]) for value in values if isinstance(value, torch.Tensor)]  # lists may be ragged
        # Calls with `true_cfg_scale` evaluate the two one after the other. Other calls put them into one batch.
        if len(set(pair)) > 1 and "true_cfg_scale" not in parameters:
            raise InputError(
                f"`{name}` and `negative_{name}` have shapes {pair[0]} and {pair[1]} per prompt; they must be the "
                "same: encode both to one number of tokens, as `encode_prompt` does."
            )
    return embeddings


def repeat_embeddings(
    embeddings: dict[str, torch.Tensor], arguments: dict[str, Any], count: int | None, num_images_per_prompt: int
) -> tuple[list[str], dict[str, Any]]:
    """Makes one embedding per sample. Arguments, result and errors are those of `text_conditions`."""
    sizes = {name: size for name, value in embeddings.items() if (size := count_of(name, value)) is not None}
    number = next(iter(sizes.values())) if count is None else count
    if any(size not in (number, 1 if count is not None else number) for size in sizes.values()) or number < 1:
        raise InputError(
            f"Embeddings are of {sizes} prompts; allowed: {number} of each" + (", or 1." if count else ".")
        )
    if num_images_per_prompt < 1:
        raise InputError(f"`num_images_per_prompt` is {num_images_per_prompt}; allowed: at least 1.")
    one_per_sample: dict[str, Any] = {
        name: _take(name, value, [row % size for row in range(number) for _ in range(num_images_per_prompt)])
        if (size := sizes.get(name)) is not None
        else value
        for name, value in embeddings.items()
    }
    if "negative_prompt_embeds" in embeddings and "negative_prompt" not in arguments:
        one_per_sample["negative_prompt"] = None  # calls with a default for it (PixArt) would refuse both
    return [""] * (number * num_images_per_prompt), one_per_sample


def _batch_axis(name: str) -> int | None:
    """Returns the axis of an argument along which its samples are counted; None where there is none."""
    return BATCH_AXES.get(name.removeprefix("negative_"), 0)


def count_of(name: str, value: Any) -> int | None:
    """Returns for how many samples an argument is, a list, a tuple or a tensor; None where it does not say."""
    axis = _batch_axis(name)
    return value.shape[axis] if axis else None if axis is None else len(value)


def _take(name: str, value: Any, rows: Sequence[int]) -> Any:
    """Returns the entries of an argument at the places `rows` of the batch."""
    axis = _batch_axis(name)
    if isinstance(value, torch.Tensor) and axis is not None:
        return value.index_select(axis, torch.tensor(rows, device=value.device))
    return value if axis is None else [value[row] for row in rows]


def number_of_conditions(arguments: Mapping[str, Any]) -> int | None:
    """Returns for how many samples a call's arguments have conditions; None where they have none, or one for all."""
    values = {name: arguments.get(name) for name in CONDITIONS}
    counts = [count_of(name, value) for name, value in values.items() if isinstance(value, (list, torch.Tensor))]
    return next((count for count in counts if count is not None), None)


def select_conditions(arguments: Mapping[str, Any], rows: torch.Tensor) -> dict[str, Any]:
    """Returns a call's arguments for some of its samples; `rows` (n,) int64 are their places in the batch.

    The conditions say how many samples there are. Lists and tensors of as many entries are taken apart; tuples hold
    sizes.
    """
    count = number_of_conditions(arguments)
    if count is None:
        return dict(arguments)

    def select(name: str, value: object) -> object:
        is_batch = isinstance(value, list) or (isinstance(value, torch.Tensor) and value.ndim > 0)
        return _take(name, value, rows.tolist()) if is_batch and count_of(name, value) == count else value

    return {name: select(name, value) for name, value in arguments.items()}


def class_conditions(
    labels: Condition, num_classes: int, count: int | None, num_images_per_prompt: int = 1
) -> list[int]:
    """Makes one class label per sample. Arguments and errors are those of `text_conditions`."""
    entries: Any = labels.tolist() if isinstance(labels, torch.Tensor) else labels  # not checked yet
    if isinstance(labels, int):
        entries = [labels] * (count or 1)
    are_numbers = isinstance(entries, (list, tuple)) and all(type(label) is int for label in entries)
    if not are_numbers or not entries or not all(0 <= label < num_classes for label in entries):
        raise InputError(f"`class_labels` is {labels!r}; allowed: numbers from 0 to {num_classes - 1}, at least one.")
    if count is not None and len(entries) != count:
        raise InputError(f"`class_labels` has {len(entries)} entries for {count} images; give one, or one per image.")
    if num_images_per_prompt < 1:
        raise InputError(f"`num_images_per_prompt` is {num_images_per_prompt}; allowed: at least 1.")
    return [label for label in entries for _ in range(num_images_per_prompt)]
