"""Scaled latents as the autoencoder's decoder takes them, and images of them: what the stock calls do at their end."""

from __future__ import annotations

from typing import Any

import torch


def standardises(pipe: Any) -> bool:
    """Whether the pipeline's calls use the `latents_mean` and `latents_std` of an autoencoder that has them."""
    return type(pipe).__name__.startswith("StableDiffusionXL")


def latent_moments(vae: Any, like: torch.Tensor) -> tuple[Any, Any]:
    """Mean and standard deviation a channel by which some autoencoders' latents are standardised; else 0 and 1."""
    config = vae.config
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return 0.0, 1.0
    mean, deviation = (torch.tensor(config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean.to(like), deviation.to(like)


def decoded(vae: Any, latents: torch.Tensor, standardised: bool = False) -> torch.Tensor:
    """What the autoencoder makes of scaled latents (B, C, h, w), about -1 to 1, in its dtype.

    Args:
        standardised: see `standardises`; otherwise by the config's shift factor, where it has one.
    """
    scale = vae.config.scaling_factor
    if standardised:
        mean, deviation = latent_moments(vae, latents)
        own = latents * deviation / scale + mean
    else:
        own = latents / scale + (getattr(vae.config, "shift_factor", None) or 0.0)
    return vae.decode(own.to(vae.dtype)).sample


def images_of(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) float32 in [0, 1] of what is about -1 to 1."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1)
