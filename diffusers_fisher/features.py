"""Summaries of a denoising network's last hidden layer, as input of a trace model, and its whole output.

The summaries carry information about the network's Jacobian.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch

OUTPUT_NORMS = ("conv_norm_out", "norm_out")
"""Names of the normalisation before the output layers, in diffusers' UNets and transformers."""

_REGISTERING = threading.Lock()  # torch numbers hooks without one: of two with the same number one would be lost

NO_KEYWORDS: Mapping[str, torch.Tensor] = MappingProxyType({})


def output_norm(network: torch.nn.Module | None) -> torch.nn.Module | None:
    """Returns the module whose input is the network's last hidden layer.

    Returns None if the network has no such module, or if it is compiled: compiled networks don't call hooks.
    """
    if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
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
def record_summaries(network: torch.nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which every evaluation of the network inside the block appends its `summary`.

    The list stays empty where `output_norm` returns None.
    """
    summaries: list[torch.Tensor] = []
    thread = threading.get_ident()

    def record(
        module: torch.nn.Module,
        arguments: tuple[torch.Tensor, ...],
        keywords: Mapping[str, torch.Tensor] = NO_KEYWORDS,
    ) -> None:
        # The network may work in other threads too; one of them passes no keywords while this hook is removed.
        if threading.get_ident() == thread:
            summaries.append(summary(next(iter((*arguments, *keywords.values())))))

    module = output_norm(network)
    if module is None:
        yield summaries
        return
    with _REGISTERING:
        handle = module.register_forward_pre_hook(record, with_kwargs=True)
    with handle:
        yield summaries


@contextlib.contextmanager
def record_outputs(network: torch.nn.Module | None) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which every evaluation of the network inside the block appends its whole output.

    The list stays empty without a network, or where it is compiled.
    """
    outputs: list[torch.Tensor] = []
    thread = threading.get_ident()

    def record(module: torch.nn.Module, arguments: tuple, output: Sequence[torch.Tensor]) -> None:
        if threading.get_ident() == thread:
            outputs.append(output[0])  # diffusers' outputs and tuples alike

    if network is None:
        yield outputs
        return
    with _REGISTERING:
        handle = network.register_forward_hook(record)
    with handle:
        yield outputs
