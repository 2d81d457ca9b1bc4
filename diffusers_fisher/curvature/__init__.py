"""What the curvature of the log density is good for: bounds on likelihoods, dimensions, uncertainty."""

from .bound import denoiser_likelihood_bound
from .dimension import IntrinsicDimension, denoiser_intrinsic_dimension
from .level_table import LevelFisher
from .options import BoundOptions
from .output import LikelihoodBound
from .uncertainty import PosteriorUncertainty, state_uncertainty

__all__ = [
    "BoundOptions",
    "IntrinsicDimension",
    "LevelFisher",
    "LikelihoodBound",
    "PosteriorUncertainty",
    "denoiser_intrinsic_dimension",
    "denoiser_likelihood_bound",
    "state_uncertainty",
]
