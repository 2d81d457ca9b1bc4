"""The safety checker at the end of some calls."""

from __future__ import annotations

from typing import Any

import torch

from .autoencoder import pixels_of


def check_images(pipe: Any, images: torch.Tensor) -> tuple[torch.Tensor, list[bool]]:
    """Returns images (B, 3, H, W) in [0, 1] as the pipeline's safety checker leaves them, and flags the unsafe ones.

    As in the stock call, the checker's black image takes the place of a flagged image. Without a checker nothing
    changes, and there are no flags.

    Args:
        pipe: a pipeline with Stable Diffusion's `safety_checker` and `run_safety_checker`; the classes that have
            them share no base.
    """
    if pipe.safety_checker is None:
        return images, []
    safe_images, concepts = pipe.run_safety_checker(pixels_of(images), images.device, pipe.dtype)
    flags = [bool(entry) for entry in concepts]
    mask = torch.tensor(flags, device=images.device)[:, None, None, None]
    return torch.where(mask, safe_images, images), flags
