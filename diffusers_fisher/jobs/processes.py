"""Sets up accelerate's processes, on CPUs and GPUs alike."""

import datetime
import os

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import get_int_from_env, parse_flag_from_env

from ..errors import warn

WAIT = datetime.timedelta(days=7)
"""How long processes wait for each other. If one process works for all, or has more work, this may take hours."""
WORLD_SIZES = ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"]
"""Variables by which launchers (torchrun, then those of MPI) say how many processes they start."""
_LAUNCHED = "ACCELERATE_MIXED_PRECISION"  # every kind of `accelerate launch` sets it


def uses_cpu() -> bool:
    """Returns whether processes compute on CPUs: `accelerate launch --cpu` asks for it, or there is no accelerator."""
    return bool(parse_flag_from_env("ACCELERATE_USE_CPU")) or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Returns accelerate's state of this process, and warns if there are not as many processes as were asked for.

    Unlike `PartialState()` without arguments it also works for several processes on CPUs. Each of them would otherwise
    assume that it is the only one.
    """
    state = PartialState(cpu=uses_cpu(), timeout=WAIT)
    check_process_number(state)
    return state


def check_process_number(state: PartialState | Accelerator) -> None:
    """Warns if the launcher was asked for another number of processes than there are."""
    number = get_int_from_env(WORLD_SIZES, 0)
    if number and number != state.num_processes:
        warn(
            f"The launcher was asked for {number} processes, and this process works as one of {state.num_processes}. "
            f"Launch by `torchrun --nproc_per_node {number} -m ...`, or unset {', '.join(WORLD_SIZES)}."
        )
    # `accelerate launch` tells its processes their number by WORLD_SIZE. Where it starts one process alone, the
    # address for the others is all that is left of the number that was asked for.
    elif not number and state.num_processes == 1 and "MASTER_ADDR" in os.environ and _LAUNCHED in os.environ:
        warn(
            "`accelerate launch` was asked for several processes (it has set MASTER_ADDR) and started one, because it "
            "starts more on accelerators alone. Launch by `torchrun --nproc_per_node N -m ...` on CPUs."
        )
