"""Schedulers through whose steps gradients can be computed without a graph in the denoiser."""

from .catalog import CATALOG, fisher_scheduler, fisher_scheduler_named
from .mixin import FisherSchedulerMixin
from .trajectory import Trajectory

__all__ = ["CATALOG", "FisherSchedulerMixin", "Trajectory", "fisher_scheduler", "fisher_scheduler_named"]
