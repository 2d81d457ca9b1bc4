"""What the curvature of the log density is good for: bounds on likelihoods."""

from .bound import BoundOptions, denoiser_likelihood_bound
from .level_table import LevelFisher
from .output import LikelihoodBound

__all__ = ["BoundOptions", "LevelFisher", "LikelihoodBound", "denoiser_likelihood_bound"]
