"""From images and captions to what a denoiser takes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch

from ..backbones import Backbone, PipelineDenoiser, backbone_of
from ..errors import InputError
from ..likelihood.pipeline import unguided_denoiser


@dataclasses.dataclass(frozen=True)
class SampleSpace:
    """A pipeline's samples for training.

    Args:
        pipe: one of the package's pipelines.
        latents: whether the data are cached latents, not images.
        piece_size: samples that the autoencoder is given at a time.
    """

    pipe: Any
    latents: bool
    piece_size: int = 16

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The pipeline's typed face."""
        return backbone_of(self.pipe)

    @torch.no_grad()
    def moments(self, data: torch.Tensor) -> torch.Tensor:
        """Mean and standard deviation of scaled latents, (n, 2, C, h, w) float32 on the pipeline's device, of pixels
        (n, C, H, W) in [0, 1], or of cached moments themselves. The deviation is that of the autoencoder's posterior,
        zero where encoding is not random.

        Raises:
            InputError: sizes that the pipeline does not take.
        """
        if self.latents:
            return data.to(self.backbone.device, torch.float32)
        multiple = self.backbone.size_multiple
        if data.shape[-1] % multiple or data.shape[-2] % multiple:
            raise InputError(
                f"Images are {data.shape[-2]}x{data.shape[-1]} pixels; this pipeline takes multiples of {multiple}. "
                "Set `data.resolution`."
            )
        return torch.cat([self._moments(piece) for piece in data.split(self.piece_size)])

    def _moments(self, pixels: torch.Tensor) -> torch.Tensor:
        mean, deviation = self.backbone.encode((2 * pixels - 1).to(self.backbone.device))
        return torch.stack([mean, torch.zeros_like(mean) if deviation is None else deviation], dim=1)

    def pixels(self, data: torch.Tensor) -> torch.Tensor:
        """Images (n, C, H, W) in [0, 1]: the data, or what the autoencoder makes of cached latents."""
        if not self.latents:
            return data
        sides = tuple(side * self.backbone.factor for side in data.shape[-2:])
        return torch.cat([self.backbone.decode(piece, sides) for piece in self.packed(data).split(self.piece_size)])

    def encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Scaled latents (n, C, h, w) of images in [0, 1], in the pipeline's layout."""
        pieces = [self._moments(piece)[:, 0] for piece in pixels.split(self.piece_size)]
        return self.backbone.pack(torch.cat(pieces))

    def packed(self, data: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Samples in the layout of the pipeline's own latents: drawn from the posterior by standard normal `noise`
        (n, C, h, w), as denoisers are trained, or its means, which `log_likelihood` takes."""
        mean, deviation = self.moments(data).unbind(1)
        return self.backbone.pack(mean if noise is None else mean + deviation * noise.to(mean))

    def unpacked_shape(self, data: torch.Tensor) -> tuple[int, ...]:
        """(C, h, w) of samples made of `data`."""
        sides = [side // (1 if self.latents else self.backbone.factor) for side in data.shape[-2:]]
        return (self.backbone.latent_channels, *sides)

    def denoiser(self, captions: Sequence[Any], data: torch.Tensor, copies: int = 1) -> PipelineDenoiser:
        """The denoiser of `log_likelihood`, conditioned on the captions, for `copies` of samples made of `data`.
        Where the pipeline takes text, a missing caption (None) is the empty prompt.

        Raises:
            InputError: captions or labels that the pipeline does not take.
        """
        like = torch.empty(len(captions) * copies, *self.unpacked_shape(data), device="meta")
        prompts = None if all(caption is None for caption in captions) else list(captions) * copies
        if prompts is not None and hasattr(self.pipe, "tokenizer"):
            prompts = ["" if prompt is None else prompt for prompt in prompts]
        backbone = self.backbone
        return unguided_denoiser(backbone, like, backbone.unguided_scale({}), prompts, {})


def without(captions: Sequence[Any], dropped: torch.Tensor) -> list[Any]:
    """Captions of which some are left out, as in a denoiser's own training; class labels and none stay."""
    return ["" if drop and isinstance(text, str) else text for text, drop in zip(captions, dropped, strict=True)]
