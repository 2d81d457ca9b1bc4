"""Resumable training state in safetensors: parameters, optimizer moments, moving averages and the step.

Randomness needs no saving: training code draws from `seeds.step_generator`, which depends only on the
seed and the step.
"""

from pathlib import Path

import torch

from ..errors import CheckpointError
from ..files import load_tensors, save_tensors

Modules = dict[str, torch.nn.Module]


def save_training_state(
    path: str | Path, modules: Modules, optimizer: torch.optim.Optimizer, averages: list[torch.Tensor], step: int
) -> None:
    """Writes the whole state after `step` completed steps to one safetensors file, atomically."""
    tensors = {f"module.{name}.{key}": value for name, m in modules.items() for key, value in m.state_dict().items()}
    tensors |= {f"average.{index}": value for index, value in enumerate(averages)}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": torch.as_tensor(value) for key, value in state.items()}
    save_tensors(path, tensors, metadata={"step": str(step)})


def load_training_state(
    path: str | Path, modules: Modules, optimizer: torch.optim.Optimizer, averages: list[torch.Tensor]
) -> int:
    """Restores what `save_training_state` wrote, in place; returns the number of completed steps (0 without a file).

    Raises:
        CheckpointError: the file is damaged or belongs to other modules.
    """
    if not Path(path).exists():
        return 0
    tensors, metadata = load_tensors(path)
    try:
        for name, module in modules.items():
            prefix = f"module.{name}."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        for index, average in enumerate(averages):
            average.copy_(tensors[f"average.{index}"])
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, position, entry = key.split(".", 2)
                moments.setdefault(int(position), {})[entry] = _match_layout(value, parameters[int(position)])
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        return int(metadata["step"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"Training state '{path}' does not fit this configuration: {error}. "
            "Resume with the configuration it was made with, or choose another output folder."
        ) from error


def _match_layout(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Returns `value` in its parameter's memory format: fused optimizers pair elements by their place in memory."""
    if value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
