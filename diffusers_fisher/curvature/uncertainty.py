"""What a denoiser leaves open at a noisy state: the deviation of every element of the clean sample, and directions.

Notation: C = Cov[x_0|x_t] = (sigma^2/alpha^2)(I - sigma^2 F), with leading eigenvectors u_i and eigenvalues lambda_i
(Manor and Michaeli, 2309.13598). The diagonal of C is that of U Lambda U^T, plus that of (I - U U^T) C (I - U U^T) by
random signs v, E[v * P C P v] (Bekas et al., 2007), whose scatter is less than without the directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ..arguments import check_generators, check_kinds
from ..errors import InputError, NumericalError
from ..fisher.estimate import Generators
from ..fisher.numerics import leading_eigenpairs
from ..fisher.operator import FisherOperator
from ..likelihood.draws import ImageDraws
from ..noise import expand

DEFAULT_DIRECTIONS, DEFAULT_PROBES = 3, 32


@dataclasses.dataclass(frozen=True)
class PosteriorUncertainty:
    """Holds what the denoiser leaves open about the clean samples of a batch. All tensors are float64 on the CPU.

    Args:
        mean: (B, ...) posterior mean E[x_0|x_t], in the model's coordinates.
        variance: (B, ...) posterior variance of every element. An estimate by few probes may be below 0.
        variance_error: (B, ...) standard error of `variance` by the probes; 0 where it is exact, infinite for a single
            probe.
        eigenvalues: (n, B) largest eigenvalues of Cov[x_0|x_t], the largest first: variances along the directions.
        eigenvalue_error: (n, B) bound on their error for a symmetric covariance: the norm of the residual.
        directions: (n, B, ...) their eigenvectors, of norm one.
        noise_to_signal: (B,) sigma/alpha of the states.
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole batch, without that of the state itself.
        space: "latent" or "pixel".
    """

    mean: torch.Tensor
    variance: torch.Tensor
    variance_error: torch.Tensor
    eigenvalues: torch.Tensor
    eigenvalue_error: torch.Tensor
    directions: torch.Tensor
    noise_to_signal: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str

    @property
    def standard_deviation(self) -> torch.Tensor:
        """Posterior standard deviation of every element, (B, ...); 0 where the estimated variance is below 0."""
        return self.variance.clamp_min(0).sqrt()

    @property
    def total_variance(self) -> torch.Tensor:
        """Sum of the variances of all elements, (B,)."""
        return self.variance.flatten(1).sum(1)

    @property
    def explained(self) -> torch.Tensor:
        """Share of the total variance along each direction, (n, B)."""
        return self.eigenvalues / self.total_variance

    def interval(self, deviations: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the lower and the upper ends of every element's interval, each (B, ...).

        Args:
            deviations: half of the width, in standard deviations: 1.96 for 95% of a normal posterior.
        """
        width = deviations * self.standard_deviation
        return self.mean - width, self.mean + width

    def sample(self, count: int, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draws clean samples (count, B, ...) from the normal law with this mean, these directions and variances.

        Beside the directions the elements are independent, with the variance that the directions leave of theirs. The
        true posterior need not be normal: these draws are for deviations, not for pictures of likely samples.
        """
        scaled = expand_many(self.eigenvalues.clamp_min(0).sqrt(), self.directions) * self.directions
        rest = (self.variance - scaled.square().sum(0)).clamp_min(0).sqrt()
        along = torch.randn(count, *self.eigenvalues.shape, generator=generator, dtype=torch.float64)
        across = torch.randn(count, *self.mean.shape, generator=generator, dtype=torch.float64)
        return self.mean + torch.einsum("knb,nb...->kb...", along, scaled) + rest * across

    def __str__(self) -> str:
        count, deviation = len(self.mean), self.standard_deviation
        error = self.variance_error.flatten(1).square().sum(1).sqrt() / self.total_variance
        shares = ", ".join(f"{100 * float(share):.0f}%" for share in self.explained.mean(1)) or "none"
        middle, most = float(deviation.mean()), float(deviation.max())
        return "\n".join([
            f"Posterior uncertainty of {count} {self.space} sample{'s' * (count > 1)} of {self.dims} dimensions",
            f"  noise       {float(self.noise_to_signal.mean()):.3g} to one of signal, on average",
            f"  deviation   {middle:.3g} per element on average, {most:.3g} at most",
            f"  error       {100 * float(error.mean()):.2g}% of the total variance by the probes, on average",
            f"  directions  {shares} of the total variance",
            f"  cost        {self.num_denoiser_calls} denoiser calls in all",
        ])  # fmt: skip


@check_kinds
def state_uncertainty(
    operator: FisherOperator,
    num_directions: int = DEFAULT_DIRECTIONS,
    num_probes: int | None = DEFAULT_PROBES,
    generator: Generators = None,
    keys: Sequence[str] | None = None,
    space: str = "latent",
    num_iterations: int = 6,
) -> PosteriorUncertainty:
    """Returns the posterior's deviation of every element and its leading directions, at the state of an operator.

        denoiser = PipelineDenoiser(pipe, prompt="a photo of a coat")
        operator = FiniteDifferenceFisher(denoiser)(denoiser.state(noisy_latents, timestep))
        print(state_uncertainty(operator).standard_deviation)

    Args:
        operator: Fisher at a state with noise. Where it is not quite symmetric, as a network's, its products are taken
            as if it were.
        num_directions: number n of leading directions; 0: none.
        num_probes: number of random directions for the variances; None: the exact diagonal, by d products.
        generator: gives the seed of the probes, of which each is a function of this seed and the sample alone.
        keys: one key per sample for its probes; None: a key of the sample's values.
        space: "latent" or "pixel", for the output.
        num_iterations: number of blocks of the iteration for the directions, each of n + 2 products. More make them
            more exact: `eigenvalue_error` bounds what is left.

    Returns:
        `PosteriorUncertainty`. Cost: (n + 2) * `num_iterations` + `num_probes` products for the whole batch.

    Raises:
        InputError: a number that is not allowed, or a state without noise.
        NumericalError: a product that is not finite.
    """
    state = operator.state
    sample = state.sample
    check_generators(generator, len(sample))
    dims = sample[0].numel()
    if not 0 <= num_directions < dims or num_iterations < 1 or (num_probes is not None and num_probes < 1):
        raise InputError(
            f"`num_directions` is {num_directions}, `num_iterations` {num_iterations} and `num_probes` {num_probes}; "
            f"allowed: 0 to {dims - 1}, at least 1, and at least 1 or None for the exact diagonal."
        )
    with torch.no_grad():
        values, errors, vectors, products = _directions(operator, num_directions, num_iterations)
        signs = None
        if num_probes is not None:
            signs = ImageDraws(sample, generator, keys).signs(num_probes, "posterior").to(sample.dtype)
        variance, error, calls = _variances(operator, values, vectors, signs)
    if not torch.isfinite(variance).all():
        raise NumericalError(
            f"{int((~torch.isfinite(variance)).sum())} posterior variances are not finite. Check the network's output "
            "at this noise level."
        )
    level = state.level.noise_to_signal.cpu().expand(len(sample))
    return PosteriorUncertainty(
        state.pred_original_sample.detach().cpu().double(), variance, error, values, errors, vectors, level, dims,
        calls + products * operator.calls_per_product, space,
    )  # fmt: skip


def expand_many(values: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Shapes numbers (n, B) to multiply vectors (n, B, ...)."""
    return values.view(*values.shape, *[1] * (vectors.ndim - 2))


def _directions(
    operator: FisherOperator, count: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Returns eigenvalues (n, B) of C, the norms of their residuals, eigenvectors (n, B, ...), and the products."""
    sample = operator.state.sample
    if count == 0:
        none = torch.zeros(0, len(sample), dtype=torch.float64)
        return none, none, torch.zeros(0, *sample.shape, dtype=torch.float64), 0
    return leading_eigenpairs(operator.covariance, sample, count, iterations)


def _variances(
    operator: FisherOperator, values: torch.Tensor, vectors: torch.Tensor, signs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Returns the diagonal of C, its standard error, both (B, ...), and the number of denoiser calls.

    Args:
        values, vectors: leading eigenvalues (n, B) and eigenvectors (n, B, ...).
        signs: (k, B, ...) random signs; None: the exact diagonal.
    """
    level = operator.state.level
    if signs is None:
        estimate = operator.diagonal()
        diagonal, noise, ratio = (each.cpu() for each in (estimate.value, level.sigma, level.noise_to_signal))
        variance = expand(ratio.square(), diagonal) * (1 - expand(noise.square(), diagonal) * diagonal)
        return variance, torch.zeros_like(variance), estimate.num_denoiser_calls
    rest = _rest_by_probes(operator, vectors, signs.to(operator.state.sample.device))
    variance = torch.einsum("nb,nb...->b...", values, vectors.square()) + rest.mean(0)
    count = len(signs)
    error = rest.std(0) / count**0.5 if count > 1 else torch.full_like(variance, torch.inf)
    return variance, error, operator.calls_per_state + count * operator.calls_per_product


def _rest_by_probes(operator: FisherOperator, vectors: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """Returns v * P C P v for signs v (k, B, ...), with P = I - U U^T; (k, B, ...) float64 on the CPU."""

    def project(v: torch.Tensor) -> torch.Tensor:
        return v - torch.einsum("nb,nb...->b...", torch.einsum("nb...,b...->nb", vectors, v), vectors)

    rows = []
    for v in signs:
        wide = v.cpu().double()
        product = operator.covariance(project(wide).to(v.dtype).to(v.device)).cpu().double()
        rows.append(wide * project(product))
    return torch.stack(rows)
