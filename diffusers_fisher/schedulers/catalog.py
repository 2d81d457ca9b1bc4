"""Fisher versions of diffusers' schedulers. Each class adds the method `differentiable` to its parent."""

from collections.abc import Callable
from typing import Any

import diffusers
import diffusers.schedulers as stock
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..errors import UnsupportedError
from .mixin import FisherSchedulerMixin


class FisherDDIMInverseScheduler(FisherSchedulerMixin, stock.DDIMInverseScheduler):
    """`DDIMInverseScheduler` with `differentiable`."""


class FisherDDIMScheduler(FisherSchedulerMixin, stock.DDIMScheduler):
    """`DDIMScheduler` with `differentiable`."""


class FisherDDPMScheduler(FisherSchedulerMixin, stock.DDPMScheduler):
    """`DDPMScheduler` with `differentiable`."""


class FisherDEISMultistepScheduler(FisherSchedulerMixin, stock.DEISMultistepScheduler):
    """`DEISMultistepScheduler` with `differentiable`."""


class FisherDPMSolverMultistepInverseScheduler(FisherSchedulerMixin, stock.DPMSolverMultistepInverseScheduler):
    """`DPMSolverMultistepInverseScheduler` with `differentiable`."""


class FisherDPMSolverMultistepScheduler(FisherSchedulerMixin, stock.DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with `differentiable`."""


class FisherDPMSolverSinglestepScheduler(FisherSchedulerMixin, stock.DPMSolverSinglestepScheduler):
    """`DPMSolverSinglestepScheduler` with `differentiable`."""


class FisherEDMEulerScheduler(FisherSchedulerMixin, stock.EDMEulerScheduler):
    """`EDMEulerScheduler` with `differentiable`."""


class FisherEulerAncestralDiscreteScheduler(FisherSchedulerMixin, stock.EulerAncestralDiscreteScheduler):
    """`EulerAncestralDiscreteScheduler` with `differentiable`."""


class FisherEulerDiscreteScheduler(FisherSchedulerMixin, stock.EulerDiscreteScheduler):
    """`EulerDiscreteScheduler` with `differentiable`."""


class FisherFlowMatchEulerDiscreteScheduler(FisherSchedulerMixin, stock.FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with `differentiable`."""


class FisherFlowMatchHeunDiscreteScheduler(FisherSchedulerMixin, stock.FlowMatchHeunDiscreteScheduler):
    """`FlowMatchHeunDiscreteScheduler` with `differentiable`."""


class FisherHeunDiscreteScheduler(FisherSchedulerMixin, stock.HeunDiscreteScheduler):
    """`HeunDiscreteScheduler` with `differentiable`."""


class FisherKDPM2DiscreteScheduler(FisherSchedulerMixin, stock.KDPM2DiscreteScheduler):
    """`KDPM2DiscreteScheduler` with `differentiable`."""


class FisherLCMScheduler(FisherSchedulerMixin, stock.LCMScheduler):
    """`LCMScheduler` with `differentiable`."""


class FisherLMSDiscreteScheduler(FisherSchedulerMixin, stock.LMSDiscreteScheduler):
    """`LMSDiscreteScheduler` with `differentiable`."""


class FisherPNDMScheduler(FisherSchedulerMixin, stock.PNDMScheduler):
    """`PNDMScheduler` with `differentiable`."""


class FisherSASolverScheduler(FisherSchedulerMixin, stock.SASolverScheduler):
    """`SASolverScheduler` with `differentiable`."""


class FisherTCDScheduler(FisherSchedulerMixin, stock.TCDScheduler):
    """`TCDScheduler` with `differentiable`."""


class FisherUniPCMultistepScheduler(FisherSchedulerMixin, stock.UniPCMultistepScheduler):
    """`UniPCMultistepScheduler` with `differentiable`."""


CATALOG: dict[str, type[Any]] = {cls.__name__: cls for cls in FisherSchedulerMixin.__subclasses__()}
"""Every Fisher scheduler by class name."""

for _class in CATALOG.values():
    # A saved component names the module that it is loaded from. The public module stays the same when files move.
    _class.__module__ = "diffusers_fisher"


_CLASSES: dict[type, type] = {}  # A class outside the catalog is made once, so that `isinstance` works.


def fisher_scheduler(cls: type[Any]) -> type[Any]:
    """Returns the Fisher version of any diffusers scheduler class, such as `fisher_scheduler(DDIMScheduler)`.

    The class comes from the catalog, or is made if the catalog does not have it. A Fisher scheduler is returned
    unchanged.

    Raises:
        UnsupportedError: `cls` is not a diffusers scheduler class with a `step`.
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
