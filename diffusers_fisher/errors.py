"""The exceptions of the package, and checks of tensors. Each exception also inherits a fitting builtin exception."""

from __future__ import annotations

import pathlib
import sys
import types
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class FisherError(Exception):
    """Base class of every error that `diffusers_fisher` raises on purpose."""


class InputError(FisherError, ValueError):
    """An argument has a wrong value, shape or type. The message says what was got and what is allowed."""


class UnsupportedError(FisherError, TypeError):
    """A scheduler, prediction type or pipeline is not supported. The message lists the supported ones."""


class CheckpointError(FisherError, OSError):
    """A checkpoint file is missing, truncated or of another kind."""


class TrajectoryError(FisherError, RuntimeError):
    """A differentiable sampling run can't be continued or differentiated."""


class NumericalError(FisherError, ArithmeticError):
    """A result is NaN or infinite. The library never returns NaN without this error."""


class CoarseGridWarning(UserWarning):
    """The discretisation error of a likelihood is large. The message says how large; use more steps."""


class TraceModelWarning(UserWarning):
    """A trace model disagrees with differences of its denoiser. The message says for how many samples."""


class DistilledNetworkWarning(UserWarning):
    """A likelihood was asked of a network that looks distilled to few steps. The message says what shows it."""


class ProbeNoiseWarning(UserWarning):
    """More random probes did not bring the standard error of a likelihood as low as was asked."""


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the user's line: the nearest one that is neither this package's nor a decorator's of torch."""
    frame: types.FrameType | None = sys._getframe(1)
    level = 2  # of this function's caller
    while frame is not None and _is_internal(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_internal(frame: types.FrameType) -> bool:
    file = pathlib.Path(frame.f_code.co_filename)
    return file.is_relative_to(pathlib.Path(__file__).parent) or file.match("torch/utils/_contextlib.py")


def check_shape(name: str, shape: tuple[int, ...], allowed: tuple[int, ...], advice: str) -> None:
    """Raises `InputError` unless `shape`, that of the tensor `name`, is `allowed`; `advice` says what to pass."""
    if tuple(shape) != tuple(allowed):
        raise InputError(f"{name} has shape {tuple(shape)}; allowed: {tuple(allowed)}. {advice}")


def describe_change(before: torch.Tensor, after: torch.Tensor) -> str:
    """Says for a message how the tensor `after` differs from `before`: in its shape, its dtype, or by how much."""
    if after.shape != before.shape:
        return f"of shape {tuple(after.shape)} where the step returned {tuple(before.shape)}"
    if after.dtype != before.dtype:
        return f"in {after.dtype} where the step returned {before.dtype}"
    left, right = before.detach().double(), after.detach().double()
    size = float((right - left).norm() / left.norm().clamp_min(1e-30))
    return f"by {size:.2g} of their size"


def check_floats(name: str, tensor: torch.Tensor) -> None:
    """Raises `InputError` unless `tensor`, called `name`, has real floating-point numbers."""
    import torch  # here, because most uses of this module need none

    if not isinstance(tensor, torch.Tensor):
        raise InputError(f"{name}: got a {type(tensor).__name__}; allowed: a tensor of floating-point numbers.")
    if not tensor.is_floating_point():
        raise InputError(f"{name}: got dtype {tensor.dtype}; allowed: real floating-point numbers, such as float32.")
