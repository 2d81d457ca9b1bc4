"""Makes the estimators that `fisher_accuracy.py` compares. One of them did not help and is not in the package."""

from collections.abc import Callable
from typing import Any

import torch

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    FisherOperator,
    GaussianFisher,
    Probes,
    TraceCorrectedFisher,
)
from diffusers_fisher.fisher import ModelFisherOperator, rademacher


def priors(samples: torch.Tensor) -> dict[str, GaussianFisher]:
    """Returns Gaussians that are fitted to clean samples."""
    return {
        "Gaussian, isotropic": GaussianFisher.fit_isotropic(samples),
        "Gaussian, diagonal": GaussianFisher.fit_diagonal(samples),
        "Gaussian, DCT": GaussianFisher.fit_diagonal(samples, dct=True),
        "Gaussian, rank 32": GaussianFisher.fit_low_rank(samples, 32),
    }


def estimators(denoiser: Any, gaussians: dict[str, GaussianFisher], autodiff: bool) -> dict[str, Any]:
    """Returns all estimators that a backward pass can use, except the reference."""
    table: dict[str, Any] = (
        {"autodiff, forward (JVP)": AutodiffFisher(denoiser, forward_mode=True)} if autodiff else {}
    )
    return table | {
        "finite difference": FiniteDifferenceFisher(denoiser),
        "finite difference, central": FiniteDifferenceFisher(denoiser, central=True),
        "direct": DirectFisher(),
        **gaussians,
        "direct and Gaussian, mean": Mean(DirectFisher(), gaussians["Gaussian, DCT"]),
        "secants of earlier iterations": Secants(),
        "endpoint, centred": EndpointFisher(centred=True),
        "endpoint (paper's DF-EA)": EndpointFisher(),
    }


def trace_corrected(prior: Any, trace: Any) -> TraceCorrectedFisher:
    return TraceCorrectedFisher(prior, trace)


def exact_trace(operator: FisherOperator, generator: torch.Generator) -> torch.Tensor:
    """Returns the exact trace of an operator at any cost."""
    return operator.trace().value


def trace_or_probes(operator: FisherOperator, generator: torch.Generator) -> torch.Tensor:
    """Returns the trace of an operator in closed form, or by 16 Hutchinson probes if it has none."""
    if operator.calls_per_state or operator.calls_per_product:
        return operator.trace(rademacher(16, operator.state.sample, generator)).value
    return operator.trace().value


def probe_estimators(estimator: Any) -> dict[str, tuple[Any, Callable]]:
    """Returns the trace by Hutchinson and Hutch++ with exact products."""

    def hutchinson(count: int) -> Callable:
        return lambda operator, generator: operator.trace(rademacher(count, operator.state.sample, generator)).value

    def hutch_plus_plus(operator: FisherOperator, generator: torch.Generator) -> torch.Tensor:
        probes = rademacher(11, operator.state.sample, generator).vectors
        return operator.trace(Probes(probes[:5]), sketch=Probes(probes[5:])).value  # 5 + 2 * 6 = 17 products

    return {
        "exact products, 1 probe": (estimator, hutchinson(1)),
        "exact products, 16 probes": (estimator, hutchinson(16)),
        "exact products, Hutch++ (17)": (estimator, hutch_plus_plus),
    }


@torch.no_grad()
def encode_images(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """Returns scaled latents of uint8 images (N, 1, 32, 32), drawn from the autoencoder's posterior."""
    generator, pieces = torch.Generator().manual_seed(1), []
    for batch in images.split(250):
        pixels = (batch.float() / 127.5 - 1).expand(-1, 3, -1, -1)
        pieces.append(pipe.vae.encode(pixels).latent_dist.sample(generator) * pipe.vae.config.scaling_factor)
    return torch.cat(pieces)


def prompt_embeds(pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    positive, negative = pipe.encode_prompt(prompts, pipe.device, 1, True)
    return {"prompt_embeds": positive.detach(), "negative_prompt_embeds": negative.detach()}


def without_memory(estimator: Any) -> Any:
    """Without memory of other runs."""
    return Secants(estimator.memory) if isinstance(estimator, Secants) else estimator


class Mean(FisherEstimator):
    """An estimator that is the mean of two estimators."""

    def __init__(self, left: Any, right: Any):
        self.left, self.right = left, right

    def __call__(self, state: Any, endpoint: Any = None) -> FisherOperator:
        return 0.5 * (self.left(state, endpoint) + self.right(state, endpoint))


class Secants(FisherEstimator):
    """An estimator by secants, which was tried and did not help.

    Differences of model outputs between guidance iterations at the same level are products with the Jacobian that cost
    nothing. The operator is the smallest symmetric change of the direct operator that agrees with them (Powell's
    symmetric Broyden formula for several secants).
    """

    def __init__(self, memory: int = 8):
        self.memory = memory
        self._states: dict[tuple[float, float], list] = {}

    def __call__(self, state: Any, endpoint: Any = None) -> FisherOperator:
        key = float(torch.as_tensor(state.timestep)), float(state.level.sigma)
        states = self._states.get(key, [])
        self._states[key] = [*states, state][-self.memory :]
        return SecantsOperator(state, DirectFisher()(state), states)


class SecantsOperator(ModelFisherOperator):
    """See `Secants`."""

    symmetric = True

    def __init__(self, state: Any, prior: FisherOperator, states: list):
        super().__init__(state)
        self._prior, self._basis = prior, None
        if not states:
            return
        steps = torch.stack([(state.sample - other.sample).flatten(1) for other in states], 2).double()
        changes = torch.stack([(state.model_output - other.model_output).flatten(1) for other in states], 2).double()
        predictions = [prior.output_jacobian(state.sample - other.sample).flatten(1) for other in states]
        left, sizes, right = torch.linalg.svd(steps, full_matrices=False)
        inverse = torch.where(sizes > 0.1 * sizes[:, :1], 1 / sizes, 0.0)
        basis = left * (inverse > 0)[:, None, :]
        residual = (changes - torch.stack(predictions, 2)) @ right.mT * inverse[:, None, :]
        inner = basis.mT @ residual
        self._basis, self._residual, self._inner = basis, residual, (inner + inner.mT) / 2

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        product = self._prior.output_jacobian(v)
        if self._basis is None:
            return product
        columns = v.double().flatten(1)[..., None]
        coefficients = self._basis.mT @ columns
        change = (
            self._residual @ coefficients
            + self._basis @ (self._residual.mT @ columns)
            - self._basis @ (self._inner @ coefficients)
        )
        return product + change[..., 0].view_as(v).to(v.dtype)
