"""Distributions of clean samples whose noised density, score and posterior are known in closed form."""

from .covariance import Covariance, DCTBasis
from .mixtures import Distribution, GaussianMixture, Posterior
from .points import DiracMixture

__all__ = ["Covariance", "DCTBasis", "DiracMixture", "Distribution", "GaussianMixture", "Posterior"]
