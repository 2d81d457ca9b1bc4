"""What the curvature of the log density is good for: bounds on likelihoods, dimensions, uncertainty."""

from .bound import denoiser_likelihood_bound
from .dimension import IntrinsicDimension, denoiser_intrinsic_dimension
from .level_table import fit_level_fisher
from .options import BoundOptions
from .output import LikelihoodBound
from .uncertainty import PosteriorUncertainty, state_uncertainty

__all__ = [
    "BoundOptions", "IntrinsicDimension", "LikelihoodBound", "PosteriorUncertainty", "denoiser_intrinsic_dimension",
    "denoiser_likelihood_bound", "fit_level_fisher", "state_uncertainty",
]  # fmt: skip
