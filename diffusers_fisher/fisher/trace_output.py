"""What `TraceMatchingFisher` takes from a trace model.

Notation: M = Cov[eps|x_t], r = tr M/d, m the eigenvalues of M in the model's basis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from diffusers.utils import BaseOutput

from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import DenoisingState

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

LOG_NOISE_RANGE = 20.0  # trace models clamp log(sigma/alpha) to +-20, where pure noise has infinity


@dataclasses.dataclass
class FisherTraceOutput(BaseOutput):
    """What a trace model returns for a batch, float32; one of the two is set.

    Args:
        logits: logits of r, (B,), or of the diagonal of Cov[eps|x_t] in the model's basis, (B, ...).
        second_moment: E[|x_0|^2/d | x_t], (B,), from models of target "norm".
    """

    logits: torch.Tensor | None = None
    second_moment: torch.Tensor | None = None


@runtime_checkable
class TraceModel(Protocol):
    """A network that knows the trace of the diffusion Fisher, as `FisherTraceModel` does.

    `config` has "output" ("trace" or "diagonal"), "basis" ("pixel" or "dct") and "pooled_channels" (a number or None).
    """

    @property
    def config(self) -> Mapping[str, Any]: ...

    @property
    def target(self) -> str: ...

    def evaluate(self, state: DenoisingState, pooled: torch.Tensor | None = None) -> FisherTraceOutput: ...

    def check_fingerprint(self, denoiser: Denoiser | DiffusionPipeline) -> None: ...


def noise_shares(output: FisherTraceOutput, state: DenoisingState) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns m and 1 - m of a trace model's output, (B,) or (B, ...) float64: m the posterior variance of the noise.

    From a second moment (target "norm") m is (alpha^2/sigma^2)(E[|x_0|^2/d | x_t] - |x0hat|^2/d), a difference of two
    numbers of order one that at small noise are nearly equal; it may come out negative or above one.
    """
    if output.logits is not None:
        logits = output.logits.double()
        return torch.sigmoid(logits), torch.sigmoid(-logits)
    if output.second_moment is None:
        raise InputError("The trace model's output is empty; pass what its `forward` or `evaluate` returns.")
    moment = output.second_moment.double()
    level, clean = state.level, state.pred_original_sample.detach().double()
    snr = (level.alpha / level.sigma).square().to(moment.device)
    m = snr * (moment - clean.square().flatten(1).mean(1).to(moment.device))
    return m, 1 - m
