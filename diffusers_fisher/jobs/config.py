"""YAML configuration files read into dataclasses; unknown and missing keys are refused."""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import InputError

Config = TypeVar("Config")


def build_config(kind: type[Config], values: Any, where: str = "config") -> Config:
    """Builds dataclass `kind` from nested mappings.

    Raises:
        InputError: unknown key, missing key, or a value of another type than the field's.
    """
    if not isinstance(values, dict):
        raise InputError(f"{where} must be a mapping of {kind.__name__} fields, got {type(values).__name__}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise InputError(f"{where} has unknown keys {unknown}; allowed: {sorted(fields)}.")
    hints = typing.get_type_hints(kind)
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(values[name], hints[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where} lacks the key '{name}'; required keys have no default in {kind.__name__}.")
    return kind(**arguments)


def _convert(value: Any, hint: Any, where: str) -> Any:
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    section = next((kind for kind in allowed if dataclasses.is_dataclass(kind)), None)
    if section is not None and value is not None:
        return build_config(section, value, where)  # type: ignore[arg-type]
    allowed = tuple(typing.get_origin(kind) or kind for kind in allowed)
    if float in allowed and type(value) is int:
        return float(value)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = ", ".join(kind.__name__ for kind in allowed)
        raise InputError(f"{where} is {value!r} ({type(value).__name__}); allowed: {names}.")
    return value


def load_config(path: str | os.PathLike, kind: type[Config], changes: Sequence[str] = ()) -> Config:
    """Reads a YAML file into dataclass `kind`.

    Args:
        changes: "key.key=value" in YAML, in place of what the file says.

    Raises:
        InputError: names the file and the key at fault.
    """
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"Config file '{path}' can't be read: {error}") from error
    for change in changes:
        _change(values, change)
    return build_config(kind, values, where=str(path))


def _change(values: Any, change: str) -> None:
    """Sets "key.key=value" in nested mappings; a section that is missing or none is made."""
    import yaml

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
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"The change '{change}' has a value that is no YAML: {error}") from error


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with keys "section.key"."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flat_settings(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
