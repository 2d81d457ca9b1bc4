"""Hooks on denoising networks: summaries of the last hidden layer, whole outputs, and the number of evaluations.

The summaries carry information about the network's Jacobian, and are an input of trace models.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

OUTPUT_NORMS = ("conv_norm_out", "norm_out")
"""Names of the normalisation before the output layers, in diffusers' UNets and transformers."""

_REGISTERING = threading.Lock()  # torch numbers hooks without one: of two with the same number one would be lost

Record = Callable[[tuple, Mapping[str, object]], None]
"""What is called with a module's positional arguments and keywords."""


def is_compiled(network: torch.nn.Module) -> bool:
    """Returns whether the network is compiled: compiled networks don't call hooks."""
    return hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None


def output_norm(network: torch.nn.Module | None) -> torch.nn.Module | None:
    """Returns the module whose input is the network's last hidden layer.

    Returns None if the network has no such module, or if it is compiled.
    """
    if network is None or is_compiled(network):
        return None
    modules = (getattr(network, name, None) for name in OUTPUT_NORMS)
    return next((module for module in modules if isinstance(module, torch.nn.Module)), None)


def summary(hidden: torch.Tensor) -> torch.Tensor:
    """Returns every channel's mean and standard deviation over the positions: (B, 2C) float32, without a graph.

    Args:
        hidden: hidden layer, (B, C, H, W) or (B, N, C).
    """
    positions = hidden.detach().float()
    positions = positions.flatten(2) if hidden.ndim == 4 else positions.mT
    return torch.cat([positions.mean(2), positions.std(2, correction=0)], dim=1)


@contextlib.contextmanager
def watch_calls(module: torch.nn.Module, record: Record) -> Iterator[None]:
    """Calls `record` before every evaluation of the module inside the block by this thread.

    The network may work in other threads too.
    """
    thread = threading.get_ident()

    # One of several threads passes no keywords while this hook is removed.
    def hook(module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, object] | None = None) -> None:
        if threading.get_ident() == thread:
            record(arguments, keywords or {})

    with _REGISTERING:
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    with handle:
        yield


@contextlib.contextmanager
def watch_outputs(module: torch.nn.Module, record: Callable[[object, object], None]) -> Iterator[None]:
    """Calls `record(inputs, output)` after every evaluation of the module inside the block by this thread.

    The inputs are the positional arguments and the keywords.
    """
    thread = threading.get_ident()

    def hook(module: torch.nn.Module, arguments: tuple, keywords: Mapping[str, object], output: object) -> None:
        if threading.get_ident() == thread:
            record((arguments, keywords), output)

    with _REGISTERING:
        handle = module.register_forward_hook(hook, with_kwargs=True)
    with handle:
        yield


@contextlib.contextmanager
def record_summaries(network: torch.nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which every evaluation of the network inside the block appends its `summary`.

    The list stays empty where `output_norm` returns None.
    """
    summaries: list[torch.Tensor] = []

    def record(arguments: tuple, keywords: Mapping[str, object]) -> None:
        hidden = next(iter((*arguments, *keywords.values())))
        summaries.append(summary(hidden))

    module = output_norm(network)
    with contextlib.nullcontext() if module is None else watch_calls(module, record):
        yield summaries


@contextlib.contextmanager
def count_evaluations(networks: Iterable[torch.nn.Module]) -> Iterator[list[int]]:
    """Yields a list to which every evaluation of a network inside the block appends its number of samples.

    Evaluations of compiled networks are not counted.
    """
    counts: list[int] = []

    def record(arguments: tuple, keywords: Mapping[str, object]) -> None:
        inputs = (*arguments, *keywords.values())
        batches = (
            len(each)
            for each in inputs
            if (isinstance(each, torch.Tensor) and each.ndim > 0) or (isinstance(each, list) and each)
        )
        counts.append(next(batches, 1))

    with contextlib.ExitStack() as stack:
        for network in networks:
            if not is_compiled(network):
                stack.enter_context(watch_calls(network, record))
        yield counts


@contextlib.contextmanager
def record_outputs(network: torch.nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which every evaluation of the network inside the block appends its whole output.

    The list stays empty without a network, or where it is compiled.
    """
    outputs: list[torch.Tensor] = []

    def record(inputs: object, output: Any) -> None:
        outputs.append(output[0])  # diffusers' outputs and tuples alike

    with contextlib.nullcontext() if network is None else watch_outputs(network, record):
        yield outputs
