"""The Gaussian that stands for the data at the noise end of a likelihood, and how far it is from the truth.

Notation: s = sigma/alpha at the noise end; the data are N(m, Q diag(lambda) Q^T), so x~ has the variances lambda + s^2
in the coordinates of Q.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from ..distributions.covariance import DCTBasis
from ..errors import InputError

Moment = torch.Tensor | float | None

BASES = ("pixel", "dct")


@dataclasses.dataclass(frozen=True)
class PriorGaussian:
    """Holds the mean and the variances of the data, float64.

    Args:
        mean: m, broadcasts to one sample.
        variance: lambda, broadcasts to one sample; variances along the basis vectors.
        basis: Q; None for the sample's own coordinates.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    basis: DCTBasis | None = None

    def log_density(self, x: torch.Tensor, s: float) -> torch.Tensor:
        """Returns log N(x; m, S + s^2 I), (B,) nats, for x (B, ...) float64."""
        return self._log_density(self.squares(x), s)

    def mean_log_density(self, x: torch.Tensor, s: float) -> torch.Tensor:
        """Returns the mean over standard normal eps of `log_density` at x + s eps, (B,) nats."""
        return self._log_density(self.squares(x) + s**2, s)

    def error(self, x: torch.Tensor, s: float, epsilon: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
        """Estimates how far `log_density` is from the log density of the model's data at the noise end, (B,) nats.

        The model's output at the noise end tells its own law there: eps its slope, 1 - r its curvature. A Gaussian
        with equal variances in all directions that has this slope and this curvature at x has the log density
        d/2 log(1 - r) - |eps|^2/(2 (1 - r)), up to a constant. The difference of this value between the model's
        output and what this Gaussian predicts is the error, as far as Gaussians with equal variances go; it is exact
        for such data with any other mean and variance. What remains comes from modes and correlations that the model
        has and this Gaussian lacks. The factors below were set on 96 Gaussians and mixtures with scales from 0.1 to 10
        and means from 0 to 3, at 32, 256 and 1024 dimensions: docs/likelihood.md tells what the sum covers. Noise of
        the probes makes it larger; it is not taken away, because an error that is lost in noise is not small.

        Args:
            x: (B, ...) float64, the point at which the model was evaluated.
            epsilon: (B, ...) float64, the model's eps at x.
            rest: (B,) 1 - r of the model at x.
        """
        dimensions = x[0].numel()
        shrinkage = (s**2 / (self.variance + s**2)).expand(x.shape[1:])
        expected_rest = shrinkage.mean()
        expected_square = (self.squares(x) * (shrinkage / s).square()).flatten(1).sum(1)
        # A trace by few probes, or of a poor network, may be 0 or below, where no Gaussian has it.
        rest = rest.clamp_min(1e-3)
        model = _local_estimate(epsilon.square().flatten(1).sum(1), rest, dimensions)
        gap = model - _local_estimate(expected_square, expected_rest, dimensions)
        return 2 * gap.abs() + 0.2 * dimensions * (rest - expected_rest).abs()

    def squares(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the squared distances from the mean along the basis vectors, (B, ...)."""
        offsets = x - self.mean
        if self.basis is not None:
            offsets = self.basis.analyse(offsets.flatten(1)).view(offsets.shape)
        return offsets.square()

    def _log_density(self, squares: torch.Tensor, s: float) -> torch.Tensor:
        total = (self.variance + s**2).expand(squares.shape[1:])
        return -0.5 * (squares / total + (2 * math.pi * total).log()).flatten(1).sum(1)


def _local_estimate(square: torch.Tensor, rest: torch.Tensor, dimensions: int) -> torch.Tensor:
    """Returns the log density, up to a constant, of an isotropic Gaussian by its |eps|^2 and its 1 - r at a point."""
    return dimensions / 2 * rest.log() - square / (2 * rest)


def check_prior(shape: torch.Size, mean: Moment, variance: Moment, basis: str = "pixel") -> PriorGaussian:
    """Makes the prior of samples of `shape` with the moments in float64 on the CPU, 0 and 1 where both are None.

    Args:
        basis: coordinates of the variance, "pixel" (the sample's own) or "dct" (of the discrete cosine transform over
            the last two axes).

    Raises:
        InputError: only one of the moments, values that do not broadcast to a sample, or that are not finite or
            negative, an unknown basis.
    """
    if (mean is None) != (variance is None):
        raise InputError("Give both `prior_mean` and `prior_variance` (of the data), or neither for 0 and 1.")
    if basis not in BASES:
        raise InputError(f"`prior_basis` is {basis!r}; allowed: {', '.join(BASES)}.")
    moments = (0.0, 1.0) if mean is None or variance is None else (mean, variance)
    mean, variance = (torch.as_tensor(value, dtype=torch.float64, device="cpu") for value in moments)
    for name, value in (("prior_mean", mean), ("prior_variance", variance)):
        try:
            value.expand(shape)
        except RuntimeError:
            raise InputError(
                f"`{name}` has shape {tuple(value.shape)}; allowed: a number, or what broadcasts to {tuple(shape)}."
            ) from None
    if not (torch.isfinite(mean).all() and torch.isfinite(variance).all() and (variance >= 0).all()):
        raise InputError("`prior_mean` must be finite, and `prior_variance` finite and not negative.")
    return PriorGaussian(mean, variance, DCTBasis(shape) if basis == "dct" else None)
