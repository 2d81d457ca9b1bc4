"""What the curvature of the log density is good for: bounds on likelihoods, and memorised prompts."""

from .bound import denoiser_likelihood_bound
from .level_table import fit_level_fisher
from .memorisation import denoiser_memorisation
from .memorisation_output import Memorisation
from .options import BoundOptions
from .output import LikelihoodBound

__all__ = [
    "BoundOptions", "LikelihoodBound", "Memorisation", "denoiser_likelihood_bound", "denoiser_memorisation",
    "fit_level_fisher",
]  # fmt: skip
