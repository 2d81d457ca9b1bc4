"""Fisher versions of diffusers' schedulers. Each is its parent, with `differentiable` added."""

from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepInverseScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)

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
    # A saved component names the module it is loaded from; the public one survives moves within the package.
    _class.__module__ = "diffusers_fisher"
