"""Differentiable schedulers."""

from .catalog import CATALOG
from .mixin import FisherSchedulerMixin, fisher_scheduler
from .trajectory import Trajectory

__all__ = ["CATALOG", "FisherSchedulerMixin", "Trajectory", "fisher_scheduler"]
