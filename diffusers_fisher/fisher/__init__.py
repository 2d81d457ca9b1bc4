"""Estimators of the diffusion Fisher. Each has its own file, and all have the same interface."""

from .agreement import ModelFunction
from .autodiff import AutodiffFisher
from .bounds import (
    centred_endpoint_error_bound,
    endpoint_error_bound,
    norm_trace_error_bound,
    residual_trace_error_bound,
)
from .direct import DirectFisher
from .endpoint import EndpointFisher
from .estimate import Estimate, Probes, antithetic, gaussian, orthogonal, rademacher
from .estimator import FisherEstimator
from .exact import ExactFisher
from .finite_difference import FiniteDifferenceFisher
from .gaussian_data import GaussianFisher, TraceCorrectedFisher
from .level import LevelFisher
from .one_step import OneStepFisher
from .operator import FisherMatrixOperator, FisherOperator, ModelFisherOperator
from .trace_matching import TraceMatchingFisher

__all__ = [
    "AutodiffFisher", "DirectFisher", "EndpointFisher", "Estimate", "ExactFisher", "FiniteDifferenceFisher",
    "FisherEstimator", "FisherMatrixOperator", "FisherOperator", "GaussianFisher", "LevelFisher",
    "ModelFisherOperator", "ModelFunction", "OneStepFisher", "Probes", "TraceCorrectedFisher",
    "TraceMatchingFisher", "antithetic", "centred_endpoint_error_bound", "endpoint_error_bound", "gaussian",
    "norm_trace_error_bound", "orthogonal", "rademacher", "residual_trace_error_bound",
]  # fmt: skip
