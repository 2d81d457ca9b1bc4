"""One noise level, and how its coefficients multiply samples.

Notation: x_t = alpha_t x_0 + sigma_t eps, eps ~ N(0, I); s = sigma/alpha is the noise-to-signal ratio.
"""

import dataclasses

import torch

from ..arguments import check_kinds
from ..errors import InputError, check_floats

Timestep = float | int | torch.Tensor
"""A (possibly fractional) timestep in the scheduler's unit: a number, or a tensor of shape () or (B,)."""


@check_kinds
@dataclasses.dataclass(frozen=True)
class NoiseLevel:
    """Holds one noise level, or one per sample.

    Args:
        alpha: float64 tensor, shape () or (B,); factor on the clean sample.
        sigma: float64 tensor, same shape; standard deviation of the noise.
    """

    alpha: torch.Tensor
    sigma: torch.Tensor

    @classmethod
    def from_log_noise_to_signal(cls, log_s: torch.Tensor) -> "NoiseLevel":
        """Makes the variance-preserving level with log(sigma/alpha) = `log_s`; infinite values are allowed."""
        log_s = torch.as_tensor(log_s, dtype=torch.float64)
        return cls(torch.sigmoid(-2 * log_s).sqrt(), torch.sigmoid(2 * log_s).sqrt())

    @classmethod
    def from_alpha_bar(cls, alpha_bar: torch.Tensor | float) -> "NoiseLevel":
        """Makes the variance-preserving level with alpha^2 = `alpha_bar`; 1 is a clean sample."""
        alpha_bar = torch.as_tensor(alpha_bar, dtype=torch.float64)
        return cls(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())

    @property
    def noise_to_signal(self) -> torch.Tensor:
        """s = sigma/alpha; infinite where alpha is 0."""
        return self.sigma / self.alpha

    @property
    def log_noise_to_signal(self) -> torch.Tensor:
        """log(sigma/alpha)."""
        return self.sigma.log() - self.alpha.log()

    @property
    def norm(self) -> torch.Tensor:
        """sqrt(alpha^2 + sigma^2): 1 for variance-preserving levels."""
        return torch.hypot(self.alpha, self.sigma)

    def scaled(self, factor: torch.Tensor | float) -> "NoiseLevel":
        """Returns the level of the same sample multiplied by `factor`."""
        return NoiseLevel(self.alpha * factor, self.sigma * factor)


def expand(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shapes a number () or one number per sample (B,) to multiply `like` (B, ...) without widening its dtype.

    Raises:
        InputError: another number of samples, or `like` has integers, which would round the numbers to 0.
    """
    check_floats("The tensor", like)
    if value.ndim == 0:
        return value.to(like.device, like.dtype)
    if value.shape != like.shape[:1]:
        raise InputError(f"Noise levels were given for {len(value)} samples, but the batch has {len(like)}.")
    return value.to(like.device, like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def combine(
    factors: tuple[torch.Tensor, torch.Tensor], left: torch.Tensor, right: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """Returns the first factor times `left` plus the second factor times `right`; each factor is () or (B,).

    Args:
        left, right: (..., B, *shape).
        like: (B, *shape), in the dtype of the products.
    """
    return expand(factors[0], like) * left + expand(factors[1], like) * right
