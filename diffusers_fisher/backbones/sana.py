"""Sana."""

from __future__ import annotations

import torch

from .base import Backbone


class SanaBackbone(Backbone):
    """Knows Sana: flow matching, on latents of a deep-compression autoencoder, which have no distribution.

    Sizes are taken as they are, without binning.
    """

    predicts_flow = True
    noise_dtype = torch.float32
    token_indices = (0, 1)
    pixel_multiple = 32
