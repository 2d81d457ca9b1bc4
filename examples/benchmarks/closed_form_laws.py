"""Mixtures of Gaussians of random shape, their exact denoisers and traces, and points of many kinds about them.

Notation: the noised law has modes N(m_k, T_k) with T_k = S_k + s^2 I in x~ = x/alpha, s = sigma/alpha;
g_k = T_k^-1 (m_k - x~), and w_k is a mode's responsibility for x~.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from diffusers_fisher import FisherEstimator
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.fisher import FisherOperator
from diffusers_fisher.noise import DenoisingState, NoiseLevel, expand

KINDS = ("one variance", "one variance per mode", "anisotropic", "low rank")
CLASSES = (
    "in distribution", "noise", "shuffled", "shifted", "blank", "data plus 10% noise", "far", "between", "inverted"
)  # fmt: skip


class Law:
    """A mixture of Gaussians, computed by few products of matrices, in float64.

    Args:
        weights: (K,), with sum one.
        means: (K, d).
        variances: (K, d), along the axes of `bases`.
        bases: (K, d, d) orthonormal, columns are the axes; None: the sample's own coordinates.
    """

    def __init__(
        self, weights: torch.Tensor, means: torch.Tensor, variances: torch.Tensor, bases: torch.Tensor | None
    ):
        self.weights, self.means, self.variances, self.bases = weights, means, variances, bases

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        modes = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        offsets = self.variances[modes].sqrt() * noise
        if self.bases is not None:
            offsets = torch.einsum("bde,be->bd", self.bases[modes], offsets)
        return self.means[modes] + offsets

    def log_prob(self, x: torch.Tensor, s: float) -> torch.Tensor:
        """Returns the log density of x~ = `x` (B, d), in nats (B,)."""
        total = self.variances + s**2
        offsets = self.means - x[:, None]
        if self.bases is not None:
            offsets = torch.einsum("bkd,kde->bke", offsets, self.bases)
        log_joint = self.weights.log() - 0.5 * ((offsets.square() / total).sum(-1) + total.log().sum(1))
        return log_joint.logsumexp(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)

    def noise_and_rest(self, x: torch.Tensor, s: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns E[eps|x~] (B, d) and 1 - r = s^2 tr F/d (B,) at x~ = `x`."""
        total = self.variances + s**2
        if self.bases is None:
            inverse, lifted, squares = 1 / total, self.means / total, x.square()
            quadratic = squares @ inverse.T - 2 * x @ lifted.T + (self.means * lifted).sum(1)
            log_joint = self.weights.log() - 0.5 * (quadratic + total.log().sum(1))
            shares = log_joint.softmax(1)
            score = shares @ lifted - x * (shares @ inverse)
            # |g_k|^2, by the same products
            inverse_squares, lifted_squares = inverse.square(), lifted / total
            lengths = squares @ inverse_squares.T - 2 * x @ lifted_squares.T + lifted.square().sum(1)
        else:
            offsets = torch.einsum("bkd,kde->bke", self.means - x[:, None], self.bases)
            log_joint = self.weights.log() - 0.5 * ((offsets.square() / total).sum(-1) + total.log().sum(1))
            shares, gradients = log_joint.softmax(1), offsets / total
            score = torch.einsum("bk,bke,kde->bd", shares, gradients, self.bases)
            lengths = gradients.square().sum(-1)
        trace = shares @ (1 / total).sum(1) - (shares * lengths).sum(1) + score.square().sum(1)
        return -s * score, s**2 * trace / x.shape[1]


