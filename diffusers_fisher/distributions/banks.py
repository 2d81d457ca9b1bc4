"""Banks of points: in a tensor, or in files larger than memory that are read in slices of rows."""

from __future__ import annotations

import abc
import os
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy
import torch
from safetensors import safe_open

from ..errors import CheckpointError, InputError
from ..files import check_safetensors

BANK_SUFFIXES = (".npy", ".safetensors")
Points = torch.Tensor | numpy.ndarray | str | os.PathLike | Sequence[str | os.PathLike]
"""Points in memory, the path of a file of points, or several paths."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMPY_FLOATS = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
_SAFETENSORS_FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class Bank(abc.ABC):
    """Base class of banks: points in rows, which `read` gives in slices.

    Attributes:
        count: number of points.
        shape: shape of one point.
        dtype: dtype of the points.
    """

    count: int
    shape: torch.Size
    dtype: torch.dtype

    @abc.abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Returns the rows from `start` to before `stop`, (n, *shape). The caller must not change them."""

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the rows with `indices` (n,), as (n, *shape). Cost: one read per row."""
        return torch.cat([self.read(index, index + 1) for index in indices.tolist()])


class TensorBank(Bank):
    """Holds points (N, *shape) in memory, on any device. The tensor is not copied: do not change it."""

    def __init__(self, points: torch.Tensor):
        self.count, self.shape, self.dtype = len(points), points.shape[1:], points.dtype
        self._points = points.detach()

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self._points[start:stop]

    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        return self._points[indices.to(self._points.device)]


class ArrayBank(Bank):
    """Reads points from a `numpy.memmap` that the caller opened. The system may keep the read pages in memory."""

    def __init__(self, points: numpy.ndarray):
        self.count, self.shape = len(points), torch.Size(points.shape[1:])
        self.dtype = _numpy_dtype(points, "The array of points")
        self._points = points

    def read(self, start: int, stop: int) -> torch.Tensor:
        return torch.from_numpy(numpy.array(self._points[start:stop]))


class FileBank(Bank):
    """Reads points from one or more `.npy` and `.safetensors` files, whose rows follow each other.

    Every slice opens its file and closes it again, so that no page stays mapped: the memory used is that of one slice.

    Args:
        paths: files of (N_i, *shape) points; all files have the same shape and dtype.
        name: name of the tensor in safetensors files; None: the files hold one tensor each.

    Raises:
        CheckpointError: a file is missing, truncated or of another kind.
        InputError: files have different shapes or dtypes, `name` is None for a file without exactly one tensor, or a
            dtype is not floating point.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], name: str | None = None):
        self._parts = [_Part(Path(path), name) for path in paths]
        if not self._parts:
            raise InputError("The bank has no file. Pass at least one path.")
        first = self._parts[0]
        for part in self._parts:
            if (part.shape, part.dtype) != (first.shape, first.dtype):
                raise InputError(
                    f"'{part.path}' holds points of shape {tuple(part.shape)} and dtype {part.dtype}, '{first.path}' "
                    f"of shape {tuple(first.shape)} and dtype {first.dtype}. All files of one bank must agree."
                )
        self.count, self.shape, self.dtype = sum(part.count for part in self._parts), first.shape, first.dtype

    def read(self, start: int, stop: int) -> torch.Tensor:
        pieces = []
        for part in self._parts:
            if start < part.count and stop > 0:
                pieces.append(part.read(max(start, 0), min(stop, part.count)))
            start, stop = start - part.count, stop - part.count
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class _Part:
    """Reads one file of a bank."""

    def __init__(self, path: Path, name: str | None):
        self.path, self.name = path, name
        if path.suffix == ".npy":
            array = self._map()
            shape, self.dtype = array.shape, _numpy_dtype(array, f"'{path}'")
        elif path.suffix == ".safetensors":
            check_safetensors(path)
            with safe_open(path, framework="pt") as file:
                self.name = _tensor_name(path, list(file.keys()), name)
                piece = file.get_slice(self.name)
                shape, kind = tuple(piece.get_shape()), piece.get_dtype()
            if kind not in _SAFETENSORS_FLOATS:
                raise InputError(f"'{path}' holds points of dtype {kind}; allowed: {', '.join(_SAFETENSORS_FLOATS)}.")
            self.dtype = _SAFETENSORS_FLOATS[kind]
        else:
            raise InputError(f"'{path}' is not a bank of points; supported: .npy and .safetensors files.")
        self.count, self.shape = (shape[0] if shape else 0), torch.Size(shape[1:])

    def read(self, start: int, stop: int) -> torch.Tensor:
        if self.path.suffix == ".npy":
            return torch.from_numpy(numpy.array(self._map()[start:stop]))
        with safe_open(self.path, framework="pt") as file:
            return file.get_slice(self.name)[start:stop]

    def _map(self) -> numpy.ndarray:
        try:
            # Unlike `numpy.load`, this reads neither pickles nor zip archives.
            return numpy.lib.format.open_memmap(self.path, mode="r")
        # NumPy parses the header as Python's tokens and literals, and lets the errors of both out.
        except (OSError, ValueError, TypeError, SyntaxError, OverflowError, RecursionError, TokenError) as error:
            raise CheckpointError(
                f"Bank file '{self.path}' can't be mapped as .npy: {error}. The file may be missing or truncated."
            ) from error


def as_bank(points: Points, name: str | None = None) -> Bank:
    """Returns a `Bank` of the points.

    Args:
        points: a tensor, an array, a path, or a sequence of paths.
        name: name of the tensor in safetensors files; None: the files hold one tensor each.

    Raises:
        InputError: there is no point, points have no dimension, or the dtype is not floating point.
    """
    if isinstance(points, torch.Tensor):
        bank: Bank = TensorBank(points) if points.ndim else TensorBank(points[None])
    elif isinstance(points, numpy.memmap):
        bank = ArrayBank(points)
    elif isinstance(points, numpy.ndarray):
        bank = TensorBank(torch.from_numpy(points.copy()))
    else:
        bank = FileBank([points] if isinstance(points, str | os.PathLike) else list(points), name)
    if bank.dtype not in FLOATS:
        raise InputError(f"Points have dtype {bank.dtype}; allowed: {', '.join(map(str, FLOATS))}.")
    if not bank.count or not bank.shape.numel() or not len(bank.shape):
        raise InputError(
            f"The bank holds {bank.count} points of shape {tuple(bank.shape)}; allowed: (N, *shape) with at least one "
            "point, of at least one dimension."
        )
    return bank


def _numpy_dtype(array: numpy.ndarray, name: str) -> torch.dtype:
    if array.dtype.name not in _NUMPY_FLOATS or not array.dtype.isnative:
        raise InputError(f"{name} has dtype {array.dtype}; allowed: {', '.join(_NUMPY_FLOATS)} in native byte order.")
    return _NUMPY_FLOATS[array.dtype.name]


def _tensor_name(path: Path, names: list[str], name: str | None) -> str:
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        raise InputError(f"`name` is {name!r}; '{path}' holds {', '.join(names) or 'no tensor'}. Pass such a name.")
    return str(name)
