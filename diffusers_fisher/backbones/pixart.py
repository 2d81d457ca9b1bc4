"""PixArt-alpha and PixArt-Sigma."""

from __future__ import annotations

from .base import Backbone


class PixArtBackbone(Backbone):
    """Knows PixArt: the transformer cuts latents into patches; sizes are taken as they are, without binning."""

    token_indices = (0, 1)  # the network takes no pooled embeddings
