"""Z-Image."""

from __future__ import annotations

import torch

from .base import Backbone


class ZImageBackbone(Backbone):
    """Knows Z-Image: flow matching, on latents that the transformer cuts into patches.

    Classifier-free guidance is on at every scale above 0. Prompts' embeddings are lists of one tensor per prompt, each
    of its own number of tokens.
    """

    predicts_flow = True
    noise_dtype = torch.float32
    token_indices = (0, None)
    pixel_multiple = 1
    patch_size = 2

    @property
    def sample_size(self) -> int:
        return 1024 // self.factor
