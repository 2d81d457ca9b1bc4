"""Summaries of a denoising network's last hidden layer, as input of a trace model.

The summaries carry information about the network's Jacobian.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

OUTPUT_NORMS = ("conv_norm_out", "norm_out")
"""Names of the normalisation before the output layers, in diffusers' UNets and transformers."""


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

    def record(
        module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]
    ) -> None:
        summaries.append(summary(next(iter((*arguments, *keywords.values())))))

    module = output_norm(network)
    with contextlib.nullcontext() if module is None else module.register_forward_pre_hook(record, with_kwargs=True):
        yield summaries
