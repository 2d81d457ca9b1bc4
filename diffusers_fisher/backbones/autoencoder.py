"""From pixels to scaled latents and back, as the stock calls do it with their autoencoder."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vq_model import VQModel


def encode_pixels(
    autoencoder: AutoencoderKL, pixels: torch.Tensor, standardised: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of scaled latents, (B, C, h, w) float32 each, of pixels (B, 3, H, W) in [-1, 1].

    Args:
        standardised: use the autoencoder's `latents_mean` and `latents_std`, where it has them; else its shift factor.
    """
    posterior = autoencoder.encode(pixels.to(autoencoder.dtype)).latent_dist
    mean = posterior.mode().float()
    if standardised:
        shift, deviation = latent_moments(autoencoder, mean)
        factor = autoencoder.config["scaling_factor"] / deviation
    else:
        shift, factor = autoencoder.config.get("shift_factor") or 0.0, autoencoder.config["scaling_factor"]
    return (mean - shift) * factor, posterior.std.float() * factor


def decode_latents(
    autoencoder: AutoencoderKL | VQModel, latents: torch.Tensor, standardised: bool = False
) -> torch.Tensor:
    """Pixels, about -1 to 1, of scaled latents (B, C, h, w), in the autoencoder's dtype.

    Args:
        standardised: see `encode_pixels`.
    """
    scale = autoencoder.config["scaling_factor"]
    if standardised:
        mean, deviation = latent_moments(autoencoder, latents)
        own = latents * deviation / scale + mean
    else:
        own = latents / scale + (autoencoder.config.get("shift_factor") or 0.0)
    return autoencoder.decode(own.to(autoencoder.dtype)).sample


def latent_moments(
    autoencoder: AutoencoderKL | VQModel, like: torch.Tensor
) -> tuple[torch.Tensor | float, torch.Tensor | float]:
    """Mean and standard deviation per channel by which some autoencoders' latents are standardised; else 0 and 1."""
    config = autoencoder.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return 0.0, 1.0
    mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean.to(like), deviation.to(like)


def images_of(pixels: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) float32 in [0, 1] of pixels that are about -1 to 1."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
