"""Encodes prompts apart from other threads.

A fast tokenizer keeps the padding and truncation of its last call, so that a call in another thread would change what
this thread's prompts are padded to, in silence. Each thread therefore has its own copies of the tokenizers.
"""

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .stock_calls import shallow_copy

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast


class _Backends(threading.local):
    """Copies of the part of tokenizers that keeps state, with the number of tokens that they were made with."""

    def __init__(self) -> None:
        self.by_tokenizer: weakref.WeakKeyDictionary[PreTrainedTokenizerFast, tuple[int, Tokenizer]]
        self.by_tokenizer = weakref.WeakKeyDictionary()


_BACKENDS = _Backends()


def encode_apart(pipe: DiffusionPipeline, *args: Any, **kwargs: Any) -> tuple:
    """Returns the result of the pipeline's `encode_prompt` with tokenizers of this thread.

    It gets copies of lists, because some pipelines write templates into their list of prompts (Z-Image).

    Cost beside the encoding: a copy of each tokenizer, once per thread, some tenths of a second for 50,000 tokens.
    """
    from transformers import PreTrainedTokenizerFast

    components = pipe.components.items()
    tokenizers = {name: _thread_copy(part) for name, part in components if isinstance(part, PreTrainedTokenizerFast)}
    args = tuple(list(value) if isinstance(value, list) else value for value in args)
    kwargs = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
    return shallow_copy(pipe, **tokenizers).encode_prompt(*args, **kwargs)


def encode_conditions(
    pipe: DiffusionPipeline, parameters: Mapping[str, inspect.Parameter], conditions: Mapping[str, Any]
) -> tuple:
    """Returns the result of `encode_prompt` for arguments of the pipeline's call, without negative prompts.

    Args:
        parameters: parameters of the call.
        conditions: arguments of the call; its defaults stand for the others.
    """
    names = inspect.signature(pipe.encode_prompt).parameters
    arguments = {name: conditions.get(name, parameters[name].default) for name in names if name in parameters}
    if "do_classifier_free_guidance" in names:
        arguments["do_classifier_free_guidance"] = False
    with torch.no_grad():
        return encode_apart(pipe, **arguments)


def mean_of_tokens(encoding: Sequence[Any], embeddings: int, mask: int | None) -> torch.Tensor:
    """Returns the mean of the embeddings over each prompt's tokens, (B, width).

    Args:
        encoding: result of `encode_prompt`.
        embeddings: place of the embeddings in it: a tensor (B, N, width), or a list of (tokens, width) per prompt.
        mask: place of their mask (B, N); None: there is none. A mask that is None itself takes all tokens.
    """
    tokens = encoding[embeddings]
    if isinstance(tokens, list):
        return torch.stack([prompt.mean(0) for prompt in tokens])
    if mask is None or encoding[mask] is None:
        return tokens.mean(1)
    weights = encoding[mask].to(tokens).unsqueeze(-1)
    return (weights * tokens).sum(1) / weights.sum(1)


def _thread_copy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns this thread's copy of a tokenizer; the copy is made anew when tokens were added."""
    count, backend = _BACKENDS.by_tokenizer.get(tokenizer, (None, None))
    if count != len(tokenizer):
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        _BACKENDS.by_tokenizer[tokenizer] = len(tokenizer), backend
    result = copy.copy(tokenizer)
    result._tokenizer = backend
    return result
