"""How the runs of a guidance decode their latents: at the images' size, or smaller in cheap runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from ..backbones import Backbone
from ..errors import InputError
from .phases import CheapRuns

Decoder = Callable[[torch.Tensor], torch.Tensor]
"""A differentiable function from latents (B, ...) in the pipeline's layout to images (B, 3, H, W) in [0, 1]."""


@dataclasses.dataclass(frozen=True)
class Decoders:
    """Decodes latents, with a graph where they have one.

    Args:
        backbone: a backbone with the autoencoder.
        pixels: height and width of the images.
        small_pixels: height and width of the images of cheap runs, whose ratio to `pixels` is a whole number.
    """

    backbone: Backbone
    pixels: tuple[int, int]
    small_pixels: tuple[int, int]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images of `pixels`."""
        return self.backbone.decode(latents, self.pixels)

    def decode_small(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns images of `small_pixels`, decoded from the means of squares of latents."""
        factor = self.pixels[0] // self.small_pixels[0]
        if factor == 1:
            return self.decode(latents)
        means = F.avg_pool2d(self.backbone.unpack(latents, self.pixels), factor)
        return self.backbone.decode(self.backbone.pack(means), self.small_pixels)


def smaller_size(
    backbone: Backbone, pixels: tuple[int, int], downscale: int, cheap: CheapRuns | None
) -> tuple[int, int]:
    """Returns height and width of the images of cheap runs.

    Args:
        pixels: height and width of the images.
        downscale: `reward_downscale` of `guide`.
        cheap: the cheap runs, if there are any.

    Raises:
        InputError: there are none, or the smaller size is none of the pipeline's.
    """
    multiple = downscale * backbone.size_multiple
    if downscale < 1 or any(side % multiple for side in pixels):
        raise InputError(
            f"`reward_downscale` is {downscale}; allowed: 1, or a number by which the {pixels[0]}x{pixels[1]} pixels "
            f"become multiples of {backbone.size_multiple}."
        )
    if downscale > 1 and cheap is None:
        raise InputError(
            f"`reward_downscale` is {downscale}, which is for runs of fewer steps, because the images come from runs "
            "of full size. Give `num_guidance_inference_steps` too, such as 5, or leave it out."
        )
    height, width = pixels
    return height // downscale, width // downscale
