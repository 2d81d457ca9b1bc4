"""Sets up accelerate's processes, on CPUs and GPUs alike."""

import datetime

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

WAIT = datetime.timedelta(days=7)
"""How long processes wait for each other. If one process works for all, or has more work, this may take hours."""


def uses_cpu() -> bool:
    """Returns whether processes compute on CPUs: `accelerate launch --cpu` asks for it, or there is no accelerator."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Returns accelerate's state of this process.

    Unlike `PartialState()` without arguments it also works for several processes on CPUs. Each of them would otherwise
    assume that it is the only one.
    """
    return PartialState(cpu=uses_cpu(), timeout=WAIT)
