"""Checks the kinds of arguments by the annotations of the functions that take them: the same words at every door."""

from __future__ import annotations

import collections.abc
import functools
import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy
import torch

from .errors import InputError

Checked = TypeVar("Checked", bound=Callable)

LARGEST = {
    "num_inference_steps": 10_000, "num_steps": 10_000, "num_guidance_steps": 10_000,
    "num_guidance_inference_steps": 10_000, "num_candidates": 10_000, "num_levels": 100_000,
    "num_images_per_prompt": 10_000, "num_videos_per_prompt": 10_000, "height": 16_384, "width": 16_384,
    "num_draws": 10_000, "num_pairs": 10_000, "num_encodings": 10_000, "count": 10_000_000, "std": 1000,
    "bins": 2**32,
}  # fmt: skip
"""Largest values of arguments that decide how long a call takes. Beyond them a call would not end, or fill the memory.
"""

WORDS = {
    "DiffusionPipeline": "a diffusers pipeline, such as StableDiffusionPipeline.from_pretrained(...)",
    "FisherEstimator": "a Fisher estimator such as DirectFisher()", "Generator": "a torch.Generator",
    "Module": "a torch module",
    "SchedulerMixin": "a diffusers scheduler, such as DDIMScheduler.from_config(...)", "Tensor": "a tensor",
}  # fmt: skip
"""What messages call the classes of annotations that a user may not know by name."""

SCALARS = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a string", type(None): "None"}


def check_kinds(function: Checked) -> Checked:
    """Makes a function, or a dataclass, refuse arguments that its annotations do not allow.

    Whole numbers may stand for floats, and NumPy's scalars for Python's. A float of whole value is no whole number,
    True and False are no numbers, and NaN and infinity are no floats. Annotations that name something which is
    imported for type checkers alone are not checked.

    Returns:
        The function, or the class itself with another `__init__`, which raises `InputError` before anything else.
    """
    if isinstance(function, type):
        function.__init__ = check_kinds(function.__init__)  # type: ignore[misc]
        return function
    parameters = inspect.signature(function).parameters
    names = [name for name, each in parameters.items() if each.kind is not each.KEYWORD_ONLY]

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        hints = hints_of(function)
        values = [fit(name, value, hints) for name, value in zip(names, args, strict=False)]
        return function(*values, *args[len(values) :], **{name: fit(name, kwargs[name], hints) for name in kwargs})

    return typing.cast(Checked, wrapper)


def fit(name: str, value: object, hints: Mapping[str, object]) -> Any:
    """Returns the argument `name` in the form that its annotation among `hints` says; others as they are.

    Raises:
        InputError: the annotation does not allow the value, or it is larger than `LARGEST`.
    """
    if name not in hints:
        return value
    try:
        value = _fit(value, hints[name])
    except _Misfit:
        raise InputError(f"`{name}` is {_got(value)}; allowed: {_words(hints[name])}.{_advice(value)}") from None
    if isinstance(value, (int, float)) and value > LARGEST.get(name, math.inf):
        raise InputError(f"`{name}` is {value}; allowed: at most {LARGEST[name]}, beyond which a call would not end.")
    return value


