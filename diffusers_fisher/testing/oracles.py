"""Exact distributions as oracles, and the denoisers they make.

Notation: q_t is the law of x_t = alpha x_0 + sigma eps with x_0 from a mixture of Gaussians (p_k, m_k, S_k);
C_k = alpha^2 S_k + sigma^2 I. Points are modes with S_k = 0, one Gaussian is a mixture of one.
"""

import math
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import NoiseLevel, Timestep, expand


class MixtureOracle:
    """A mixture of Gaussians with full covariances, in closed form.

    Args:
        means: (K, *shape) mode centres.
        covariances: (K, d, d) with d the product of `shape`; zeros for points.
        weights: (K,) positive, summing to one; None: equal.
    """

    def __init__(self, means: torch.Tensor, covariances: torch.Tensor, weights: torch.Tensor | None = None):
        count, dimensions = len(means), means[0].numel()
        weights = torch.full((count,), 1 / count, dtype=means.dtype) if weights is None else weights
        if covariances.shape != (count, dimensions, dimensions) or weights.shape != (count,):
            raise InputError(
                f"Got {count} means of {dimensions} dimensions, covariances {tuple(covariances.shape)} and weights "
                f"{tuple(weights.shape)}; allowed: ({count}, {dimensions}, {dimensions}) and ({count},)."
            )
        if not (bool((weights > 0).all()) and math.isclose(float(weights.sum()), 1.0, rel_tol=1e-6)):
            raise InputError(f"Weights must be positive and sum to one, got a sum of {float(weights.sum())}.")
        self.shape = means.shape[1:]
        self.means = means.flatten(1)
        self.covariances = covariances
        self.weights = weights

    @classmethod
    def points(cls, points: torch.Tensor, weights: torch.Tensor | None = None) -> "MixtureOracle":
        """Weighted points (K, *shape)."""
        dimensions = points[0].numel()
        return cls(points, torch.zeros(len(points), dimensions, dimensions, dtype=points.dtype), weights)

    @classmethod
    def gaussian(cls, mean: torch.Tensor, covariance: torch.Tensor) -> "MixtureOracle":
        """One Gaussian with `mean` (*shape) and `covariance` (d, d)."""
        return cls(mean[None], covariance[None])

    def log_density(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """log q_t(x), (B,) nats."""
        return torch.logsumexp(self._log_joint(x, level)[0], dim=1)

    def score(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Gradient of the log density, (B, *shape)."""
        log_joint, gradients, _ = self._log_joint(x, level)
        responsibilities = log_joint.softmax(1)
        return torch.einsum("bk,bkd->bd", responsibilities, gradients).view_as(x)

    def epsilon(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The ideal noise prediction, -sigma * score, (B, *shape)."""
        return -expand(level.sigma, x) * self.score(x, level)

    def posterior_mean(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """E[x_0|x_t], (B, *shape); needs no division by alpha."""
        responsibilities, means = self._posterior(x, level)[:2]
        return torch.einsum("bk,bkd->bd", responsibilities, means).view_as(x)

    def posterior_covariance(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Cov[x_0|x_t], (B, d, d), in centred form."""
        responsibilities, means, within = self._posterior(x, level)
        centred = means - torch.einsum("bk,bkd->bd", responsibilities, means)[:, None]
        between = torch.einsum("bk,bkd,bke->bde", responsibilities, centred, centred)
        return between + torch.einsum("bk,kde->bde", responsibilities, within)

    def fisher(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The diffusion Fisher F = -grad^2 log q_t(x), (B, d, d)."""
        log_joint, gradients, precisions = self._log_joint(x, level)
        responsibilities = log_joint.softmax(1)
        centred = gradients - torch.einsum("bk,bkd->bd", responsibilities, gradients)[:, None]
        spread = torch.einsum("bk,bkd,bke->bde", responsibilities, centred, centred)
        return torch.einsum("bk,kde->bde", responsibilities, precisions) - spread

    def trace(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """tr F, (B,)."""
        return self.fisher(x, level).diagonal(dim1=-2, dim2=-1).sum(-1)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, *shape) draws of x_0."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        values, vectors = torch.linalg.eigh(self.covariances)
        roots = vectors * values.clamp_min(0).sqrt()[:, None]
        noise = torch.randn(count, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        return (self.means[index] + torch.einsum("bde,be->bd", roots[index], noise)).reshape(count, *self.shape)

    def _log_joint(self, x: torch.Tensor, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """log p_k N(x; alpha m_k, C_k) as (B, K), its gradient (B, K, d) and the precisions C_k^-1 (K, d, d)."""
        alpha, sigma = self._scalars(level)
        dimensions = self.means.shape[1]
        total = alpha**2 * self.covariances + sigma**2 * torch.eye(dimensions, dtype=self.means.dtype)
        precisions = torch.linalg.inv(total)
        offset = alpha * self.means - x.flatten(1)[:, None]
        gradients = torch.einsum("kde,bke->bkd", precisions, offset)
        quadratic = (offset * gradients).sum(-1)
        constant = dimensions * math.log(2 * math.pi) + torch.logdet(total)
        return self.weights.log() - 0.5 * (quadratic + constant), gradients, precisions

    def _posterior(self, x: torch.Tensor, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Responsibilities (B, K), posterior means a mode (B, K, d) and covariances a mode (K, d, d)."""
        alpha, sigma = self._scalars(level)
        log_joint, gradients, precisions = self._log_joint(x, level)
        means = self.means - alpha * torch.einsum("kde,bke->bkd", self.covariances, gradients)
        within = sigma**2 * self.covariances @ precisions
        return log_joint.softmax(1), means, within

    def _scalars(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        if level.alpha.ndim != 0:
            raise InputError(f"Oracles take one noise level a call, got levels of shape {tuple(level.alpha.shape)}.")
        return level.alpha.to(self.means.dtype), level.sigma.to(self.means.dtype)


class OracleDenoiser(Denoiser):
    """A perfect denoiser for a scheduler: `model_output(model_input, timestep)` in its prediction type.

    Differentiable, so it serves as reference for every estimator.
    """

    def __init__(self, oracle: MixtureOracle, scheduler: Any):
        super().__init__(scheduler)
        self.oracle = oracle

    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """The raw output that an ideal model would give at model input `x`."""
        self.num_calls += 1
        level = self.level(timestep)
        noise, original, identity = (expand(c, x) for c in self.prediction.output_coefficients(level))
        return noise * self.oracle.epsilon(x, level) + original * self.oracle.posterior_mean(x, level) + identity * x
