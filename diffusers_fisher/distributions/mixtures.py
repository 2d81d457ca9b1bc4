"""Exact distributions: the base classes of distributions and posteriors, and mixtures of Gaussians in closed form.

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

from ..arguments import check_kinds
from ..errors import InputError
from ..noise import NoiseLevel
from .covariance import Covariance, ShiftedCovariance, check_finite_floats

DEFAULT_MEMORY = 2**28
NEGLIGIBLE = 1e-6  # Weights below this factor times the rounding of their sum change no result, covariances included.


class Distribution(abc.ABC):
    """Base class of distributions of x_0 whose noised score, density and posterior are known in closed form.

    Subclasses implement `posterior` and `sample`. No result carries a graph. Tensors have the shape (B, *shape) and
    are float32 or float64, on any device. Half precision raises `InputError`, because a density of hundreds of nats
    needs more than eight bits.

    Attributes:
        shape: shape of one sample.
    """

    shape: torch.Size

    @abc.abstractmethod
    def posterior(self, x: torch.Tensor, level: NoiseLevel) -> Posterior:
        """Returns the distribution of x_0 given the noised samples.

        Args:
            x: (B, *shape), x_t.
            level: one noise level, or one per sample; alpha may be 0, sigma must be positive.

        Raises:
            InputError: `x` has another shape or dtype, or holds NaN or infinity; or sigma is 0.
        """

    @abc.abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws `count` samples of x_0, (count, *shape)."""

    @check_kinds
    def log_density(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns log q_t(x), (B,) float64, in nats over the d dimensions of x_t."""
        return self.posterior(x, level).log_density

    def score(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns the gradient of the log density, (B, *shape)."""
        return self.posterior(x, level).score

    def epsilon(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns the ideal noise prediction, -sigma * score, (B, *shape)."""
        return self.posterior(x, level).epsilon

    def posterior_mean(self, x: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
        """Returns E[x_0|x_t], (B, *shape), computed without a division by alpha."""
        return self.posterior(x, level).mean


class Posterior(abc.ABC):
    """Base class of the distribution of x_0 given one batch of samples x_t.

    Responsibilities are computed once; every product, trace and diagonal uses them again. Vectors and results have
    the shape (..., B, *shape) and the sample's dtype. Densities, traces and diagonals are float64.

    Args:
        x: x_t, (B, *shape).
        sigma: (1,) or (B,) float64, on the device of x.
        log_density: log q_t(x), (B,) float64, in nats.
        mean, score: E[x_0|x_t] and the noised score, (B, d) float64.
    """

    def __init__(
        self, x: torch.Tensor, sigma: torch.Tensor, log_density: torch.Tensor, mean: torch.Tensor, score: torch.Tensor
    ):
        self.log_density = log_density
        self._sample, self._sigma = x, sigma
        self._mean, self._score = mean, score

    @property
    def mean(self) -> torch.Tensor:
        """E[x_0|x_t], (B, *shape)."""
        return self._reshape(self._mean)

    @property
    def score(self) -> torch.Tensor:
        """The noised score, (B, *shape)."""
        return self._reshape(self._score)

    @property
    def epsilon(self) -> torch.Tensor:
        """E[eps|x_t] = -sigma * score, (B, *shape)."""
        return self._reshape(-self._sigma[:, None] * self._score)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        """Returns C v."""
        return self._product(v, self._covariances)

    def fisher(self, v: torch.Tensor) -> torch.Tensor:
        """Returns F v."""
        return self._product(v, self._fishers)

    def covariance_diagonal(self) -> torch.Tensor:
        """Returns the diagonal of C, (B, *shape) float64."""
        with full_precision(self._sample):
            return self._covariance_diagonal().view(self._sample.shape)

    def fisher_diagonal(self) -> torch.Tensor:
        """Returns the diagonal of F, (B, *shape) float64."""
        with full_precision(self._sample):
            return self._fisher_diagonal().view(self._sample.shape)

    def covariance_trace(self) -> torch.Tensor:
        """Returns the trace of C, (B,) float64."""
        return self.covariance_diagonal().flatten(1).sum(1)

    def fisher_trace(self) -> torch.Tensor:
        """Returns the trace of F, (B,) float64."""
        return self.fisher_diagonal().flatten(1).sum(1)

    def fisher_matrix(self) -> torch.Tensor:
        """Returns F, (B, d, d)."""
        with full_precision(self._sample):
            return self._fisher_matrix().to(self._sample.dtype)

    def inverse_fisher(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        """Returns (F + shift I)^-1 v, or None where it has no closed form; `shift` is (B,)."""
        return None

    @abc.abstractmethod
    def _covariances(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns C v for (k, B, d) vectors, in float64 or a dtype wider than the sample's."""

    @abc.abstractmethod
    def _fishers(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns F v for (k, B, d) vectors."""

    @abc.abstractmethod
    def _covariance_diagonal(self) -> torch.Tensor:
        """Returns the diagonal of C, (B, d) float64."""

    @abc.abstractmethod
    def _fisher_diagonal(self) -> torch.Tensor:
        """Returns the diagonal of F, (B, d) float64."""

    def _fisher_matrix(self) -> torch.Tensor:
        """Returns F, (B, d, d) float64. Cost: d products."""
        identity = torch.eye(self._mean.shape[1], dtype=torch.float64, device=self._mean.device)
        return self._fishers(identity[:, None].expand(-1, len(self._sample), -1)).permute(1, 2, 0)

    def _product(self, v: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self._sample
        if v.shape[-x.ndim :] != x.shape:
            raise InputError(f"Vectors have shape {tuple(v.shape)}; allowed: (..., {', '.join(map(str, x.shape))}).")
        with full_precision(x):
            return function(v.reshape(-1, len(x), x[0].numel())).to(v.dtype).view(v.shape)

    def _reshape(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self._sample.dtype).view(self._sample.shape)


class GaussianMixture(Distribution):
    """Represents a mixture of K Gaussians in closed form; one Gaussian is a mixture with K = 1.

    All arithmetic is float64. Cost: a posterior, and every product with it, takes one product with T_k^-1 per sample
    and mode. Modes without weight cost nothing.

    Args:
        means: (K, *shape), float32 or float64.
        covariance: covariances of K modes, or one covariance that all modes share; its shape is `shape`.
        weights: (K,), positive with sum one; None: equal weights.
        memory: number of bytes that work arrays may take. Modes that do not fit together are computed in pieces,
            again for every product.

    Attributes:
        means: (K, *shape) float64.
        covariance: the argument `covariance`, on the device of the means.
        weights: (K,) float64.
    """

    @check_kinds
    def __init__(
        self,
        means: torch.Tensor,
        covariance: Covariance,
        weights: torch.Tensor | None = None,
        memory: int = DEFAULT_MEMORY,
    ):
        check_finite_floats("means", means)
        if means.ndim < 2 or not means.numel():
            raise InputError(
                f"Means have shape {tuple(means.shape)}; allowed: (K, *shape). Pass mean[None] for one Gaussian."
            )
        if covariance.shape != tuple(means.shape[1:]) or len(covariance) not in (1, len(means)):
            raise InputError(
                f"The covariance has {len(covariance)} modes of shape {covariance.shape}, the means have shape "
                f"{tuple(means.shape)}; allowed: as many modes as means, or one mode, of the means' shape."
            )
        self.shape = means.shape[1:]
        self.memory = memory
        self.means = means.detach().double()
        self.covariance = covariance.to(means.device)
        self.weights = normalise_weights(weights, len(means), means.device)
        self._dtype = means.dtype

    @check_kinds
    def posterior(self, x: torch.Tensor, level: NoiseLevel) -> MixturePosterior:
        alpha, sigma = level_tensors(x, level, self.shape)
        with full_precision(x):
            return MixturePosterior(self, x, alpha, sigma)

    @check_kinds
    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        modes = draw_indices(self.weights, len(self.means), count, generator)
        centres = self.means[modes.to(self.means.device)].to(generator.device)
        return (centres + self.covariance.draw(modes, generator).view_as(centres)).to(self._dtype)


class MixturePosterior(Posterior):
    """Holds the posterior of a `GaussianMixture`: Gaussians N(mu_k, sigma^2 S_k T_k^-1) with responsibilities w_k.

    C = sigma^2 sum w_k S_k T_k^-1 + Cov_w[mu_k] and F = sum w_k T_k^-1 - Cov_w[g_k]. Both are centred, and each is
    computed by its own formula: F from C would be a difference of far larger terms at high noise, C from F at low
    noise.
    """

    def __init__(self, mixture: GaussianMixture, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
        self._x, self._alpha, self._sigma = x.double().flatten(1), alpha, sigma
        self._covariance = mixture.covariance.to(x.device)
        self._means = means = mixture.means.flatten(1).to(x.device)
        # Bytes per mode: offsets, solutions and temporaries.
        row = x.numel() * 8 * (8 + mixture.covariance.rank)
        self._size = max(1, int(mixture.memory // row))
        self._piece: tuple | None = None  # the only piece, where all active modes fit together
        log_joint = torch.empty(len(x), len(means), dtype=torch.float64, device=x.device)
        indices = torch.arange(len(means), device=x.device)
        for modes in indices.split(self._size):
            total, offset = self._totals(modes)
            quadratic = (offset * total.solve(offset)).sum(-1)
            log_joint[:, modes] = -0.5 * (quadratic + total.log_determinant)
        log_joint += mixture.weights.to(x.device).log() - 0.5 * means.shape[1] * math.log(2 * math.pi)
        log_density = log_joint.logsumexp(1)
        self._weights = (log_joint - log_density[:, None]).exp()
        # A mode that no sample gives weight to changes no sum; leaving it out saves its products.
        threshold = NEGLIGIBLE * torch.finfo(torch.float64).eps / len(means)
        self._active_modes = indices[(self._weights > threshold).any(0)]
        mean = score = torch.zeros_like(self._x)
        for responsibilities, _, gradients, mode_means in self._pieces():
            score = score + _average(responsibilities, gradients)
            mean = mean + _average(responsibilities, mode_means)
        super().__init__(x, sigma, log_density, mean, score)

    def inverse_fisher(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        if len(self._means) > 1 or bool((shift < 0).any()):
            return None
        total = self._covariance.scale_and_shift(self._alpha**2, self._sigma**2)
        return total.solve_inverse(v.double().flatten(1)[:, None], shift)[:, 0].to(v.dtype).view(v.shape)

    def _covariances(self, vectors: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        noise = self._sigma[:, None] ** 2
        for weights, total, _, means in self._pieces():
            offsets = means - self._mean[:, None]
            for index, v in enumerate(vectors.double()):
                # The mean of the modes' own covariances, and the covariance of the modes' means.
                result[index] += noise * _average(weights, total.shrink(v[:, None])) + _spread(weights, offsets, v)
        return result

    def _fishers(self, vectors: torch.Tensor) -> torch.Tensor:
        result = torch.zeros(vectors.shape, dtype=torch.float64, device=vectors.device)
        for weights, total, gradients, _ in self._pieces():
            offsets = gradients - self._score[:, None]
            for index, v in enumerate(vectors.double()):
                # The mean of the modes' own Fishers, less the covariance of the modes' scores.
                result[index] += _average(weights, total.solve(v[:, None])) - _spread(weights, offsets, v)
        return result

    def _covariance_diagonal(self) -> torch.Tensor:
        result = torch.zeros_like(self._mean)
        for weights, total, _, means in self._pieces():
            variances = self._sigma[:, None, None] ** 2 * total.shrink_diagonal
            result += _average(weights, variances) + _average(weights, (means - self._mean[:, None]).square())
        return result

    def _fisher_diagonal(self) -> torch.Tensor:
        result = torch.zeros_like(self._mean)
        for weights, total, gradients, _ in self._pieces():
            spread = _average(weights, (gradients - self._score[:, None]).square())
            result += _average(weights, total.inverse_diagonal) - spread
        return result

    def _totals(self, modes: torch.Tensor) -> tuple[ShiftedCovariance, torch.Tensor]:
        """Returns T of `modes` (n,), and alpha m - x (B, n, d)."""
        total = self._covariance.select(modes).scale_and_shift(self._alpha**2, self._sigma**2)
        return total, self._alpha[:, None, None] * self._means[modes] - self._x[:, None]

    def _pieces(self) -> Iterator[tuple[torch.Tensor, ShiftedCovariance, torch.Tensor, torch.Tensor]]:
        """Yields responsibilities (B, n), T, g and mu (B, n, d) of the active modes, in pieces that fit `memory`."""
        if self._piece is not None:
            yield self._piece
            return
        for modes in self._active_modes.split(self._size):
            total, offset = self._totals(modes)
            means = self._means[modes] - self._alpha[:, None, None] * total.shrink(offset)
            piece = self._weights[:, modes], total, total.solve(offset), means
            if len(modes) == len(self._active_modes):
                self._piece = piece
            yield piece


def _average(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Returns sum_k w_k values_k, (B, d); values are (1 or B, n, d), or (1 or B, 1, d) if all modes have the same."""
    if values.shape[1] == 1:
        return weights.sum(1)[:, None] * values[:, 0]
    return torch.einsum("bn,bnd->bd", weights, values.expand(len(weights), -1, -1))


def _spread(weights: torch.Tensor, offsets: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Returns sum_k w_k c_k <c_k, v>, (B, d), for the offsets c_k (B, n, d) from their mean."""
    return torch.einsum("bn,bnd->bd", weights * torch.einsum("bnd,bd->bn", offsets, v), offsets)


@contextlib.contextmanager
def full_precision(x: torch.Tensor) -> Iterator[None]:
    """Turns off gradients and, on the device of `x`, the caller's autocast, whose products are in half precision."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        yield


def level_tensors(x: torch.Tensor, level: NoiseLevel, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks the noised samples and their level, and returns alpha and sigma, (1,) or (B,) float64 on the device of x.

    Raises:
        InputError: `x` or `level` has another shape, dtype or range than a distribution of `shape` takes.
    """
    if x.ndim != len(shape) + 1 or tuple(x.shape[1:]) != tuple(shape) or not len(x):
        raise InputError(
            f"Samples have shape {tuple(x.shape)}; allowed: (B, {', '.join(map(str, shape))}), the distribution's."
        )
    check_finite_floats("x", x)
    if level.alpha.ndim > 1 or (level.alpha.ndim and len(level.alpha) != len(x)):
        raise InputError(
            f"The level has shape {tuple(level.alpha.shape)} for {len(x)} samples; allowed: one level for all "
            "samples, or one level per sample."
        )
    if not bool((level.sigma > 0).all()) or not bool((level.alpha >= 0).all()):
        raise InputError(
            f"The smallest alpha is {float(level.alpha.min()):.3g} and the smallest sigma "
            f"{float(level.sigma.min()):.3g}; allowed: alpha of 0 or more, sigma above 0. Points without noise have "
            "no density and no Fisher: take the smallest sigma of the schedule instead."
        )
    return level.alpha.double().reshape(-1).to(x.device), level.sigma.double().reshape(-1).to(x.device)


def normalise_weights(weights: torch.Tensor | None, count: int, device: torch.device) -> torch.Tensor:
    """Checks the weights and returns them as float64 (count,) with sum one; None gives equal weights."""
    if weights is None:
        return torch.full((count,), 1 / count, dtype=torch.float64, device=device)
    if weights.shape != (count,) or not weights.is_floating_point():
        raise InputError(
            f"Weights have shape {tuple(weights.shape)} and dtype {weights.dtype}; allowed: ({count},) of floats."
        )
    values = weights.detach().double().to(device)
    # Each float32 weight is rounded by itself, so the sum of all is wrong by at most 1e-7.
    if not (bool((values > 0).all()) and math.isclose(float(values.sum()), 1.0, rel_tol=1e-6)):
        raise InputError(
            f"Weights must be positive and sum to one; the smallest is {float(values.min()):.3g}, the sum "
            f"{float(values.sum()):.9g}. Leave out entries of weight zero, and divide the weights by their sum."
        )
    return values / values.sum()


def draw_indices(weights: torch.Tensor | None, size: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draws `count` of the indices 0..size-1, on the generator's device.

    Args:
        weights: (size,) probabilities; None: equal probabilities.
    """
    if count < 1:
        raise InputError(f"`count` is {count}; allowed: 1 or more.")
    uniform = torch.rand(count, dtype=torch.float64, device=generator.device, generator=generator)
    if weights is None:
        return (uniform * size).long()
    edges = weights.to(generator.device).cumsum(0)  # torch.multinomial takes at most 2^24 weights
    return torch.searchsorted(edges, uniform * edges[-1], right=True).clamp_max(size - 1)
