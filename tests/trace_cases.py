"""Gaussian data with independent coordinates, for which an untrained trace model is right."""

import math
from typing import Any

import torch

from diffusers_fisher import Covariance, DCTBasis, FisherTraceModel, GaussianMixture
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.noise import expand

IMAGE, TOKENS = (2, 4, 4), (6, 3)
SMALL = {"block_out_channels": (4, 8), "head_channels": 8, "time_channels": 8}


class GaussianData:
    """x_0 ~ N(mean, Q diag(variance) Q^T), Q the identity or the DCT; float64."""

    def __init__(self, shape: tuple[int, ...] = IMAGE, basis: str = "pixel", seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.basis = shape, basis
        self.mean = torch.randn(shape, generator=generator, dtype=torch.float64) / 2
        self.variance = torch.rand(shape, generator=generator, dtype=torch.float64) ** 2 + 0.02
        self.transform = DCTBasis(shape) if basis == "dct" else None

    @property
    def distribution(self) -> GaussianMixture:
        return GaussianMixture(self.mean[None], Covariance.diagonal(self.variance[None], self.transform))

    def gain(self, v: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """Returns Q diag(factors) Q^T v, for factors (B, *shape) or (1, *shape)."""
        if self.transform is None:
            return factors * v
        z = self.transform.analyse(v.double().flatten(1)) * factors.flatten(1)
        return self.transform.synthesise(z).view(v.shape).to(v.dtype)

    def noised(self, level) -> torch.Tensor:
        """Variances of x_t in the basis, (1 or B, *shape)."""
        alpha, sigma = (value.reshape(-1, *[1] * len(self.shape)) for value in (level.alpha, level.sigma))
        return alpha**2 * self.variance + sigma**2

    def r(self, level, count: int) -> torch.Tensor:
        """Returns tr Cov[eps|x]/d, (count,)."""
        return (1 - self.shares(level)).flatten(1).mean(1).expand(count)

    def shares(self, level) -> torch.Tensor:
        """Returns sigma^2 times the eigenvalues of F, (1 or B, *shape)."""
        return level.sigma.reshape(-1, *[1] * len(self.shape)) ** 2 / self.noised(level)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        z = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64)
        return self.mean + self.gain(z, self.variance.sqrt()[None])

    def model(self, **settings: Any) -> FisherTraceModel:
        """Makes an untrained trace model with this data's statistics."""
        layout = "image" if len(self.shape) == 3 else "tokens"
        channels = self.shape[0] if layout == "image" else self.shape[-1]
        torch.manual_seed(0)
        model = FisherTraceModel(
            **{**SMALL, "in_channels": channels, "layout": layout, "basis": self.basis, "prior_shape": self.shape,
               **settings}
        )  # fmt: skip
        model.set_prior(self.mean, self.variance)
        return model.eval()


class GaussianDenoiser(Denoiser):
    """The ideal denoiser of `GaussianData`, for one level or one per sample, differentiable."""

    def __init__(self, data: GaussianData, scheduler: Any):
        super().__init__(scheduler)
        self.data = data

    def model_output(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        self.num_calls += 1
        level, data = self.level(timestep), self.data
        centred = x - expand(level.alpha, x) * data.mean.to(x)
        inverse = data.gain(centred, (1 / data.noised(level)).to(x))
        deviation = data.gain(centred, (data.variance / data.noised(level)).to(x))
        epsilon = expand(level.sigma, x) * inverse
        original = data.mean.to(x) + expand(level.alpha, x) * deviation
        noise, clean, identity = (expand(c, x) for c in self.prediction.output_coefficients(level))
        return noise * epsilon + clean * original + identity * x


def dimensions(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def disturb(model: FisherTraceModel, size: float = 0.3) -> FisherTraceModel:
    """Adds noise to all parameters, as though the model were trained, and returns the model."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model
