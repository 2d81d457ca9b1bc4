"""Turns images and captions into what a denoiser takes."""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

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
        device = self.backbone.device
        pieces = [self.backbone.encode(pixels_of(piece).to(device)) for piece in data.split(self.piece_size)]
        stacks = [(mean, torch.zeros_like(mean) if deviation is None else deviation) for mean, deviation in pieces]
        return torch.cat([torch.stack(stack, dim=1) for stack in stacks])

    def pixels(self, data: torch.Tensor) -> torch.Tensor:
        """Returns images (n, C, H, W) in [0, 1]: the data, or cached latents decoded by the autoencoder."""
        if not self.latents:
            return data
        sides = (data.shape[-2] * self.backbone.factor, data.shape[-1] * self.backbone.factor)
        return torch.cat([self.backbone.decode(piece, sides) for piece in self.pack(data).split(self.piece_size)])

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Returns scaled latents (n, C, h, w) of images in [0, 1], in the pipeline's layout."""
        return dataclasses.replace(self, latents=False).pack(pixels)

    def pack(self, data: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Returns samples in the layout of the pipeline's latents.

        Args:
            noise: (n, C, h, w) standard normal noise, by which samples are drawn from the autoencoder's posterior, as
                denoisers are trained. None: the means of the posterior, which `log_likelihood` takes.
        """
        mean, deviation = self.moments(data).unbind(1)
        return self.backbone.pack(mean if noise is None else mean + deviation * noise.to(mean))

    def draw(self, data: torch.Tensor, generator: torch.Generator | list[torch.Generator]) -> torch.Tensor:
        """Returns samples drawn from the autoencoder's posterior, on which denoisers are trained.

        Args:
            generator: a generator on the CPU, or one per sample.
        """
        return self.pack(data, randn_tensor((len(data), *self.unpacked_shape(data)), generator))

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
        return unguided_denoiser(self.backbone, like, self.backbone.unguided_scale({}), prompts, {})


def drop_captions(captions: Sequence[Caption], mask: torch.Tensor) -> list[Caption]:
    """Replaces the captions of `mask` by the empty prompt, as denoisers are trained. Labels and None stay."""
    return ["" if drop and isinstance(text, str) else text for text, drop in zip(captions, mask, strict=True)]
