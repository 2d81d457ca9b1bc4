"""Estimators of the diffusion Fisher, one file each, all with the same face."""

from .autodiff import AutodiffFisher
from .direct import DirectFisher
from .endpoint import EndpointFisher
from .finite_difference import FiniteDifferenceFisher
from .operator import FisherEstimator, FisherOperator, TraceEstimate, rademacher

__all__ = [
    "AutodiffFisher",
    "DirectFisher",
    "EndpointFisher",
    "FiniteDifferenceFisher",
    "FisherEstimator",
    "FisherOperator",
    "TraceEstimate",
    "rademacher",
]
