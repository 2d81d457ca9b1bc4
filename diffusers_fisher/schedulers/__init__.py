"""Schedulers through whose steps gradients can be computed without a graph in the denoiser."""

from .catalog import CATALOG
from .mixin import FisherSchedulerMixin, fisher_scheduler
from .trajectory import Trajectory

__all__ = ["CATALOG", "FisherSchedulerMixin", "Trajectory", "fisher_scheduler"]
