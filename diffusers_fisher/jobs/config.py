"""YAML configuration files read into settings classes; unknown and missing keys are refused."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml

from ..errors import InputError
from ..settings import input_error

Config = TypeVar("Config")


def build_config(kind: type[Config], values: object, source: str = "config") -> Config:
    """Builds the settings class `kind` from nested mappings.

    Args:
        values: values that YAML has: mappings, lists, numbers, texts, truth values and nulls.
        source: the file that the values come from, for messages.

    Raises:
        InputError: an unknown key, a missing key, or a value that its field does not allow.
    """
    try:
        text = json.dumps(
            values, default=str
        )  # in JSON a mapping may stand for a settings class; in Python it may not
        return pydantic.TypeAdapter(kind).validate_json(text)
    except pydantic.ValidationError as error:
        raise input_error(error, kind, source) from error
    # Keys may be no texts, and a section may contain itself.
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{source}: the settings are not a tree of keys and values: {error}. See configs/."
        ) from error


def load_config(path: str | os.PathLike, kind: type[Config], changes: Sequence[str] = ()) -> Config:
    """Reads a YAML file into the settings class `kind`.

    Args:
        changes: entries "key.key=value", with the value in YAML, that replace what the file says.

    Raises:
        InputError: names the file and the key at fault.
    """
    path = Path(path)
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise InputError(f"Config file '{path}' can't be read: {error}. Write it as YAML in UTF-8.") from error
    for change in changes:
        _change(values, change)
    return build_config(kind, values, source=str(path))


def _change(values: object, change: str) -> None:
    """Sets "key.key=value" in nested mappings. A section that is missing or null is made."""
    path, equals, text = change.partition("=")
    *sections, key = path.split(".")
    if not equals or not key or not isinstance(values, dict):
        raise InputError(f"The change '{change}' is not of the form key.key=value.")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise InputError(f"The change '{change}': '{section}' is a value, not a section.")
    try:
        values[key] = _parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"The change '{change}' has a value that is not YAML: {error}") from error


def _parse_yaml(text: str) -> object:
    """Parses YAML. Raises `yaml.YAMLError` for every other text."""
    try:
        return yaml.safe_load(text)
    # Tags such as !!int and !!timestamp convert any text that follows, and lists may lie within lists without end.
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from error


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested settings to one mapping with keys "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
