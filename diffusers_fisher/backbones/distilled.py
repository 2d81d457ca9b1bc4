"""Signs that a network was distilled to few steps, so that its output is no score."""

from __future__ import annotations

from ..errors import DistilledNetworkWarning, warn
from .base import Backbone

DISTILLED_SCHEDULERS = ("FlowMatchLCMScheduler", "LCMScheduler", "TCDScheduler")
"""Classes of diffusers' schedulers that were made for the sampling of distilled networks, of known noise levels."""


def sign_of_distillation(backbone: Backbone) -> str | None:
    """Returns what says that the pipeline's network was distilled to few steps; None where nothing does.

    Networks may be distilled without any sign in the pipeline (SDXL-Turbo, FLUX.1-schnell).
    """
    if backbone.config.get("time_cond_proj_dim") is not None:
        return f"its {type(backbone.network).__name__} takes a guidance scale as an input of consistency models"
    if backbone.pipe.config.get("is_distilled"):
        return "its configuration has is_distilled=True"
    classes = {base.__name__ for base in type(backbone.scheduler).__mro__}
    names = [name for name in DISTILLED_SCHEDULERS if name in classes]
    return f"its scheduler is {names[0]}" if names else None


def warn_of_distillation(backbone: Backbone) -> None:
    """Warns with `DistilledNetworkWarning` where a sign says that the network was distilled."""
    sign = sign_of_distillation(backbone)
    if sign is not None:
        warn(
            f"{backbone.name} looks like a network that was distilled to few steps ({sign}). The output of such a "
            "network is not the score of a density, so that its likelihoods mean little; score images with the model "
            "that it was distilled from. If the network is not distilled, set DDIMScheduler or "
            "FlowMatchEulerDiscreteScheduler.",
            DistilledNetworkWarning,
        )  # fmt: skip
