"""Exact distributions as oracles, and their ideal denoisers.

Notation: q_t is the distribution of x_t = alpha x_0 + sigma eps with x_0 from a mixture of Gaussians (p_k, m_k, S_k);
C_k = alpha^2 S_k + sigma^2 I. Points are modes with S_k = 0; one Gaussian is a mixture with one mode.
"""

import math

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import NoiseLevel, Timestep, expand


class MixtureOracle:
    """Represents a mixture of Gaussians with full covariances in closed form.

    Args:
        means: (K, *shape), centres of the modes.
        covariances: (K, d, d), where d is the product of `shape`; zeros for points.
        weights: (K,), positive with sum one; None: equal weights.
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
        """Makes the oracle of weighted points (K, *shape)."""
        dimensions = points[0].numel()
        return cls(points, torch.zeros(len(points), dimensions, dimensions, dtype=points.dtype), weights)

    @classmethod
    def gaussian(cls, mean: torch.Tensor, covariance: torch.Tensor) -> "MixtureOracle":
        """Makes the oracle of one Gaussian with `mean` (*shape) and `covariance` (d, d)."""
        return cls(mean[None], covariance[None])

    def log_density(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns log q_t(x), (B,), in nats."""
        return torch.logsumexp(self._log_joint(x, level)[0], dim=1)

    def score(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns the gradient of the log density, (B, *shape)."""
        log_joint, gradients, _ = self._log_joint(x, level)
        return torch.einsum("bk,bkd->bd", log_joint.softmax(1), gradients).view_as(x)

    def epsilon(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns the ideal noise prediction, -sigma * score, (B, *shape)."""
        return -expand(level.sigma, x) * self.score(x, level)

    def posterior_mean(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns E[x_0|x_t], (B, *shape), computed without a division by alpha."""
        responsibilities, means = self._posterior(x, level)[:2]
        return torch.einsum("bk,bkd->bd", responsibilities, means).view_as(x)

    def posterior_covariance(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns Cov[x_0|x_t], (B, d, d), computed as a centred sum."""
        responsibilities, means, covariances = self._posterior(x, level)
        return _spread(responsibilities, means) + torch.einsum("bk,kde->bde", responsibilities, covariances)

    def fisher(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns the diffusion Fisher F = -grad^2 log q_t(x), (B, d, d)."""
        log_joint, gradients, precisions = self._log_joint(x, level)
        responsibilities = log_joint.softmax(1)
        precision = torch.einsum("bk,kde->bde", responsibilities, precisions)
        return precision - _spread(responsibilities, gradients)

    def trace(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns the trace of F, (B,)."""
        return self.fisher(x, level).diagonal(dim1=-2, dim2=-1).sum(-1)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws `count` samples of x_0, (count, *shape)."""
        index = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        values, vectors = torch.linalg.eigh(self.covariances)
        roots = vectors * values.clamp_min(0).sqrt()[:, None]
        noise = torch.randn(count, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        return (self.means[index] + torch.einsum("bde,be->bd", roots[index], noise)).reshape(count, *self.shape)

    def _log_joint(self, x: torch.Tensor, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns log p_k N(x; alpha m_k, C_k), (B, K), its gradient (B, K, d) and all C_k^-1, (K, d, d)."""
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
        """Returns responsibilities (B, K), posterior means per mode (B, K, d) and covariances per mode (K, d, d)."""
        alpha, sigma = self._scalars(level)
        log_joint, gradients, precisions = self._log_joint(x, level)
        means = self.means - alpha * torch.einsum("kde,bke->bkd", self.covariances, gradients)
        return log_joint.softmax(1), means, sigma**2 * self.covariances @ precisions

    def _scalars(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        if level.alpha.ndim != 0:
            raise InputError(f"Oracles take one noise level per call, got levels of shape {tuple(level.alpha.shape)}.")
        return level.alpha.to(self.means.dtype), level.sigma.to(self.means.dtype)


def _spread(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns the covariance (B, d, d) of `values` (B, K, d) under `weights` (B, K)."""
    centred = values - torch.einsum("bk,bkd->bd", weights, values)[:, None]
    return torch.einsum("bk,bkd,bke->bde", weights, centred, centred)


class OracleDenoiser(Denoiser):
    """Computes the ideal `model_output(model_input, timestep)` in the prediction type of a scheduler.

    The denoiser is differentiable, so it is a reference for every estimator.
    """

    def __init__(self, oracle: MixtureOracle, scheduler: SchedulerMixin):
        super().__init__(scheduler)
        self.oracle = oracle

    def model_output(self, x: torch.Tensor, timestep: Timestep) -> torch.Tensor:
        """Returns the raw output of an ideal model at model input `x`."""
        self.num_calls += 1
        level = self.level(timestep)
        noise, original, identity = (expand(c, x) for c in self.prediction.output_coefficients(level))
        return noise * self.oracle.epsilon(x, level) + original * self.oracle.posterior_mean(x, level) + identity * x
