"""Turns images and captions into what a denoiser takes."""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..backbones import Backbone, PipelineDenoiser, backbone_of
from ..backbones.autoencoder import pixels_of
from ..data import Caption
from ..errors import InputError
from ..likelihood.pipeline import unguided_denoiser


@dataclasses.dataclass(frozen=True)
class SampleSpace:
    """Makes a pipeline's samples for training.

    Args:
        pipe: one of the package's pipelines.
        latents: whether the data are cached latents instead of images.
        piece_size: number of samples that the autoencoder takes at once.
    """

    pipe: DiffusionPipeline
    latents: bool
    piece_size: int = 16

    @functools.cached_property
    def backbone(self) -> Backbone:
        """The pipeline's typed face."""
        return backbone_of(self.pipe)

    @torch.no_grad()
    def moments(self, data: torch.Tensor) -> torch.Tensor:
        """Returns mean and standard deviation of scaled latents, (n, 2, C, h, w) float32 on the pipeline's device.

        The deviation is that of the autoencoder's posterior; it is zero if encoding is not random.

        Args:
            data: pixels (n, C, H, W) in [0, 1], or cached moments, which are returned as they are.

        Raises:
            InputError: the pipeline does not take images of this size.
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

    def _moments(self, images: torch.Tensor) -> torch.Tensor:
        mean, deviation = self.backbone.encode(pixels_of(images).to(self.backbone.device))
        return torch.stack([mean, torch.zeros_like(mean) if deviation is None else deviation], dim=1)

    def pixels(self, data: torch.Tensor) -> torch.Tensor:
        """Returns images (n, C, H, W) in [0, 1]: the data, or cached latents decoded by the autoencoder."""
        if not self.latents:
            return data
        sides = (data.shape[-2] * self.backbone.factor, data.shape[-1] * self.backbone.factor)
        return torch.cat([self.backbone.decode(piece, sides) for piece in self.packed(data).split(self.piece_size)])

    def encoded(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns scaled latents (n, C, h, w) of images in [0, 1], in the pipeline's layout."""
        pieces = [self._moments(piece)[:, 0] for piece in pixels.split(self.piece_size)]
        return self.backbone.pack(torch.cat(pieces))

    def packed(self, data: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Returns samples in the layout of the pipeline's latents.

        Args:
            noise: (n, C, h, w) standard normal noise, by which samples are drawn from the autoencoder's posterior, as
                denoisers are trained. None: the means of the posterior, which `log_likelihood` takes.
        """
        mean, deviation = self.moments(data).unbind(1)
        return self.backbone.pack(mean if noise is None else mean + deviation * noise.to(mean))

    def unpacked_shape(self, data: torch.Tensor) -> tuple[int, ...]:
        """Returns the shape (C, h, w) of samples made of `data`."""
        sides = [side // (1 if self.latents else self.backbone.factor) for side in data.shape[-2:]]
        return (self.backbone.latent_channels, *sides)

    def denoiser(self, captions: Sequence[Caption], data: torch.Tensor, copies: int = 1) -> PipelineDenoiser:
        """Returns the denoiser of `log_likelihood` with the captions as its conditions.

        If the pipeline takes text, a missing caption (None) is the empty prompt.

        Args:
            data: the data of the samples, which gives their shape.
            copies: number of copies of every sample.

        Raises:
            InputError: the pipeline does not take these captions or labels.
        """
        like = torch.empty(len(captions) * copies, *self.unpacked_shape(data), device="meta")
        missing = "" if self.backbone.takes_text else None
        prompts: list[Caption] | None = None
        if any(caption is not None for caption in captions):
            prompts = [missing if caption is None else caption for caption in captions] * copies
        backbone = self.backbone
        return unguided_denoiser(backbone, like, backbone.unguided_scale({}), prompts, {})


def without(captions: Sequence[Caption], dropped: torch.Tensor) -> list[Caption]:
    """Replaces the `dropped` captions by the empty prompt, as denoisers are trained. Labels and None stay."""
    return ["" if drop and isinstance(text, str) else text for text, drop in zip(captions, dropped, strict=True)]
