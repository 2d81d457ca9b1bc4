"""Settings of runs: dataclasses that refuse, when they are made, values which can't be used."""

import dataclasses
import functools
import typing
from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic.dataclasses
from pydantic import Field
from pydantic_core import ErrorDetails

from .errors import InputError

Kind = TypeVar("Kind")

Dtype = Literal["float32", "bfloat16", "float16"]
"""Dtype of a pipeline's weights."""

TraceEstimator = Literal["auto", "trace-model", "autodiff", "finite-difference"]
"""Estimator of the trace in a likelihood. "auto" is the pipeline's trace model, else "finite-difference"."""

LikelihoodMethod = Literal["ode", "bound"]
"""How likelihoods of a dataset are computed: by `log_likelihood`, or by `likelihood_bound`."""

ChainVariance = Literal["optimal", "diagonal", "fixed_small", "fixed_large", "learned"]
"""Variance of the reverse chain of `likelihood_bound`."""

GuidanceEstimator = Literal["one-step", "direct", "finite-difference", "autodiff", "endpoint-centred", "endpoint"]
"""Estimator of the Fisher in guidance."""

Engine = Literal["processes", "ray"]
"""What runs the workers of a dataset's likelihood: the processes of one launch, or actors of Ray."""

RecordFile = Literal["jsonl", "parquet"]
"""Files of the records of a dataset's likelihood: JSON lines alone, or Parquet beside them."""

NoiseProjection = Literal["soft", "hard"]
"""How guidance brings its noise back to white noise after every step."""

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def settings_class(kind: type[Kind]) -> type[Kind]:
    """Makes a class a frozen dataclass that checks its values by its annotations, without converting their types.

    An integer may stand for a float. What several fields decide together is checked by `__post_init__`, which raises
    `InputError`.

    Returns:
        The class. `dataclasses.replace` and `dataclasses.asdict` work as for any dataclass.

    Raises:
        InputError: (when an object is made) a value that its field does not allow, or an unknown or missing field.
    """
    config = pydantic.ConfigDict(extra="forbid", strict=True)
    checked_kind: Any = pydantic.dataclasses.dataclass(kind, config=config, frozen=True)
    make = checked_kind.__init__

    @functools.wraps(make)
    def __init__(self: Kind, *args: Any, **kwargs: Any) -> None:
        try:
            make(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise input_error(error, checked_kind) from error

    checked_kind.__init__ = __init__
    return checked_kind


def input_error(error: pydantic.ValidationError, kind: type, source: str | None = None) -> InputError:
    """Says in the package's words what pydantic found wrong with the values for the settings class `kind`.

    Args:
        source: the file that the values come from; None: they come from code or from the command line.
    """
    words = [_describe_mistake(mistake, kind) for mistake in error.errors(include_url=False)]
    return InputError(" ".join([f"{source}:", *words] if source else words))


def _describe_mistake(mistake: ErrorDetails, kind: type) -> str:
    positions: dict[int | str, str] = dict(enumerate(_fields(kind)))  # a place may be the position of an argument
    path = [positions.get(part, str(part)) if number == 0 else str(part) for number, part in enumerate(mistake["loc"])]
    value = mistake["input"]
    place = f"`{'.'.join(path)}`" if path else "it"
    match mistake["type"]:
        case "unexpected_keyword_argument":
            return f"{place} is an unknown key; allowed: {_keys(kind, path[:-1])}."
        case "missing":
            return f"{place} is missing and has no default; add it."
        case "dataclass_type":
            return f"{place} is {value!r} ({type(value).__name__}); allowed: a mapping with keys {_keys(kind, path)}."
        case "value_error":
            return f"{place}: {mistake['ctx']['error']}" if path else str(mistake["ctx"]["error"])
        case problem:
            got = f"{value!r} ({type(value).__name__})" if problem.endswith("_type") else repr(value)
            return f"{place} is {got}; allowed: {mistake['msg'].removeprefix('Input should be ')}."


def _keys(kind: type, path: Iterable[str]) -> str:
    """Returns the keys of a section, in words."""
    for name in path:
        hint = typing.get_type_hints(kind)[name]
        kind = next(each for each in (hint, *typing.get_args(hint)) if hasattr(each, "__dataclass_fields__"))
    return ", ".join(sorted(_fields(kind)))


def _fields(kind: type) -> list[str]:
    return list(getattr(kind, "__dataclass_fields__", {}))
