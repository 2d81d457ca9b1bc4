"""Checks of a pipeline's networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import UnsupportedError

NETWORKS = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "decoder",
    "unconditional_unet",
    "unconditional_transformer",
)
"""Names that pipelines of diffusers give to their denoising networks."""


def denoising_networks(components: Mapping[str, object]) -> dict[str, torch.nn.Module]:
    """Returns the denoising networks of a pipeline's components by name; some have one per range of levels."""
    return {name: part for name in NETWORKS if isinstance(part := components.get(name), torch.nn.Module)}


def check_weights(network: object) -> None:
    """Refuses to differentiate a network whose weights autograd does not accept. Raises `UnsupportedError`."""
    if isinstance(network, torch.nn.Module) and any(parameter.is_inference() for parameter in network.parameters()):
        raise UnsupportedError(
            f"The weights of {type(network).__name__} were made under torch.inference_mode, so nothing can be "
            "differentiated through them. Load the pipeline outside of it; under torch.no_grad it may be loaded."
        )


def check_latents_alone(pipeline: str, channels: int, autoencoder: Any) -> None:
    """Refuses a network that takes more channels than latents have. Raises `UnsupportedError`.

    Args:
        channels: channels of the network's input.
        autoencoder: the pipeline's autoencoder, of any class of diffusers; None where there is none.
    """
    expected = channels if autoencoder is None else autoencoder.config.get("latent_channels", channels)
    if expected != channels:
        raise UnsupportedError(
            f"The network of {pipeline} takes {channels} channels, but latents of its autoencoder have {expected}: it "
            "needs more than latents, as networks for inpainting, depth or editing do. Use a text-to-image checkpoint."
        )
