"""Trace matching (DF-TM): the trace, diagonal and products of the Fisher from a trained trace model.

Notation: M = Cov[eps|x_t], r = tr M/d, F = (I - M)/sigma^2, C = (sigma^2/alpha^2) M; the model gives M = r I, or
M = Q diag(m) Q^T with Q the identity or the discrete cosine transform (Wang et al., ICML 2025, arXiv 2505.23264).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..distributions.covariance import DCTBasis
from ..errors import InputError
from ..noise import DenoisingState, expand
from .calibration import TraceCalibration
from .estimator import FisherEstimator
from .numerics import widen
from .operator import FisherOperator

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

LOG_NOISE_RANGE = 20.0  # Trace models clamp log(sigma/alpha), which is infinite for pure noise, to +-20.


class TraceOutput(Protocol):
    """The output of a trace model for a batch, float32. One of the two tensors is set.

    Attributes:
        logits: logits of r, (B,), or of m, (B, ...) in the model's basis.
        second_moment: E[|x_0|^2/d | x_t], (B,), of models with target "norm".
    """

    logits: torch.Tensor | None
    second_moment: torch.Tensor | None


@runtime_checkable
class TraceModel(Protocol):
    """A network that predicts the trace of the diffusion Fisher, such as `FisherTraceModel`.

    `config` has "output" ("trace" or "diagonal"), "basis" ("pixel" or "dct") and "pooled_channels" (a number or None),
    and may have "calibration" (the fields of `TraceCalibration`, or None).
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def target(self) -> str: ...

    def evaluate(self, state: DenoisingState, pooled: torch.Tensor | None = None) -> TraceOutput: ...

    def check_fingerprint(self, denoiser: Denoiser | DiffusionPipeline) -> None: ...


class TraceMatchingFisher(FisherEstimator):
    """Computes the Fisher from a trained `FisherTraceModel`: a multiple of the identity, or diagonal in its basis.

    The model's `target` says whose trace it is: the trace for the data ("residual", "norm") or for the denoiser's own
    Jacobian ("jacobian"). For likelihoods pass `num_probes=None`: the trace then has only the error of the model.
    Inside `scheduler.differentiable(...)` a multiple of the identity gives the direction of `DirectFisher`, with
    another length at every step.

    Cost: one evaluation of the trace model per state, no denoiser call, no graph.

    Args:
        trace_model: model that was trained for the denoiser of the states. `bind` compares its fingerprint with that
            of the denoiser, and the operator compares the prediction type.
        pooled: (B, pooled_channels) or (1, pooled_channels), for models that take a pooled text embedding. None:
            `bind` takes the vectors of the denoiser's conditions.
        check: whether to compare fingerprints. Pass False only if you know that the model was trained for this
            denoiser.
    """

    default_num_probes = None

    @check_kinds
    def __init__(self, trace_model: TraceModel, pooled: torch.Tensor | None = None, check: bool = True):
        if not isinstance(trace_model, TraceModel):
            raise InputError(
                f"TraceMatchingFisher takes a FisherTraceModel, got {type(trace_model).__name__}; load one with "
                "FisherTraceModel.from_pretrained(...)."
            )
        self.trace_model = trace_model
        self.pooled = pooled
        self.check = check

    @property
    def description(self) -> str:
        """The estimator with the target of its model."""
        return f"TraceMatchingFisher (target {self.trace_model.target})"

    @property
    def models_trace(self) -> bool:
        return True

    @property
    def holds_condition(self) -> bool:
        return self.pooled is not None

    @property
    def calibration(self) -> TraceCalibration | None:
        """Errors of the trace model on held-out images; None where they were not measured."""
        values = self.trace_model.config.get("calibration")
        return None if values is None else TraceCalibration(**values)

    def check_denoiser(self, denoiser: Denoiser | DiffusionPipeline) -> None:
        """Compares the trace model's fingerprint with that of `denoiser`, unless `check` is False.

        Raises:
            InputError: the trace model was trained for another denoiser; the message says what differs.
        """
        if self.check:
            self.trace_model.check_fingerprint(denoiser)

    def bind(self, denoiser: Denoiser) -> TraceMatchingFisher:
        """Calls `check_denoiser`, and returns the estimator with pooled vectors if its model takes them.

        Without `pooled` the vectors are those of the denoiser's conditions.
        """
        self.check_denoiser(denoiser)
        if self.pooled is not None or self.trace_model.config["pooled_channels"] is None:
            return self
        return self.replace(pooled=denoiser.pooled_condition())

    def select_samples(self, rows: torch.Tensor, select: Callable[[Denoiser], Denoiser]) -> TraceMatchingFisher:
        """Returns the estimator with the pooled vectors of these samples; see `FisherEstimator.select_samples`."""
        if self.pooled is None or len(self.pooled) == 1:
            return self
        return self.replace(pooled=self.pooled[rows.to(self.pooled.device)])

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> TraceMatchingOperator:
        return TraceMatchingOperator(state, self.trace_model, self.pooled)


