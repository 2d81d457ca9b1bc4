"""What the curvature of the log density is good for: bounds on likelihoods."""

from .bound import denoiser_likelihood_bound
from .level_table import LevelFisher
from .options import BoundOptions
from .output import LikelihoodBound

__all__ = ["BoundOptions", "LevelFisher", "LikelihoodBound", "denoiser_likelihood_bound"]
