"""Chroma."""

from __future__ import annotations

from .packed import PackedBackbone


class ChromaBackbone(PackedBackbone):
    """Knows Chroma: the layout of Flux, with classifier-free guidance in two evaluations and a mask of the tokens."""

    token_indices = (0, 2)
