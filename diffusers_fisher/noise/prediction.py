"""The meaning of a raw model output: affine relations between sample, output, epsilon and x_0."""

import dataclasses

import torch

from .level import NoiseLevel

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Describes the meaning of the raw model output by affine relations between sample, output, epsilon and x_0.

    Epsilon and x_0 are both computed from the raw output. Neither is computed from the other, because alpha may be 0.

    Args:
        kind: one of `PREDICTION_TYPES`, or "edm" for a network with EDM's preconditioning (Karras et al., 2022).
        sigma_data: EDM's data standard deviation.
        edm_kind: EDM's own prediction type, "epsilon" or "v_prediction", which determines the sign of the output.
        is_reversed: whether a flow's output is x_0 - epsilon, as networks predict whose time runs from noise to data.
    """

    kind: str
    sigma_data: float = 0.5
    edm_kind: str = "epsilon"
    is_reversed: bool = False

    @property
    def _flow_sign(self) -> float:
        return -1.0 if self.is_reversed else 1.0

    def epsilon_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (a, b) with epsilon = a * sample + b * output."""
        alpha, sigma, norm = level.alpha, level.sigma, level.norm
        if self.kind == "epsilon":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.kind == "v_prediction":
            return sigma / norm**2, alpha / norm
        if self.kind == "flow_prediction":
            return 1 / (alpha + sigma), self._flow_sign * alpha / (alpha + sigma)
        skip, out = self.original_coefficients(level)
        return (1 - alpha * skip) / sigma, -alpha * out / sigma

    def original_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (a, b) with x_0 = a * sample + b * output; infinite for epsilon prediction at alpha = 0."""
        alpha, sigma, norm = level.alpha, level.sigma, level.norm
        if self.kind == "epsilon":
            return 1 / alpha, -sigma / alpha
        if self.kind == "sample":
            return torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.kind == "v_prediction":
            return alpha / norm**2, -sigma / norm
        if self.kind == "flow_prediction":
            return 1 / (alpha + sigma), -self._flow_sign * sigma / (alpha + sigma)
        # These are EDM's c_skip and c_out for x/alpha (alpha = 1), or for a sample scaled by the level's alpha.
        noise_to_signal = sigma / alpha
        total = noise_to_signal**2 + self.sigma_data**2
        sign = -1.0 if self.edm_kind == "v_prediction" else 1.0
        return self.sigma_data**2 / total / alpha, sign * noise_to_signal * self.sigma_data / total.sqrt()

    def output_coefficients(self, level: NoiseLevel) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (a, b, c) with output = a * epsilon + b * x_0 + c * sample, without a division by alpha."""
        alpha, sigma, norm = level.alpha, level.sigma, level.norm
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        if self.kind == "epsilon":
            return one, zero, zero
        if self.kind == "sample":
            return zero, one, zero
        if self.kind == "v_prediction":
            return alpha / norm, -sigma / norm, zero
        if self.kind == "flow_prediction":
            return self._flow_sign * one, -self._flow_sign * one, zero
        skip, out = self.original_coefficients(level)
        return zero, 1 / out, -skip / out
