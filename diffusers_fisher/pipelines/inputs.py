"""Checks of what users pass to the pipelines' methods, before any long work."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

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


UNIT_RANGE = (0.0, 1.0)


def image_tensor(
    images: Any, multiple: int, channels: int = 3, data_range: tuple[float, float] = UNIT_RANGE
) -> torch.Tensor:
    """Images as (B, channels, H, W) float32 in [0, 1], checked; nothing is resized behind the caller's back.

    Arrays and tensors are in `data_range`, integers too where it is not [0, 1]; PIL images have their own.
    """
    import numpy
    from PIL.Image import Image

    if isinstance(images, Image):
        images = [images]
    low, high = data_range
    if not -math.inf < low < high < math.inf:
        raise InputError(f"`data_range` is {data_range}; allowed: two finite numbers, the lower first.")
    if isinstance(images, (list, tuple)) and any(isinstance(image, Image) for image in images):
        low, high = UNIT_RANGE
    if isinstance(images, (list, tuple)) and images:
        arrays = [_pil_array(image, channels) if isinstance(image, Image) else image for image in images]
        kinds = sorted({type(array).__name__ for array in arrays})
        if len(kinds) != 1 or not isinstance(arrays[0], (numpy.ndarray, torch.Tensor)):
            raise InputError(
                f"Images are a list of {', '.join(kinds)}; allowed: PIL images, arrays or tensors, of one kind."
            )
        shapes = sorted({tuple(array.shape) for array in arrays})
        if len(shapes) != 1:
            raise InputError(f"Images of one call must have one size, got {shapes}; call once a size.")
        images = torch.stack(arrays) if isinstance(arrays[0], torch.Tensor) else numpy.stack(arrays)
    if isinstance(images, (numpy.ndarray, torch.Tensor)) and images.ndim == 3:
        images = images[None]  # one image, as PIL images may be one
    tensor = images
    if isinstance(images, numpy.ndarray) and images.dtype.kind in "biuf":
        tensor = torch.from_numpy(numpy.ascontiguousarray(images))  # flipped arrays have negative strides
        tensor = tensor.permute(0, 3, 1, 2) if tensor.ndim == 4 else tensor
    if not isinstance(tensor, torch.Tensor) or tensor.ndim != 4 or tensor.shape[1] != channels or not len(tensor):
        shaped = isinstance(images, torch.Tensor) or tensor is not images
        got = f"of shape {tuple(images.shape)}" if shaped else f"a {type(images).__name__} {images!r:.40}"
        kind = "RGB as" if channels == 3 else "grey" if channels == 1 else "no"
        raise InputError(
            f"Images are {got}; allowed: {kind} PIL, array (B, H, W, {channels}) or tensor (B, {channels}, H, W)."
        )
    scaled = (low, high) != UNIT_RANGE
    if not (tensor.is_floating_point() or scaled) or not bool(((tensor >= low) & (tensor <= high)).all()):
        allowed = f"numbers in [{low}, {high}]" if scaled else "floating point in [0, 1]"
        advice = "Declare the range they are in" + ("." if scaled else ", such as `data_range=(0, 255)` or (-1, 1).")
        raise InputError(
            f"Images have dtype {tensor.dtype} and values from {float(tensor.min()):.4g} to "
            f"{float(tensor.max()):.4g}; allowed: {allowed}, without NaN. {advice}"
        )
    if scaled:
        tensor = (tensor.double() - low) / (high - low)
    if tensor.shape[2] % multiple or tensor.shape[3] % multiple:
        raise InputError(
            f"Images are {tensor.shape[2]}x{tensor.shape[3]} pixels; this checkpoint takes heights and widths that "
            f"are multiples of {multiple}. Resize or pad them first."
        )
    # So that every form gives the same bits: layouts have their own kernels. Of one channel `contiguous` keeps any.
    return tensor.float().clone(memory_format=torch.contiguous_format)


def eight_bit(image: Any, channels: int) -> Any:
    """A PIL image as grey (`channels` 1) or RGB. Raises `InputError` for modes that Pillow clips to 8 bits."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise InputError(
            f"The PIL image has mode '{image.mode}' (16 or 32 bits a pixel), whose values have no range of their own; "
            "allowed: 8-bit modes, such as L and RGB. Scale it to 8 bits first."
        )
    return image.convert("L" if channels == 1 else "RGB")


def _pil_array(image: Any, channels: int) -> Any:
    import numpy

    array = numpy.asarray(eight_bit(image, channels), dtype=numpy.float32) / 255
    return array[..., None] if channels == 1 else array
