"""How likely samples are: by the probability-flow ODE, by an adaptive reference, and by squared errors alone."""

from .bins import dequantised, offset_bits
from .comparison import CheckpointComparison, CheckpointDifferences, LikelihoodComparison, PairedLikelihoods
from .output import LikelihoodOutput, SquaredErrorOutput
from .problem import Integration
from .reference import reference_log_likelihood
from .schemes import DEFAULT_SCHEME, SCHEMES
from .solver import integrate_log_likelihood
from .squared_error import squared_error_log_likelihood

__all__ = [
    "DEFAULT_SCHEME", "SCHEMES", "CheckpointComparison", "CheckpointDifferences", "Integration",
    "LikelihoodComparison", "LikelihoodOutput", "PairedLikelihoods", "SquaredErrorOutput", "dequantised",
    "integrate_log_likelihood", "offset_bits", "reference_log_likelihood", "squared_error_log_likelihood",
]  # fmt: skip
