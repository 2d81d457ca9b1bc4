"""What the curvature of the log density is good for: bounds on likelihoods."""

from .bound import denoiser_likelihood_bound
from .level_table import fit_level_fisher
from .options import BoundOptions
from .output import LikelihoodBound

__all__ = ["BoundOptions", "LikelihoodBound", "denoiser_likelihood_bound", "fit_level_fisher"]
