"""From pixels to scaled latents and back, as the stock calls do it with their autoencoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
    from diffusers.models.autoencoders.vq_model import VQModel


def encode_pixels(
    autoencoder: AutoencoderKL | AutoencoderTiny, pixels: torch.Tensor, standardises: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns mean and standard deviation of scaled latents, (B, C, h, w) float32 each.

    Args:
        pixels: (B, 3, H, W) in [-1, 1].
        standardises: see `latent_moments`.

    The deviation is None for autoencoders whose latents have no distribution.
    """
    result = autoencoder.encode(pixels.to(autoencoder.dtype))
    posterior = result.get("latent_dist")
    mean = (result[0] if posterior is None else posterior.mode()).float()
    shift, deviation = latent_moments(autoencoder, mean, standardises)
    factor = autoencoder.config["scaling_factor"] / deviation
    return (mean - shift) * factor, None if posterior is None else posterior.std.float() * factor


def decode_latents(autoencoder: AutoencoderKL | VQModel, latents: torch.Tensor, standardises: bool) -> torch.Tensor:
    """Returns pixels, about -1 to 1, of scaled latents (B, C, h, w), in the autoencoder's dtype.

    Args:
        standardises: see `latent_moments`.
    """
    shift, deviation = latent_moments(autoencoder, latents, standardises)
    unscaled = latents * deviation / autoencoder.config["scaling_factor"] + shift
    return autoencoder.decode(unscaled.to(autoencoder.dtype)).sample


def latent_moments(
    autoencoder: AutoencoderKL | AutoencoderTiny | VQModel, like: torch.Tensor, standardises: bool
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Returns the shift of the latents, and the divisor that they have beside the scaling factor.

    Args:
        like: tensor with the dtype and device of the result.
        standardises: take the autoencoder's `latents_mean` and `latents_std` per channel, where it has them (else 0
            and 1); False: take its shift factor, and 1.
    """
    config = autoencoder.config
    if not standardises:
        return config.get("shift_factor") or 0.0, 1.0
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return 0.0, 1.0
    mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean.to(like), deviation.to(like)


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    """Returns the pixels in [-1, 1] of images in [0, 1]."""
    return 2 * images - 1


def images_of(pixels: torch.Tensor) -> torch.Tensor:
    """Returns images (B, 3, H, W) float32 in [0, 1] of pixels that are about -1 to 1."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
