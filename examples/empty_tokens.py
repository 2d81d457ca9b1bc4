"""Leaves out the empty tokens of a Stable Diffusion 3 without T5, with the same function of the network."""

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

EMPTY_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`: the number of zero tokens that stand for the missing T5 encoder."""


class RepeatedLastToken(TorchFunctionMode):
    """Makes the last key of every attention count as `count` equal keys.

    Equal context tokens stay equal through all layers, since a context has no positions. So one zero token in this
    mode gives exactly the function that the network is with `count` of them, many times faster.
    """

    def __init__(self, count: int):
        super().__init__()
        self.logit = math.log(count)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and "attn_mask" not in kwargs:
            query, key = args[:2] if len(args) > 1 else (kwargs["query"], kwargs["key"])
            logits = query.new_zeros(query.shape[-2], key.shape[-2])
            logits[:, -1] = self.logit
            kwargs = {**kwargs, "attn_mask": logits}
        return func(*args, **kwargs)


@contextlib.contextmanager
def short_context(transformer: torch.nn.Module | type[torch.nn.Module]) -> Iterator[None]:
    """Lets a transformer, or all of a class, see one empty token in the place of the 256 of the stock call.

    Stable Diffusion 3's transformer works on image and context tokens together, and the context is many times longer
    than the embedded checkpoint's 16 image tokens.
    """
    forward, own = transformer.forward, vars(transformer).get("forward")

    @functools.wraps(forward)
    def shorter(*args: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        count = encoder_hidden_states.shape[1]
        if count <= EMPTY_TOKENS:
            raise ValueError(f"The context has {count} tokens; expected more than {EMPTY_TOKENS}.")
        with RepeatedLastToken(EMPTY_TOKENS):
            return forward(*args, encoder_hidden_states=encoder_hidden_states[:, : count - EMPTY_TOKENS + 1], **kwargs)

    transformer.forward = shorter
    try:
        yield
    finally:
        if own is None:
            delattr(transformer, "forward")
        else:
            transformer.forward = own