def check_call(parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `arguments` of a pipeline's call, after a check of those that must be numbers, texts or tensors.

    Annotations of other kinds are left alone, because diffusers' pipelines often take more than theirs say.

    Args:
        parameters: the call's parameters by name.

    Raises:
        InputError: the call's annotation does not allow an argument.
    """
    checkable = {*SCALARS, torch.Tensor, dict}
    hints: dict[str, object] = {}
    for name in set(arguments) & set(parameters):
        hint = parameters[name].annotation
        kinds = [typing.get_origin(each) or each for each in (typing.get_args(hint) if _is_union(hint) else (hint,))]
        # Lists of prompts are allowed where some calls name a string alone; `text_conditions` checks them.
        is_text = str in kinds and "prompt" in name
        if checkable.issuperset(kinds) and not is_text:
            hints[name] = hint | None if parameters[name].default is None else hint
    return {name: fit(name, value, hints) for name, value in arguments.items()}


def check_generators(generator: torch.Generator | list[torch.Generator] | None, count: int) -> None:
    """Refuses a list of generators that has not one per sample. Raises `InputError`."""
    if isinstance(generator, list) and len(generator) != count:
        raise InputError(f"{len(generator)} generators were given for {count} images; give one, or as many.")


class _Misfit(Exception):
    """A value does not fit an annotation."""


@functools.cache
def hints_of(function: Callable) -> dict[str, object]:
    """Returns the annotations of a function's parameters by name, evaluated at the first call."""
    function = inspect.unwrap(function)
    return {
        name: hint
        for name, each in inspect.signature(function).parameters.items()
        if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and each.annotation is not each.empty
        for hint in [_evaluate(each.annotation, function.__globals__)]
        if hint is not Any
    }


def _evaluate(annotation: object, names: dict[str, Any]) -> Any:
    """Evaluates an annotation; what it names for type checkers alone becomes `Any`."""
    holder = types.SimpleNamespace(__annotations__={"hint": annotation})
    try:
        return typing.get_type_hints(holder, globalns=names)["hint"]
    except (NameError, TypeError):  # a string in a union with a type is no annotation at run time
        return Any


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _fit(value: Any, hint: Any) -> Any:
    """Returns `value` in the form that `hint` says. Raises `_Misfit` if it does not fit."""
    if isinstance(value, numpy.generic):
        value = value.item()
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if _is_union(hint):
        if torch.Tensor in arguments and float in arguments and isinstance(value, float):
            return value  # what takes tensors too checks all numbers by itself, as NaN in tensors
        for each in arguments:
            try:
                return _fit(value, each)
            except _Misfit:
                continue
        raise _Misfit
    if hint is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2.0**1023
    elif hint is int:
        fits = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    elif origin is typing.Literal:
        fits = any(type(value) is type(each) and value == each for each in arguments)
    elif origin is collections.abc.Callable:  # a class makes no tensor
        fits = callable(value) and not (isinstance(value, type) and arguments[-1] is torch.Tensor)
    elif origin is tuple:
        return _fit_tuple(value, arguments)
    elif origin in (list, collections.abc.Sequence):
        return _fit_sequence(value, origin, arguments[0])
    else:
        kind = origin or (type(None) if hint is None else hint)
        fits = not isinstance(kind, type) or getattr(kind, "_is_protocol", False) or isinstance(value, kind)
    if not fits:
        raise _Misfit
    return value


def _fit_sequence(value: Any, kind: Any, hint: Any) -> Any:
    if not isinstance(value, kind) or isinstance(value, (str, bytes)):
        raise _Misfit
    entries = [_fit(each, hint) for each in value]
    is_changed = any(entry is not each for entry, each in zip(entries, value, strict=True))
    return entries if is_changed else value


def _fit_tuple(value: Any, hints: tuple[Any, ...]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _Misfit
    hints = hints[:1] * len(value) if hints[1:] == (...,) else hints
    if len(value) != len(hints):
        raise _Misfit
    return tuple(_fit(each, hint) for each, hint in zip(value, hints, strict=True))


def _got(value: object) -> str:
    """Describes a value: plain data by itself and its kind, other objects by their class."""
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    if isinstance(value, (str, bool, int, float, complex, bytes, list, tuple, dict, set, numpy.generic)):
        return f"{reprlib.repr(value)} ({kind})"
    return f"a {kind}"


def _advice(value: object) -> str:
    if isinstance(value, type):
        return f" Pass an object of it: {value.__name__}(...)."
    return f" Write {value:.0f}." if isinstance(value, float) and value.is_integer() else ""


def _words(hint: Any) -> str:
    """Says in words what an annotation allows."""
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if _is_union(hint):
        *first, last = dict.fromkeys(map(_words, arguments))
        return f"{', '.join(first)} or {last}" if first else last
    if origin is typing.Literal:
        return " or ".join(map(repr, arguments))
    if origin is tuple and arguments[1:] != (...,):
        return f"a tuple of {len(arguments)} ({', '.join(map(_words, arguments))})"
    if origin in (list, tuple, collections.abc.Sequence):
        entries = f"({_words(arguments[0])})" if _is_union(arguments[0]) else _words(arguments[0])
        return f"a {origin.__name__.lower()} with entries of {entries}"
    if origin is collections.abc.Callable:
        return "a function"
    kind = origin or (type(None) if hint is None else hint)
    if kind in SCALARS:
        return SCALARS[kind]
    name = getattr(kind, "__name__", str(kind))
    return WORDS.get(name, f"{'an' if name[0] in 'AEIOU' else 'a'} {name}")
