"""What the curvature of the log density is good for: bounds on likelihoods, dimensions, uncertainty, memorisation."""

from .bound import denoiser_likelihood_bound
from .dimension import IntrinsicDimension, denoiser_intrinsic_dimension
from .level_table import fit_level_fisher
from .memorisation import denoiser_memorisation
from .memorisation_output import Memorisation
from .options import BoundOptions
from .output import LikelihoodBound
from .uncertainty import PosteriorUncertainty, state_uncertainty

__all__ = [
    "BoundOptions", "IntrinsicDimension", "LikelihoodBound", "Memorisation", "PosteriorUncertainty",
    "denoiser_intrinsic_dimension", "denoiser_likelihood_bound", "denoiser_memorisation", "fit_level_fisher",
    "state_uncertainty",
]  # fmt: skip
