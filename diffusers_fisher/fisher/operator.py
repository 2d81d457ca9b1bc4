"""The one noun in the middle: the diffusion Fisher at a state, as a linear operator.

Notation: F = -grad^2 log q_t(x_t) (Wang et al., ICML 2025, arXiv 2505.23264), C = Cov[x_0|x_t];
F = I/sigma^2 - (alpha^2/sigma^4) C. The Jacobian of the predicted noise is sigma F, that of the predicted x_0 is
(alpha/sigma^2) C.
"""

import abc
import dataclasses
from collections.abc import Iterator
from typing import Protocol

import torch

from ..errors import InputError
from ..noise import expand
from ..state import DenoisingState


@dataclasses.dataclass(frozen=True)
class TraceEstimate:
    """The trace of the diffusion Fisher, with its error.

    Args:
        value: (B,) float64.
        standard_error: (B,) float64; zero for exact traces, infinite for a single probe.
        per_probe: (k, B) float64, each probe's own estimate; (0, B) for an exact trace.
        num_denoiser_calls: forward evaluations of the denoiser spent on it.
    """

    value: torch.Tensor
    standard_error: torch.Tensor
    per_probe: torch.Tensor
    num_denoiser_calls: int

    @property
    def num_probes(self) -> int:
        """Probes averaged; 0 for an exact trace."""
        return len(self.per_probe)


class FisherOperator(abc.ABC):
    """The diffusion Fisher F at `state`, through products with the posterior covariance.

    Subclasses give `covariance(v)`; everything else follows. Every product takes and returns (B, ...) tensors of the
    state's shape, one vector a sample, in the scheduler's carried coordinates.
    """

    calls_per_state = 0  # denoiser evaluations that making the operator ready costs
    calls_per_product = 0  # and that each product costs

    def __init__(self, state: DenoisingState):
        self.state = state

    @abc.abstractmethod
    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        """C v, the product with the posterior covariance Cov[x_0|x_t]."""

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Product with the transposed Jacobian of the predicted x_0: (alpha/sigma^2) C v."""
        level = self.state.level
        return expand(level.alpha / level.sigma**2, v) * self.covariance(v)

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Product with the transposed Jacobian of the predicted noise: sigma F v = (v - alpha J_{x_0}^T v)/sigma."""
        level = self.state.level
        return (v - expand(level.alpha, v) * self.original_jacobian(v)) / expand(level.sigma, v)

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Product with the transposed Jacobian of the raw model output, whatever the prediction type."""
        noise, original, identity = self.state.prediction.output_coefficients(self.state.level)
        result = expand(identity, v) * v
        if bool((noise != 0).any()):
            result = result + expand(noise, v) * self.epsilon_jacobian(v)
        if bool((original != 0).any()):
            result = result + expand(original, v) * self.original_jacobian(v)
        return result

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """F v, (B, ...)."""
        self._check(v)
        return self.epsilon_jacobian(v) / expand(self.state.level.sigma, v)

    def dense(self) -> torch.Tensor:
        """F as a matrix a sample, (B, d, d), with `dense() @ v == matvec(v)`. Cost: d products."""
        return torch.stack([column for _, column in self._columns()], dim=-1)

    def trace(self, probes: torch.Tensor | None = None) -> TraceEstimate:
        """The trace of F, a sample.

        Args:
            probes: (k, B, ...) random vectors with identity covariance for Hutchinson's estimate (Hutchinson, 1990);
                None for the exact trace, at d products.

        Raises:
            InputError: no probe, or probes of another shape.
        """
        if probes is None:
            value, products = self._exact_trace()
            calls = self.calls_per_state + products * self.calls_per_product
            return TraceEstimate(value, torch.zeros_like(value), value.new_empty(0, len(value)), calls)
        values = self._quadratic_forms(probes)
        count = len(values)
        error = values.std(0) / count**0.5 if count > 1 else torch.full_like(values[0], float("inf"))
        calls = self.calls_per_state + count * self.calls_per_product
        return TraceEstimate(values.mean(0), error, values, calls)

    def _exact_trace(self) -> tuple[torch.Tensor, int]:
        """tr F (B,) float64, and the products spent on it; closed forms know it without any."""
        diagonal = [column[:, index].double() for index, column in self._columns()]
        return torch.stack(diagonal).sum(0), len(diagonal)

    def _columns(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Every column of F with its index, (B, d)."""
        sample = self.state.sample
        for index in range(sample[0].numel()):
            basis = torch.zeros_like(sample).flatten(1)
            basis[:, index] = 1
            yield index, self.matvec(basis.view_as(sample)).flatten(1)

    def _trace_of_covariance(self, trace: torch.Tensor) -> torch.Tensor:
        """tr F = d/sigma^2 - (alpha^2/sigma^4) tr C from tr C (B,), float64."""
        level = self.state.level
        alpha, sigma = level.alpha.to(trace.device), level.sigma.to(trace.device)
        return self.state.sample[0].numel() / sigma**2 - alpha**2 / sigma**4 * trace.double()

    def _quadratic_forms(self, probes: torch.Tensor) -> torch.Tensor:
        """v^T F v for every probe, (k, B) float64: Hutchinson's estimates (Hutchinson, 1990)."""
        shape = self.state.sample.shape
        if probes.ndim != len(shape) + 1 or len(probes) == 0 or probes.shape[1:] != shape:
            raise InputError(
                f"Probes have shape {tuple(probes.shape)}; allowed: (k, {', '.join(map(str, shape))}) with k >= 1."
            )
        return torch.stack([(probe * self.matvec(probe)).double().flatten(1).sum(1) for probe in probes])

    def _check(self, v: torch.Tensor) -> None:
        if v.shape != self.state.sample.shape:
            raise InputError(
                f"The vector has shape {tuple(v.shape)}; the operator's state has {tuple(self.state.sample.shape)}. "
                "Pass one vector a sample, of the sample's shape."
            )


class ModelFisherOperator(FisherOperator):
    """An operator whose subclasses give products with the model's own (transposed) Jacobian, `output_jacobian`.

    A learned Jacobian is not symmetric: `matvec` is the product with the transposed F, and with a true score the two
    agree.
    """

    @abc.abstractmethod
    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Product with the transposed Jacobian of the raw model output with respect to the carried sample."""

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        sample_factor, output_factor = self.state.prediction.original_coefficients(self.state.level)
        return expand(sample_factor, v) * v + expand(output_factor, v) * self.output_jacobian(v)

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        sample_factor, output_factor = self.state.prediction.epsilon_coefficients(self.state.level)
        return expand(sample_factor, v) * v + expand(output_factor, v) * self.output_jacobian(v)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        level = self.state.level
        return expand(level.sigma**2 / level.alpha, v) * self.original_jacobian(v)


class FisherEstimator(Protocol):
    """Anything that makes a `FisherOperator` of a state; `endpoint` is the clean end of the run, where known."""

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator: ...


def rademacher(
    count: int, like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> torch.Tensor:
    """(count, *like.shape) random signs in the dtype of `like`, fit for `FisherOperator.trace`."""
    from diffusers.utils.torch_utils import randn_tensor

    if count < 1:
        raise InputError(f"`num_probes` is {count}; allowed: at least 1, or None for the full Jacobian.")
    draws = [randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype) for _ in range(count)]
    return torch.where(torch.stack(draws) < 0, -1.0, 1.0).to(like.dtype)
