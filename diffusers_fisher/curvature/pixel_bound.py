"""A bound in pixels for models in latents: a bound of the latents, and the terms of the decoder and of the encoder.

Notation: q(z|x) is the encoder's normal law of the scaled latents, and p(x|z) = N(decoder(z), tau^2) independently for
every pixel in -1..1. -log p(x) is at most E_q[-log p(x|z)] + E_q[log q(z|x)] + E_q[-log p(z)].
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..arguments import check_kinds
from ..backbones import Backbone, backbone_of
from ..backbones.base import Generators
from ..backbones.conditions import Condition
from ..errors import InputError, NumericalError, UnsupportedError
from ..images import UNIT_RANGE, ImageLike, image_tensor
from ..likelihood.bins import bin_positions
from ..likelihood.draws import ImageDraws
from ..likelihood.pipeline import pixel_keys
from ..outputs import OutputTable
from .pipeline import likelihood_bound
from .schedule_chain import bin_log_probability


@dataclasses.dataclass(frozen=True)
class PixelBound(OutputTable):
    """Holds upper bounds on the negative log-likelihoods of images in pixels. All tensors are float64 on the CPU.

    Args:
        value: (B,) nats, the sum of the three terms.
        standard_error: (B,) nats, from the scatter of the encodings; infinite for one.
        decoder_term: (B,) nats, mean of -log p(x|z).
        encoder_term: (B,) nats, mean of log q(z|x), minus the entropy of the encoding.
        latent_term: (B,) nats, mean of the bounds on -log p(z).
        decoder_variance: tau^2, variance of a pixel in -1..1 about the decoder's output.
        dims: number of pixels times channels.
        num_denoiser_calls: evaluations of the denoiser for the whole batch.
        density: "bins" (the probability of the images' bins) or "data" (a density of pixels in -1..1).
        variance: description of the reverse chain's variance.
    """

    SAMPLE_COLUMNS = ("bits_per_dim", "value", "standard_error", "decoder_term", "encoder_term", "latent_term")

    value: torch.Tensor
    standard_error: torch.Tensor
    decoder_term: torch.Tensor
    encoder_term: torch.Tensor
    latent_term: torch.Tensor
    decoder_variance: float
    dims: int
    num_denoiser_calls: int
    density: str
    variance: str

    @property
    def bits_per_dim(self) -> torch.Tensor:
        """value/(d ln 2), (B,) bits per pixel and channel."""
        return self.value / (self.dims * math.log(2))


@check_kinds
def fit_decoder_variance(
    pipe: DiffusionPipeline,
    images: ImageLike,
    *,
    generator: Generators = None,
    data_range: tuple[float, float] = UNIT_RANGE,
) -> float:
    """Returns the mean squared error of decoded encodings of images, per pixel in -1..1, for `pixel_likelihood_bound`.

    Args:
        images: images of the training data, other ones than those that are bounded.
        generator: gives the seed of the encodings.
        data_range: lowest and highest value of arrays and tensors of images.

    Raises:
        InputError: images that the pipeline does not take.
        UnsupportedError: a pipeline in pixels, or whose encoding is not random.
    """
    backbone = _latent_backbone(pipe)
    encoding = _Encoding(backbone, images, generator, data_range, None)
    return float((encoding.pixels - encoding.decode(encoding.latents(0))).square().mean())


@check_kinds
def pixel_likelihood_bound(
    pipe: DiffusionPipeline,
    images: ImageLike,
    prompt: Condition = None,
    *,
    decoder_variance: float,
    num_encodings: int = 4,
    bins: int | None = 256,
    generator: Generators = None,
    data_range: tuple[float, float] = UNIT_RANGE,
    image_keys: Sequence[str] | None = None,
    **options: Any,
) -> PixelBound:
    """Bounds the negative log-likelihoods of images in pixels, under a model in latents.

    The model draws latents from the reverse chain of `likelihood_bound`, and pixels about the decoder's output. An
    image's draws depend on the seed and on its key alone.

        variance = fit_decoder_variance(pipe, training_images)
        bound = pixel_likelihood_bound(pipe, images, "a photo of a coat", decoder_variance=variance)

    Args:
        images, prompt, data_range, image_keys: as in `likelihood_bound`.
        decoder_variance: tau^2, from `fit_decoder_variance`; above 0.
        num_encodings: number of latents that are drawn from the encoder for every image, each with noises of its own.
        bins: number of values of a pixel, 256 for 8 bits: the value is the probability of the image. None: that of a
            density of pixels in -1..1.
        generator: gives the seeds of all draws.
        **options: other arguments of `likelihood_bound`.

    Returns:
        `PixelBound`. Cost: `num_encodings` decodings and calls of `likelihood_bound`.

    Raises:
        InputError: a variance, a number or images that are not allowed; else as `likelihood_bound`.
        UnsupportedError: a pipeline in pixels, or whose encoding is not random.
        NumericalError: a bound that is not finite.
    """
    backbone = _latent_backbone(pipe)
    if decoder_variance <= 0 or num_encodings < 1:
        raise InputError(
            f"`decoder_variance` is {decoder_variance} and `num_encodings` {num_encodings}; allowed: above 0, and at "
            "least 1. `fit_decoder_variance` returns the variance for images of the training data."
        )
    if "latents" in options or "maps" in options:
        raise InputError("`latents` and `maps` have no use for a bound in pixels; pass `images` alone.")
    encoding = _Encoding(backbone, images, generator, data_range, image_keys)
    deviation = torch.tensor(math.sqrt(decoder_variance), dtype=torch.float64)
    places, width = (None, 0.0) if bins is None else bin_positions(encoding.pixels, bins)
    decoder, latent, bounds = [], [], []
    for number in range(num_encodings):
        z = encoding.latents(number)
        error = encoding.pixels - encoding.decode(z)
        if places is None:
            terms = (math.log(2 * math.pi * decoder_variance) + error.square() / decoder_variance) / 2
        else:
            terms = -bin_log_probability(places, error, deviation, width, bins or 0)
        decoder.append(terms.flatten(1).sum(1))
        keys = [f"{key}, encoding {number}" for key in encoding.keys]
        bounds.append(likelihood_bound(pipe, None, prompt, latents=z, generator=generator, image_keys=keys, **options))
        latent.append(bounds[-1].value)
    totals = torch.stack(decoder) + torch.stack(latent)
    encoder, value = encoding.log_density, totals.mean(0) + encoding.log_density
    if not torch.isfinite(value).all():
        raise NumericalError(f"Bounds in pixels are not finite: {value.tolist()}. Check `decoder_variance`.")
    error = totals.std(0) / num_encodings**0.5 if num_encodings > 1 else torch.full_like(value, torch.inf)
    return PixelBound(
        value, error, torch.stack(decoder).mean(0), encoder, torch.stack(latent).mean(0), decoder_variance,
        encoding.pixels[0].numel(), sum(bound.num_denoiser_calls for bound in bounds),
        "data" if bins is None else "bins", bounds[0].variance,
    )  # fmt: skip


class _Encoding:
    """Images (B, C, H, W) in -1..1, float64 on the CPU, and the encoder's normal law of their scaled latents."""

    def __init__(
        self, backbone: Backbone, images: ImageLike, generator: Generators, data_range: tuple[float, float],
        keys: Sequence[str] | None,
    ):  # fmt: skip
        pixels = image_tensor(images, backbone.size_multiple, backbone.image_channels, data_range)
        self.backbone, self.pixels = backbone, 2 * pixels.double() - 1
        self.keys = pixel_keys(pixels) if keys is None else list(keys)
        if len(self.keys) != len(pixels):
            raise InputError(f"{len(self.keys)} image keys were given for {len(pixels)} images; give as many.")
        with torch.no_grad():
            mean, deviation = backbone.encode((2 * pixels - 1).to(backbone.device))
        if deviation is None:
            raise UnsupportedError(f"The encoding of {backbone.name} is not random, so there is no bound in pixels.")
        self._mean, self._deviation = mean, deviation
        self._draws = ImageDraws(mean, generator, self.keys)

    @property
    def log_density(self) -> torch.Tensor:
        """Mean of log q(z|x), (B,) nats: minus the entropy."""
        return -((1 + math.log(2 * math.pi)) / 2 + self._deviation.cpu().double().log()).flatten(1).sum(1)

    def latents(self, number: int) -> torch.Tensor:
        """Returns the scaled latents (B, C, h, w) of one encoding."""
        return self._mean + self._deviation * self._draws.normal("encoding", number).to(self._mean)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Returns the decoder's output for scaled latents, (B, C, H, W) in about -1..1, float64 on the CPU."""
        return self.backbone.decode_scaled(latents).cpu().double()


def _latent_backbone(pipe: DiffusionPipeline) -> Backbone:
    backbone = backbone_of(pipe)
    if backbone.space == "pixel":
        raise UnsupportedError(f"{backbone.name} is in pixels itself; take `likelihood_bound`.")
    return backbone
