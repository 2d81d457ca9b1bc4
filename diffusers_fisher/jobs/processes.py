"""accelerate's processes, on CPUs and GPUs alike."""

from __future__ import annotations

import datetime
from typing import Any

WAIT = datetime.timedelta(days=7)
"""How long processes wait for each other: where one works for all, or their shares differ, this may take hours."""


def uses_cpu() -> bool:
    """Whether processes compute on CPUs: `accelerate launch --cpu` asks for it, or there is nothing else."""
    import torch
    from accelerate.utils import parse_flag_from_env

    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()


def process_state() -> Any:
    """accelerate's state of this process, on CPUs too, where a plain `PartialState()` takes each for the only one."""
    from accelerate import PartialState

    return PartialState(cpu=uses_cpu(), timeout=WAIT)
