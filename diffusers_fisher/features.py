"""A denoising network's last hidden layer in few numbers, which tell a trace model of the network's Jacobian."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

OUTPUT_NORMS = ("conv_norm_out", "norm_out")
"""The normalisation before the output layers, of diffusers' UNets and of its transformers; its input is recorded."""


def output_norm(network: Any) -> torch.nn.Module | None:
    """The module whose input is the network's last hidden layer; None where it is not known, or where the network is
    compiled, so that a hook would not be called."""
    if hasattr(network, "_orig_mod") or getattr(network, "_compiled_call_impl", None) is not None:
        return None
    found = (getattr(network, name, None) for name in OUTPUT_NORMS)
    return next((module for module in found if isinstance(module, torch.nn.Module)), None)


def summary(hidden: torch.Tensor) -> torch.Tensor:
    """Mean and standard deviation over the positions of every channel of (B, C, H, W) or (B, N, C): (B, 2C) float32,
    detached."""
    positions = hidden.detach().float()
    positions = positions.flatten(2) if hidden.ndim == 4 else positions.mT
    return torch.cat([positions.mean(2), positions.std(2, correction=0)], dim=1)


@contextlib.contextmanager
def recorded(network: Any) -> Iterator[list[torch.Tensor]]:
    """For the block: a list that gets the `summary` of every evaluation of the network; it stays empty where
    `output_norm` finds none."""
    found: list[torch.Tensor] = []

    def record(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.append(summary(next(iter((*arguments, *named.values())))))

    module = output_norm(network)
    handle = None if module is None else module.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield found
    finally:
        if handle is not None:
            handle.remove()
