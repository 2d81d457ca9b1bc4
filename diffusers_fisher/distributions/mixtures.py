"""Exact distributions: what a law of x_0 gives at a noise level, and mixtures of Gaussians in closed form.

Notation: q_t is the law of x_t = alpha x_0 + sigma eps with x_0 from the distribution; C = Cov[x_0|x_t] and
F = -grad^2 log q_t = I/sigma^2 - (alpha^2/sigma^4) C (Wang et al., ICML 2025, arXiv 2505.23264). Mode k has weight
p_k, mean m_k and covariance S_k; T_k = alpha^2 S_k + sigma^2 I, g_k = T_k^-1 (alpha m_k - x),
mu_k = m_k - alpha S_k g_k, and w_k is its responsibility for x.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from ..errors import InputError
from ..noise import NoiseLevel
from .covariance import Covariance, ShiftedCovariance

DEFAULT_MEMORY = 2**28
NEGLIGIBLE = 1e-6  # weights below this times the rounding of their sum are as good as zero, also in covariances


class Distribution(abc.ABC):
    """A law of x_0 whose noised score, density and posterior are known. Subclasses give `posterior` and `sample`.

    Everything is in closed form and carries no graph. Tensors are (B, *shape), float32 or float64, on any device; half
    precision is refused, because densities of hundreds of nats need more than eight bits.
    """

    shape: torch.Size

    @abc.abstractmethod
    def posterior(self, x: torch.Tensor, level: NoiseLevel) -> Posterior:
        """The law of x_0 given the noised samples.

        Args:
            x: (B, *shape), x_t.
            level: one, or one a sample; alpha may be 0, sigma may not.

        Raises:
            InputError: another shape or dtype, NaN or infinity, sigma = 0.
        """

    @abc.abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """(count, *shape) draws of x_0."""

    def log_density(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """log q_t(x), (B,) float64, nats over the d dimensions of x_t."""
        return self.posterior(x, level).log_density

    def score(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Gradient of the log density, (B, *shape)."""
        return self.posterior(x, level).score

    def epsilon(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """The ideal noise prediction, -sigma * score, (B, *shape)."""
        return self.posterior(x, level).epsilon

    def posterior_mean(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """E[x_0|x_t], (B, *shape), without a division by alpha."""
        return self.posterior(x, level).mean


class Posterior(abc.ABC):
    """The law of x_0 given x_t at one batch of samples.

    Responsibilities are computed once; every product, trace and diagonal reuses them. Vectors and results are
    (..., B, *shape) in the sample's dtype; densities, traces and diagonals float64.

    Args:
        x: (B, *shape).
        alpha, sigma: (1,) or (B,) float64 on x's device.
        log_density: (B,) float64.
        mean, score: (B, d) float64.
    """

    def __init__(
        self,
        x: torch.Tensor,
        alpha: torch.Tensor,
        sigma: torch.Tensor,
        log_density: torch.Tensor,
        mean: torch.Tensor,
        score: torch.Tensor,
    ):
        self.log_density = log_density
        self._like = x
        self._alpha, self._sigma = alpha, sigma
        self._mean, self._score = mean, score

    @property
    def mean(self) -> torch.Tensor:
        """E[x_0|x_t], (B, *shape)."""
        return self._shaped(self._mean)

    @property
    def score(self) -> torch.Tensor:
        """The noised score, (B, *shape)."""
        return self._shaped(self._score)

    @property
    def epsilon(self) -> torch.Tensor:
        """E[eps|x_t] = -sigma * score, (B, *shape)."""
        return self._shaped(-self._sigma[:, None] * self._score)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        """C v."""
        return self._product(v, self._covariances)

    def fisher(self, v: torch.Tensor) -> torch.Tensor:
        """F v."""
        return self._product(v, self._fishers)

    def covariance_diagonal(self) -> torch.Tensor:
        """The diagonal of C, (B, *shape) float64."""
        with full_precision(self._like):
            return self._covariance_diagonal().view(self._like.shape)

    def fisher_diagonal(self) -> torch.Tensor:
        """The diagonal of F, (B, *shape) float64."""
        with full_precision(self._like):
            return self._fisher_diagonal().view(self._like.shape)

    def covariance_trace(self) -> torch.Tensor:
        """tr C, (B,) float64."""
        return self.covariance_diagonal().flatten(1).sum(1)

    def fisher_trace(self) -> torch.Tensor:
        """tr F, (B,) float64."""
        return self.fisher_diagonal().flatten(1).sum(1)

    def fisher_matrix(self) -> torch.Tensor:
        """F, (B, d, d)."""
        with full_precision(self._like):
            return self._fisher_matrix().to(self._like.dtype)

    def inverse_fisher(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        """(F + shift I)^-1 v where it has a closed form; `shift` (B,)."""
        return None

    @abc.abstractmethod
    def _covariances(self, vectors: torch.Tensor) -> torch.Tensor:
        """C v for (k, B, d) vectors; float64 or wider than the sample."""

    @abc.abstractmethod
    def _fishers(self, vectors: torch.Tensor) -> torch.Tensor:
        """F v for (k, B, d) vectors."""

    @abc.abstractmethod
    def _covariance_diagonal(self) -> torch.Tensor:
        """(B, d) float64."""

    @abc.abstractmethod
    def _fisher_diagonal(self) -> torch.Tensor:
        """(B, d) float64."""

    @abc.abstractmethod
    def _fisher_matrix(self) -> torch.Tensor:
        """(B, d, d) float64."""

    def _product(self, v: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        like = self._like
        if v.shape[-like.ndim :] != like.shape:
            raise InputError(
                f"Vectors have shape {tuple(v.shape)}; allowed: (..., {', '.join(map(str, like.shape))})."
            )
        with full_precision(like):
            return function(v.reshape(-1, len(like), like[0].numel())).to(v.dtype).view(v.shape)

    def _shaped(self, flat: torch.Tensor) -> torch.Tensor:
        return flat.to(self._like.dtype).view(self._like.shape)


class GaussianMixture(Distribution):
    """A mixture of K Gaussians; one Gaussian is a mixture of one. All arithmetic is float64.

    Cost of a posterior, and of a product with one: K products with T_k^-1 a sample (modes without weight left out).

    Args:
        means: (K, *shape), float32 or float64.
        covariance: of K modes, or of one that all share; its dimensions are `shape`.
        weights: (K,) positive, summing to one; None: equal.
        memory: bytes that work arrays may take; more modes than fit are taken in pieces, again for every product.

    Attributes:
        means: (K, *shape) float64.
        covariance: as given.
        weights: (K,) float64.
    """

    def __init__(
        self,
        means: torch.Tensor,
        covariance: Covariance,
        weights: torch.Tensor | None = None,
        memory: int = DEFAULT_MEMORY,
    ):
        check_finite_floats(means, "Means")
        if means.ndim < 2 or not means.numel():
            raise InputError(
                f"Means have shape {tuple(means.shape)}; allowed: (K, *shape), one Gaussian as mean[None]."
            )
        if covariance.shape != tuple(means.shape[1:]) or len(covariance) not in (1, len(means)):
            raise InputError(
                f"The covariance is of {len(covariance)} modes of shape {covariance.shape} beside means "
                f"{tuple(means.shape)}; allowed: as many modes as means, or one for all, of the means' shape."
            )
        self.shape = means.shape[1:]
        self.memory = memory
        self.means = means.detach().double()
        self.covariance = covariance.to(means.device)
        self.weights = checked_weights(weights, len(means), means.device)
        self._dtype = means.dtype

    def posterior(self, x: torch.Tensor, level: NoiseLevel) -> MixturePosterior:
        alpha, sigma = checked_level(x, level, self.shape)
        means, weights = self.means.flatten(1).to(x.device), self.weights.to(x.device)
        with full_precision(x):
            return MixturePosterior(x, alpha, sigma, means, self.covariance.to(x.device), weights, self.memory)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        modes = draw_indices(self.weights, len(self.means), count, generator)
        centres = self.means[modes.to(self.means.device)].to(generator.device)
        return (centres + self.covariance.draw(modes, generator).view_as(centres)).to(self._dtype)


class MixturePosterior(Posterior):
    """See `GaussianMixture`: a mixture of Gaussians N(mu_k, sigma^2 S_k T_k^-1) with responsibilities w_k.

    C = sigma^2 sum w_k S_k T_k^-1 + Cov_w[mu_k] and F = sum w_k T_k^-1 - Cov_w[g_k], each centred and each computed
    directly, because either is a difference of larger terms of the other at one end of the noise levels.
    """

    def __init__(self, x, alpha, sigma, means, covariance: Covariance, weights, memory: int):
        self._x, self._means, self._covariance = x.double().flatten(1), means, covariance
        self._alpha, self._sigma = alpha, sigma
        row = x.numel() * 8 * (8 + covariance.rank)  # bytes a mode: offsets, solutions and temporaries
        self._size = max(1, int(memory // row))
        self._kept: tuple | None = None
        log_joint = torch.empty(len(x), len(means), dtype=torch.float64, device=x.device)
        every = torch.arange(len(means), device=x.device)
        for modes in every.split(self._size):
            noised, offset = self._noised(modes)
            quadratic = (offset * noised.solve(offset)).sum(-1)
            log_joint[:, modes] = -0.5 * (quadratic + noised.log_determinant)
        log_joint += weights.log() - 0.5 * means.shape[1] * math.log(2 * math.pi)
        log_density = log_joint.logsumexp(1)
        self._weights = (log_joint - log_density[:, None]).exp()
        tiny = NEGLIGIBLE * torch.finfo(torch.float64).eps / len(means)
        self._active = every[(self._weights > tiny).any(0)]
        mean = score = torch.zeros_like(self._x)
        for responsibilities, _, gradients, means_given_x in self._pieces():
            score = score + _averaged(responsibilities, gradients)
            mean = mean + _averaged(responsibilities, means_given_x)
        super().__init__(x, alpha, sigma, log_density, mean, score)

    def _fisher_matrix(self) -> torch.Tensor:
        size = self._mean.shape[1]
        identity = torch.eye(size, dtype=torch.float64, device=self._mean.device)
        return self._fishers(identity[:, None].expand(-1, len(self._like), -1)).permute(1, 2, 0)

    def inverse_fisher(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        if len(self._means) > 1 or bool((shift < 0).any()):
            return None
        noised = self._covariance.shifted(self._alpha**2, self._sigma**2)
        return noised.solve_inverse(v.double().flatten(1)[:, None], shift)[:, 0].to(v.dtype).view(v.shape)

    def _covariances(self, vectors: torch.Tensor) -> torch.Tensor:
        result, noise = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device), self._sigma**2
        for weights, noised, _, means in self._pieces():
            centred = means - self._mean[:, None]
            for index, v in enumerate(vectors.double()):
                within = noise[:, None] * _averaged(weights, noised.shrink(v[:, None]))
                result[index] += within + _spread(weights, centred, v)
        return result

    def _fishers(self, vectors: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for weights, noised, gradients, _ in self._pieces():
            centred = gradients - self._score[:, None]
            for index, v in enumerate(vectors.double()):
                result[index] += _averaged(weights, noised.solve(v[:, None])) - _spread(weights, centred, v)
        return result

    def _covariance_diagonal(self) -> torch.Tensor:
        result = torch.zeros_like(self._mean)
        for weights, noised, _, means in self._pieces():
            within = self._sigma[:, None, None] ** 2 * noised.shrink_diagonal
            result += _averaged(weights, within) + _averaged(weights, (means - self._mean[:, None]).square())
        return result

    def _fisher_diagonal(self) -> torch.Tensor:
        result = torch.zeros_like(self._mean)
        for weights, noised, gradients, _ in self._pieces():
            between = _averaged(weights, (gradients - self._score[:, None]).square())
            result += _averaged(weights, noised.inverse_diagonal) - between
        return result

    def _noised(self, modes: torch.Tensor) -> tuple[ShiftedCovariance, torch.Tensor]:
        """T of `modes`, and alpha m - x (B, n, d)."""
        noised = self._covariance.select(modes).shifted(self._alpha**2, self._sigma**2)
        return noised, self._alpha[:, None, None] * self._means[modes] - self._x[:, None]

    def _pieces(self) -> Iterator[tuple[torch.Tensor, ShiftedCovariance, torch.Tensor, torch.Tensor]]:
        """Responsibilities (B, n), T, g and mu (B, n, d) of the modes that have weight, in pieces that fit."""
        if self._kept is not None:
            yield self._kept
            return
        for modes in self._active.split(self._size):
            noised, offset = self._noised(modes)
            means = self._means[modes] - self._alpha[:, None, None] * noised.shrink(offset)
            piece = self._weights[:, modes], noised, noised.solve(offset), means
            if len(modes) == len(self._active):
                self._kept = piece
            yield piece


def _averaged(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """sum_k w_k values_k, (B, d), of (1 or B, n, d) values, or (1 or B, 1, d) where all modes have the same."""
    if values.shape[1] == 1:
        return weights.sum(1)[:, None] * values[:, 0]
    return torch.einsum("bn,bnd->bd", weights, values.expand(len(weights), -1, -1))


def _spread(weights: torch.Tensor, centred: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """sum_k w_k c_k <c_k, v>, (B, d)."""
    return torch.einsum("bn,bnd->bd", weights * torch.einsum("bnd,bd->bn", centred, v), centred)


@contextlib.contextmanager
def full_precision(like: torch.Tensor) -> Iterator[None]:
    """Without a graph, and without the autocast that a caller may be in: its products are in half precision."""
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        yield


def checked_level(x: torch.Tensor, level: NoiseLevel, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and sigma, (1,) or (B,) float64 on x's device, of noised samples `x` that are looked at as well."""
    if x.dtype not in (torch.float32, torch.float64):
        raise InputError(f"Samples have dtype {x.dtype}; allowed: float32, float64. Pass x.float().")
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != tuple(shape) or not len(x):
        raise InputError(
            f"Samples have shape {tuple(x.shape)}; allowed: (B, {', '.join(map(str, shape))}), the distribution's."
        )
    if not bool(torch.isfinite(x).all()):
        raise InputError("Samples hold NaN or infinity.")
    if level.alpha.ndim > 1 or (level.alpha.ndim and len(level.alpha) != len(x)):
        raise InputError(
            f"The level has shape {tuple(level.alpha.shape)} for {len(x)} samples; allowed: one level for all, or one "
            "a sample."
        )
    if not bool((level.sigma > 0).all()) or not bool((level.alpha >= 0).all()):
        raise InputError(
            f"Levels reach alpha {float(level.alpha.min()):.3g} and sigma {float(level.sigma.min()):.3g}; allowed: "
            "alpha of 0 or more, sigma above 0. Without noise points have no density and no Fisher; take the smallest "
            "sigma of the schedule instead."
        )
    return level.alpha.double().reshape(-1).to(x.device), level.sigma.double().reshape(-1).to(x.device)


def checked_weights(weights: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    """(count,) float64 summing to one."""
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=device)
    if weights.shape != (count,) or not weights.is_floating_point():
        raise InputError(
            f"Weights have shape {tuple(weights.shape)} and dtype {weights.dtype}; allowed: ({count},) of floats."
        )
    wide = weights.detach().double().to(device)
    # float32 weights are rounded each on its own, so their sum is off by 1e-7 at most
    if not (bool((wide > 0).all()) and math.isclose(float(wide.sum()), 1.0, rel_tol=1e-6)):
        raise InputError(
            f"Weights must be positive and sum to one; the smallest is {float(wide.min()):.3g}, the sum "
            f"{float(wide.sum()):.9g}. Leave out what has no weight, and divide by the sum."
        )
    return wide / wide.sum()


def check_finite_floats(values: torch.Tensor, name: str) -> None:
    """Raises `InputError` unless `values` are finite and float32 or float64."""
    if values.dtype not in (torch.float32, torch.float64):
        raise InputError(f"{name} have dtype {values.dtype}; allowed: float32, float64. Convert them first.")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"{name} hold NaN or infinity.")


def draw_indices(weights: torch.Tensor | None, size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """`count` of 0..size-1 with probabilities `weights` (size,), None for equal ones, on the generator's device."""
    if count < 1:
        raise InputError(f"`count` is {count}; allowed: 1 or more.")
    uniform = torch.rand(count, dtype=torch.float64, device=generator.device, generator=generator)
    if weights is None:
        return (uniform * size).long()
    edges = weights.to(generator.device).cumsum(0)  # torch.multinomial stops at 2^24 weights
    return torch.searchsorted(edges, uniform * edges[-1], right=True).clamp_max(size - 1)
