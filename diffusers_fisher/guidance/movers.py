"""Moves the optimised variables along their gradient: by normalised ascent, or by any optimiser of torch.optim.

The variables are tensors by name, (B, ...) each: "noise", and on request "text" and "control".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import InputError
from .checks import normalise, norms

Variables = Mapping[str, torch.Tensor]

OptimizerFactory = Callable[[list[torch.Tensor]], torch.optim.Optimizer]
"""`factory(parameters) -> optimizer`, such as `lambda parameters: torch.optim.Adam(parameters, lr=0.05)`."""


class NormalisedAscent:
    """Moves each sample along its unit gradient by steps of the sample's own length; the noise stays on its sphere.

    A sample's steps are halved whenever its reward is no better than its best before, so that near an optimum it does
    not overshoot again and again.

    Args:
        variables: values at the beginning.
        noise: (B, ...) initial noise.
        step_size: length of the first step, relative to the norm of the noise or of the text embedding; the control
            (all steps of the run together) is measured by the norm of the noise.
    """

    def __init__(self, variables: Variables, noise: torch.Tensor, step_size: float):
        self._radius = norms(noise)
        sizes = {name: self._radius if name == "control" else norms(value) for name, value in variables.items()}
        self._lengths = {name: step_size * size.flatten() for name, size in sizes.items()}

    def move(self, variables: Variables, gradients: Variables, is_best: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the variables after a step along the rewards' `gradients`.

        Args:
            is_best: (B,) bool, whether the sample's last reward is its best so far.
        """
        result = {}
        for name, value in variables.items():
            keeps_length = is_best.to(value.device)
            self._lengths[name] = torch.where(keeps_length, self._lengths[name], self._lengths[name] / 2)
            length = self._lengths[name].reshape(-1, *[1] * (value.ndim - 1))
            new_value = value + length * normalise(gradients[name])[0]
            if name == "noise":
                new_value = new_value * (self._radius / norms(new_value))  # exactly the same where nothing moves
            result[name] = new_value.detach()
        return result


class TorchAscent:
    """Steps by an optimiser of torch.optim on minus the sum of the rewards. Nothing holds the noise on its sphere.

    Elementwise optimisers (SGD, Adam and their kind) keep the samples apart.
    """

    def __init__(self, variables: Variables, make: OptimizerFactory):
        self._parameters = {name: torch.nn.Parameter(value.detach().clone()) for name, value in variables.items()}
        self._optimizer = make(list(self._parameters.values()))

    def move(self, variables: Variables, gradients: Variables, is_best: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the parameters after a step of the optimiser. The arguments are those of `NormalisedAscent.move`."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(variables[name])  # a projection may have moved it
            parameter.grad = -gradients[name].to(parameter)
        self._optimizer.step()
        return {name: parameter.detach().clone() for name, parameter in self._parameters.items()}


def optimizer_factory(optimizer: Any, step_size: float) -> OptimizerFactory | None:
    """Returns the factory that `optimizer` stands for; None for normalised ascent.

    Args:
        optimizer: a name in torch.optim, a factory, or None for normalised ascent.
        step_size: learning rate of an optimiser by name.

    Raises:
        InputError: another name, a factory that makes no optimiser, or one whose steps evaluate the reward themselves.
    """
    if optimizer is None:
        return None
    make = optimizer
    if isinstance(optimizer, str):
        cls = getattr(torch.optim, optimizer, None)
        if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
            raise InputError(f"`optimizer` is '{optimizer}'; allowed: a name in torch.optim, such as Adam.")
        make = functools.partial(cls, lr=step_size)  # type: ignore[call-arg]
    parameter = torch.nn.Parameter(torch.zeros(2))
    try:
        trial = make([parameter])
    except Exception as error:  # a factory of the user may raise any
        arguments = f"'{optimizer}' with `step_size` {step_size} " if isinstance(optimizer, str) else ""
        raise InputError(
            f"`optimizer` {arguments}can't be made: {error}. Pass a name in torch.optim or a factory."
        ) from error
    if not isinstance(trial, torch.optim.Optimizer) or isinstance(trial, torch.optim.LBFGS):
        raise InputError(
            f"`optimizer` makes a {type(trial).__name__}; allowed: a torch.optim.Optimizer whose step needs no "
            "closure, such as lambda parameters: torch.optim.Adam(parameters, lr=0.05)."
        )
    parameter.grad = torch.ones(2)
    try:
        trial.step()
    except Exception as error:
        raise InputError(
            f"`optimizer` makes a {type(trial).__name__}, which can't step by a dense gradient: {error} Pass another "
            "name in torch.optim, such as Adam."
        ) from error
    return make


def shell_distance(noise: torch.Tensor) -> torch.Tensor:
    """Returns the distance of the noise's norm from that of Gaussian noise, in standard deviations, (B,) float64.

    |z| of d standard normal numbers has mean sqrt(d - 1/2) and standard deviation sqrt(1/2), nearly, for d of a few
    tens or more.
    """
    flat = noise.detach().double().flatten(1)
    typical = math.sqrt(flat.shape[1] - 0.5)
    return (math.sqrt(2) * (torch.linalg.vector_norm(flat, dim=1) - typical)).cpu()
