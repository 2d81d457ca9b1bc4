"""Stable Diffusion 1.x and 2.x with likelihood and guidance."""

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from .mixin import FisherPipelineMixin


class StableDiffusionFisherPipeline(FisherPipelineMixin, StableDiffusionPipeline):
    """`StableDiffusionPipeline` with `log_likelihood` and `guide`; its call is the stock one.

    Made with `from_pretrained` from any Stable Diffusion 1.x or 2.x checkpoint, or from a pipeline at hand with
    `StableDiffusionFisherPipeline(**pipe.components)`.
    """

    def _finished(self, images: Any) -> tuple[Any, list[bool]]:
        if self.safety_checker is None:
            return images, []
        checked, found = self.run_safety_checker(2 * images - 1, images.device, self.dtype)
        flagged = [bool(entry) for entry in found]
        # As in the stock call, what the checker puts in place (black) is taken as it is.
        chosen = torch.tensor(flagged, device=images.device)[:, None, None, None]
        return torch.where(chosen, checked, images), flagged


StableDiffusionFisherPipeline.__module__ = "diffusers_fisher"
