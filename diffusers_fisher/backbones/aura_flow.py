"""AuraFlow."""

from __future__ import annotations

from .base import Backbone


class AuraFlowBackbone(Backbone):
    """Knows AuraFlow: flow matching, on latents that the transformer cuts into patches."""

    predicts_flow = True
    token_indices = (0, None)  # embeddings of padding are zero, and their mask is of every number
    pixel_multiple = 1
