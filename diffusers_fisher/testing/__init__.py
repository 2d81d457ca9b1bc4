"""Tools for testing estimators: exact distributions as oracles, and the contract of Fisher operators."""

from .contract import ContractError, check_fisher
from .oracles import MixtureOracle, OracleDenoiser

__all__ = ["ContractError", "MixtureOracle", "OracleDenoiser", "check_fisher"]
