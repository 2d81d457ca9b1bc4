"""What the curvature of the log density is good for: bounds on likelihoods, and intrinsic dimensions."""

from .bound import denoiser_likelihood_bound
from .dimension import IntrinsicDimension, denoiser_intrinsic_dimension
from .level_table import LevelFisher
from .options import BoundOptions
from .output import LikelihoodBound

__all__ = [
    "BoundOptions",
    "IntrinsicDimension",
    "LevelFisher",
    "LikelihoodBound",
    "denoiser_intrinsic_dimension",
    "denoiser_likelihood_bound",
]
