"""Fisher versions of diffusers' schedulers. Each class adds the method `differentiable` to its parent."""

from collections.abc import Callable
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddim_inverse import DDIMInverseScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_deis_multistep import DEISMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep_inverse import DPMSolverMultistepInverseScheduler
from diffusers.schedulers.scheduling_dpmsolver_singlestep import DPMSolverSinglestepScheduler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteScheduler
from diffusers.schedulers.scheduling_lcm import LCMScheduler
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from diffusers.schedulers.scheduling_sasolver import SASolverScheduler
from diffusers.schedulers.scheduling_tcd import TCDScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..errors import UnsupportedError
from .mixin import FisherSchedulerMixin


class FisherDDIMInverseScheduler(FisherSchedulerMixin, DDIMInverseScheduler):
    """`DDIMInverseScheduler` with `differentiable`."""


class FisherDDIMScheduler(FisherSchedulerMixin, DDIMScheduler):
    """`DDIMScheduler` with `differentiable`."""


class FisherDDPMScheduler(FisherSchedulerMixin, DDPMScheduler):
    """`DDPMScheduler` with `differentiable`."""


class FisherDEISMultistepScheduler(FisherSchedulerMixin, DEISMultistepScheduler):
    """`DEISMultistepScheduler` with `differentiable`."""


class FisherDPMSolverMultistepInverseScheduler(FisherSchedulerMixin, DPMSolverMultistepInverseScheduler):
    """`DPMSolverMultistepInverseScheduler` with `differentiable`."""


class FisherDPMSolverMultistepScheduler(FisherSchedulerMixin, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with `differentiable`."""


class FisherDPMSolverSinglestepScheduler(FisherSchedulerMixin, DPMSolverSinglestepScheduler):
    """`DPMSolverSinglestepScheduler` with `differentiable`."""


class FisherEDMEulerScheduler(FisherSchedulerMixin, EDMEulerScheduler):
    """`EDMEulerScheduler` with `differentiable`."""


class FisherEulerAncestralDiscreteScheduler(FisherSchedulerMixin, EulerAncestralDiscreteScheduler):
    """`EulerAncestralDiscreteScheduler` with `differentiable`."""


class FisherEulerDiscreteScheduler(FisherSchedulerMixin, EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` with `differentiable`."""


class FisherFlowMatchEulerDiscreteScheduler(FisherSchedulerMixin, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with `differentiable`."""


class FisherFlowMatchHeunDiscreteScheduler(FisherSchedulerMixin, FlowMatchHeunDiscreteScheduler):
    """`FlowMatchHeunDiscreteScheduler` with `differentiable`."""


class FisherHeunDiscreteScheduler(FisherSchedulerMixin, HeunDiscreteScheduler):
    """`HeunDiscreteScheduler` with `differentiable`."""


class FisherKDPM2DiscreteScheduler(FisherSchedulerMixin, KDPM2DiscreteScheduler):
    """`KDPM2DiscreteScheduler` with `differentiable`."""


class FisherLCMScheduler(FisherSchedulerMixin, LCMScheduler):
    """`LCMScheduler` with `differentiable`."""


class FisherLMSDiscreteScheduler(FisherSchedulerMixin, LMSDiscreteScheduler):
    """`LMSDiscreteScheduler` with `differentiable`."""


class FisherPNDMScheduler(FisherSchedulerMixin, PNDMScheduler):
    """`PNDMScheduler` with `differentiable`."""


class FisherSASolverScheduler(FisherSchedulerMixin, SASolverScheduler):
    """`SASolverScheduler` with `differentiable`."""


class FisherTCDScheduler(FisherSchedulerMixin, TCDScheduler):
    """`TCDScheduler` with `differentiable`."""


class FisherUniPCMultistepScheduler(FisherSchedulerMixin, UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` with `differentiable`."""


CATALOG = {
    name: value
    for name, value in list(globals().items())
    if name.startswith("Fisher") and isinstance(value, type) and value is not FisherSchedulerMixin
}
"""Every Fisher scheduler by class name."""

for _class in CATALOG.values():
    # A saved component names the module that it is loaded from. The public module stays the same when files move.
    _class.__module__ = "diffusers_fisher"


_CLASSES: dict[type, type] = {}  # classes outside the catalog are made once, so that `isinstance` works


def fisher_scheduler(cls: type[Any]) -> type[Any]:
    """The Fisher version of any diffusers scheduler class: `fisher_scheduler(DDIMScheduler)`.

    Classes of the catalog are returned from there, others are made. A class that is one already is returned as it is.

    Raises:
        UnsupportedError: `cls` is no diffusers scheduler class with a `step`.
    """
    if not (isinstance(cls, type) and issubclass(cls, SchedulerMixin) and hasattr(cls, "step")):
        raise UnsupportedError(
            f"fisher_scheduler takes a diffusers scheduler class, got {cls!r}. Pass the class, such as "
            "type(pipe.scheduler); Flax and transformer-specific schedulers are not supported."
        )
    if issubclass(cls, FisherSchedulerMixin):
        return cls
    name = f"Fisher{cls.__name__}"
    if issubclass(CATALOG.get(name, object), cls):
        return CATALOG[name]
    if cls not in _CLASSES:
        is_of_diffusers = getattr(diffusers, cls.__name__, None) is cls
        # The package finds classes of diffusers by name, so that they are saved and loaded like those of the catalog.
        module = "diffusers_fisher" if is_of_diffusers else cls.__module__
        attributes = {"__module__": module} if is_of_diffusers else {"__module__": module, "__reduce__": _reduce}
        _CLASSES[cls] = type(name, (FisherSchedulerMixin, cls), attributes)
    return _CLASSES[cls]


def fisher_scheduler_named(name: str) -> type | None:
    """The Fisher version of the diffusers scheduler whose name follows "Fisher"; None if there is none."""
    cls = getattr(diffusers, name.removeprefix("Fisher"), None) if name.startswith("Fisher") else None
    return fisher_scheduler(cls) if isinstance(cls, type) and issubclass(cls, SchedulerMixin) else None


def _reduce(scheduler: FisherSchedulerMixin) -> tuple[Callable, tuple[type], dict[str, Any]]:
    """Pickles a scheduler whose class was made of a user's: the class is made again."""
    return _empty, (type(scheduler).__mro__[2],), scheduler.__getstate__()


def _empty(cls: type) -> FisherSchedulerMixin:
    return object.__new__(fisher_scheduler(cls))
