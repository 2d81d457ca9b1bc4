"""Exact distributions of every structure beside their dense oracles, and the comparison of everything they give."""

import math

import torch
from cases import latents, relative

from diffusers_fisher import Covariance, DCTBasis, DiracMixture, GaussianMixture, NoiseLevel
from diffusers_fisher.testing import MixtureOracle

from .problems import apply

# Float64, conditioned by inverting C_k (condition number below 1e4) and by exponentials of log densities below 1e3.
TOLERANCE = 1e-10
D = 12
SHAPES = {"image": (3, 2, 2), "packed": (6, 2)}
LEVELS = {
    name: NoiseLevel(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    for name, alpha, sigma in (
        ("low noise", 0.99, 0.15), ("middle", 0.8, 0.6), ("high noise", 0.1, math.sqrt(0.99)),
        ("k-diffusion", 1.0, 3.0), ("flow", 0.4, 0.6), ("pure noise", 0.0, 1.0),
    )
}  # fmt: skip
OWN_LEVELS = NoiseLevel(
    torch.tensor([0.99, 0.8, 0.1, 0.0], dtype=torch.float64), torch.tensor([0.15, 0.6, 2.0, 1.0], dtype=torch.float64)
)


def normal(*shape, seed=0):
    return latents(shape=shape, seed=seed)


def laws(shape):
    """Returns a distribution and its dense oracle for every name."""
    means, weights = normal(3, *shape, seed=1), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    variances, factor = normal(3, *shape, seed=2).exp() * 0.1, normal(3, *shape, 2, seed=3) * 0.3
    root = normal(3, D, D, seed=4) * 0.2
    covariances = {
        "isotropic": Covariance.isotropic(torch.tensor([0.1, 0.3, 0.02], dtype=torch.float64), shape),
        "one for all": Covariance.isotropic(0.1, shape),
        "diagonal": Covariance.diagonal(variances),
        "DCT": Covariance.diagonal(variances, DCTBasis(shape)),
        "low rank": Covariance.low_rank(variances, factor),
        "full": Covariance.full(root @ root.mT + 0.02 * torch.eye(D, dtype=torch.float64), shape),
    }
    table = {}
    for name, covariance in covariances.items():
        dense = covariance.dense().expand(3, -1, -1)
        table[name] = (GaussianMixture(means, covariance, weights), MixtureOracle(means, dense, weights))
    single = covariances["low rank"].select(torch.tensor([1]))
    table["one Gaussian"] = (GaussianMixture(means[:1], single), MixtureOracle(means[:1], single.dense()))
    points, shares = normal(7, *shape, seed=5), normal(7, seed=6).softmax(0)
    table["points"] = (DiracMixture(points, shares), MixtureOracle.points(points, shares))
    table["equal points"] = (DiracMixture(points), MixtureOracle.points(points))
    return table


LAWS = {f"{name}, {kind}": pair for kind, shape in SHAPES.items() for name, pair in laws(shape).items()}


def noisy(oracle, level, count=4, seed=2):
    generator = torch.Generator().manual_seed(seed)
    clean = oracle.sample(count, generator)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    alpha, sigma = (value.reshape(-1, *[1] * (clean.ndim - 1)) for value in (level.alpha, level.sigma))
    return alpha * clean + sigma * noise


def check_posterior(posterior, oracle, x, level, tolerance=TOLERANCE):
    """Checks all results of a posterior. Products are compared relative to the size of the terms of F and C."""
    v = normal(*x.shape, seed=9)
    assert float((posterior.log_density - oracle.log_density(x, level)).abs().max()) < tolerance * 100
    assert relative(posterior.score, oracle.score(x, level)) < tolerance
    assert relative(posterior.epsilon, oracle.epsilon(x, level)) < tolerance
    assert relative(posterior.mean, oracle.posterior_mean(x, level)) < tolerance
    fisher, covariance = oracle.fisher(x, level), oracle.posterior_covariance(x, level)
    size, spread = float(fisher.norm()), float(oracle.means.square().sum(1).max())
    assert float((posterior.fisher_matrix() - fisher).norm()) < tolerance * size
    assert float((posterior.fisher(v) - apply(fisher, v)).norm()) < tolerance * size * float(v.norm())
    assert float((posterior.covariance(v) - apply(covariance, v)).norm()) < tolerance * spread * float(v.norm())
    for value, matrix, unit in (
        (posterior.fisher_diagonal(), fisher, size),
        (posterior.covariance_diagonal(), covariance, spread),
    ):
        assert float((value.flatten(1) - matrix.diagonal(dim1=1, dim2=2)).norm()) < tolerance * unit
    traces = covariance.diagonal(dim1=1, dim2=2).sum(1)
    assert float((posterior.covariance_trace() - traces).abs().max()) < tolerance * spread * D
    assert float((posterior.fisher_trace() - oracle.trace(x, level)).abs().max()) < tolerance * size * D
