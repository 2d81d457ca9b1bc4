"""Schedulers through whose steps gradients can be computed without a graph in the denoiser."""

from .catalog import CATALOG, fisher_scheduler, fisher_scheduler_named
from .mixin import FisherSchedulerMixin
from .optimal_variance import (
    OptimalVarianceDDPMScheduler,
    OptimalVarianceFlowMatchScheduler,
    OptimalVarianceSchedulerMixin,
    optimal_variance_scheduler,
)
from .trajectory import Trajectory

__all__ = [
    "CATALOG", "FisherSchedulerMixin", "OptimalVarianceDDPMScheduler", "OptimalVarianceFlowMatchScheduler",
    "OptimalVarianceSchedulerMixin", "Trajectory", "fisher_scheduler", "fisher_scheduler_named",
    "optimal_variance_scheduler",
]  # fmt: skip