class TraceMatchingOperator(FisherOperator):
    """See `TraceMatchingFisher`. The model is evaluated at the first use."""

    chunk_size = 64

    def __init__(self, state: DenoisingState, trace_model: TraceModel, pooled: torch.Tensor | None = None):
        super().__init__(state)
        self._model = trace_model
        self._pooled = pooled
        self._transform: DCTBasis | None = None
        if trace_model.config["output"] == "diagonal" and trace_model.config["basis"] == "dct":
            self._transform = DCTBasis(tuple(state.sample.shape[1:])).to(state.sample.device)

    @functools.cached_property
    def _shares(self) -> tuple[torch.Tensor, torch.Tensor]:
        """m and 1 - m, each (B, 1, ...) or (B, ...) in the model's basis, float64."""
        m, one_minus_m = noise_shares(self._model.evaluate(self.state, self._pooled), self.state)
        if not bool(torch.isfinite(m).all()):
            raise InputError("The trace model's output is not finite; its weights or the state's output are damaged.")
        sample = self.state.sample
        shape = (len(m), *[1] * (sample.ndim - 1)) if m.ndim == 1 else m.shape
        device = widen(sample[:0]).device
        return m.to(device).view(shape), one_minus_m.to(device).view(shape)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        variance = (self.state.level.sigma / self._alpha).square()
        return self._apply(self._shares[0] * expand(variance, self._shares[0]), v)

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return self._apply(self._shares[0], v) / expand(self._alpha, v)

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return self._apply(self._shares[1], v) / expand(self.state.level.sigma, v)

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self._check_many(vectors)
        self._check_noise()
        return self._apply(self._shares[1], vectors) / expand(self.state.level.sigma**2, vectors[0])

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        sample, one_minus_m = self.state.sample, self._shares[1]
        if self._transform is not None:
            one_minus_m = self._transform.diagonal(one_minus_m.flatten(1)).view(sample.shape)
        diagonal = one_minus_m.expand(sample.shape)
        return diagonal / expand(self.state.level.sigma**2, diagonal), 0

    def exact_trace(self) -> tuple[torch.Tensor, int]:
        one_minus_m = self._shares[1].flatten(1).mean(1)  # the trace is the same in every basis
        variance = self._numbers(self.state.level.sigma**2).to(one_minus_m.device)
        return self.state.sample[0].numel() * one_minus_m / variance, 0

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        one_minus_m = self._shares[1]
        eigenvalues = one_minus_m / expand(self.state.level.sigma**2, one_minus_m) + expand(shift, one_minus_m)
        return self._apply(1 / eigenvalues, v)

    @property
    def _alpha(self) -> torch.Tensor:
        """alpha, raised to the smallest value that the model takes."""
        level = self.state.level
        return torch.maximum(level.alpha, level.sigma * math.exp(-LOG_NOISE_RANGE))

    def _apply(self, factors: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Returns Q diag(factors) Q^T v for v (..., B, *shape), in the dtype of `v`."""
        if self._transform is None:
            return factors.to(v.dtype).to(v.device) * v
        axes = self.state.sample.ndim - 1
        z = self._transform.analyse(v.double().flatten(-axes))
        return self._transform.synthesise(factors.flatten(1) * z).to(v.dtype).view(v.shape)


def noise_shares(output: TraceOutput, state: DenoisingState) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns m, the posterior variance of the noise, and 1 - m, (B,) or (B, ...) float64, from a model's output.

    From a second moment (target "norm") m is (alpha^2/sigma^2)(E[|x_0|^2/d | x_t] - |x0hat|^2/d). This is a difference
    of two numbers of order one, which are nearly equal at small noise, so m may be negative or above one.
    """
    if output.logits is not None:
        logits = widen(output.logits)
        return torch.sigmoid(logits), torch.sigmoid(-logits)
    if output.second_moment is None:
        raise InputError("The trace model's output is empty; pass what its `forward` or `evaluate` returns.")
    moment = widen(output.second_moment)
    level, clean = state.level, widen(state.pred_original_sample.detach())
    snr = (level.alpha / level.sigma).square().to(moment.device)
    m = snr * (moment - clean.square().flatten(1).mean(1).to(moment.device))
    return m, 1 - m