class LawDenoiser(Denoiser):
    """Computes the law's ideal model output, and keeps 1 - r at the last point for `LawTrace`."""

    def __init__(self, law: Law, scheduler: Any):
        super().__init__(scheduler)
        self.law = law
        self._levels: dict[float, NoiseLevel] = {}

    def level(self, timestep: Any) -> NoiseLevel:
        key = float(timestep)
        if key not in self._levels:  # one node asks three times, and grids share nodes
            self._levels[key] = super().level(timestep)
        return self._levels[key]

    def model_output(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        self.num_calls += 1
        level = self.level(timestep)
        alpha, s = float(level.alpha), float(level.noise_to_signal)
        epsilon, self.rest = self.law.noise_and_rest(x / alpha, s)
        noise, original, identity = (expand(c, x) for c in self.prediction.output_coefficients(level))
        return noise * epsilon + original * (x / alpha - s * epsilon) + identity * x


class LawTrace(FisherEstimator):
    """The exact trace at the point that its denoiser saw last."""

    def __init__(self, denoiser: LawDenoiser):
        self.denoiser = denoiser

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
        return LawOperator(state, self.denoiser.rest)


class LawOperator(FisherOperator):
    """The multiple of the identity that has the law's exact trace."""

    def __init__(self, state: DenoisingState, rest: torch.Tensor):
        super().__init__(state)
        self.rest = rest

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        level = self.state.level
        return expand((1 - self.rest) * (level.sigma / level.alpha) ** 2, v) * v

    def exact_trace(self) -> tuple[torch.Tensor, int]:
        return self.state.sample[0].numel() * self.rest / self.state.level.sigma**2, 0


def draw_law(generator: torch.Generator) -> tuple[Law, str]:
    """Draws a mixture of 1 to 32 Gaussians in 16 to 256 dimensions, and describes it."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), dtype=torch.float64, generator=generator))

    def log_uniform(low: float, high: float) -> float:
        return math.exp(uniform(math.log(low), math.log(high)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def unit(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    kind = KINDS[int(uniform(0, len(KINDS)))]
    dimensions = 2 ** int(uniform(4, 7 if kind == "low rank" else 9))
    modes = int(log_uniform(1, 5 if kind == "low rank" else 33))  # low rank costs a whole matrix per mode
    scale, low = log_uniform(0.1, 2.0), log_uniform(0.005, 0.5)
    high = low if kind == "one variance" else low * log_uniform(1, 30)
    means, bases = scale * normal(modes, dimensions), None
    variances = (low * (high / low) ** unit(modes, 1)).expand(modes, dimensions)
    if kind == "anisotropic":
        spectrum = torch.arange(1, dimensions + 1, dtype=torch.float64) ** -uniform(0.3, 1.5)
        orders = torch.stack([torch.randperm(dimensions, generator=generator) for _ in range(modes)])
        variances = (variances * (spectrum / spectrum.mean())[orders]).clamp_min(1e-4)
    if kind == "low rank":
        factor = high**0.5 * normal(modes, dimensions, int(uniform(1, 5)))
        covariances = factor @ factor.mT + torch.diag_embed(variances)
        variances, bases = torch.linalg.eigh(covariances)
    weights = unit(modes).clamp_min(1e-12).log().neg() + 0.05
    words = f"{dimensions} dimensions, {modes} modes of scale {scale:.2f}, {kind}, variances {low:.3f} to {high:.3f}"
    return Law(weights / weights.sum(), means, variances, bases), words


def draw_points(law: Law, count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draws `count` points of each of `CLASSES`, (count, d) float64."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    data, others = law.sample(count, generator), law.sample(count, generator)
    dimensions = data.shape[1]
    deviation = law.sample(256, generator).std()
    shuffled = torch.stack([row[torch.randperm(dimensions, generator=generator)] for row in data])
    share = 0.3 + 0.4 * torch.rand(count, 1, dtype=torch.float64, generator=generator)
    grey = deviation * (4 * torch.rand(count, 1, dtype=torch.float64, generator=generator) - 2)
    points = (
        data, normal(count, dimensions), shuffled, data + 0.5 * deviation, grey.expand(count, dimensions).clone(),
        data + 0.1 * deviation * normal(count, dimensions), 3 * data, share * data + (1 - share) * others, -data,
    )  # fmt: skip
    return dict(zip(CLASSES, points, strict=True))
