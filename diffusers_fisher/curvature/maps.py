"""Maps of samples, at the size of images."""

from __future__ import annotations

import torch

from ..errors import InputError


def repeat_by_pixel(
    maps: torch.Tensor | None, height: int, width: int, function: str, shared: bool = False
) -> torch.Tensor:
    """Returns maps (B, C, h, w) with one entry per pixel, (B, C, height, width).

    Args:
        height, width: size of the images, multiples of that of the maps.
        function: name of the function that makes the maps, for the message.
        shared: whether the pixels of a latent share its value equally, so that sums stay the same; else each has the
            latent's value.

    Raises:
        InputError: there are no maps (B, C, h, w), or a size that is no multiple of theirs.
    """
    shape = None if maps is None else tuple(maps.shape)
    if maps is None or maps.ndim != 4 or height % maps.shape[2] or width % maps.shape[3]:
        raise InputError(
            f"The maps are {shape} for images of {height}x{width} pixels; allowed: maps (B, C, h, w), of whose "
            f"sizes the images' are multiples. Pass `maps=True` to `{function}`."
        )
    rows, columns = height // maps.shape[2], width // maps.shape[3]
    values = maps / (rows * columns) if shared else maps
    return values.repeat_interleave(rows, 2).repeat_interleave(columns, 3)
