"""What outputs become outside of PyTorch: plain values for JSON, and a pandas table with one row per sample."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    import pandas

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]
"""Values that JSON has."""


class OutputTable:
    """Adds `to_dict` and `to_pandas` to a dataclass of results."""

    SAMPLE_COLUMNS: ClassVar[tuple[str, ...]]
    """Fields and properties with one value per sample: the columns of the table. One that is None is left out."""

    def to_dict(self) -> dict[str, Plain]:
        """Returns all fields, and the columns of `to_pandas`, as values that `json.dumps` writes.

        Tensors become nested lists. Numbers that are not finite become None, because JSON has none. Images and other
        objects are left out.
        """
        names = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]  # subclasses are dataclasses
        values = {name: getattr(self, name) for name in dict.fromkeys((*self.SAMPLE_COLUMNS, *names))}
        return {name: _plain(value) for name, value in values.items() if _is_plain(value)}

    def to_pandas(self) -> pandas.DataFrame:
        """Returns a table with one row per sample. The columns have the names and the units of the fields."""
        import pandas

        values = {name: getattr(self, name) for name in self.SAMPLE_COLUMNS}
        return pandas.DataFrame(
            {
                name: value.tolist() if isinstance(value, torch.Tensor) else value
                for name, value in values.items()
                if value is not None
            }
        )


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    return value is None or isinstance(value, (bool, int, float, str, torch.Tensor))


def _plain(value: object) -> Plain:
    if isinstance(value, torch.Tensor):
        return _plain(value.detach().cpu().tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return typing.cast(Plain, value)  # one of the other kinds of `_is_plain`
