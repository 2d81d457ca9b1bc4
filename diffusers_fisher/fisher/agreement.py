"""Compares an estimator's denoiser with the outputs of the run whose Jacobian it gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import DenoisingState, expand

ModelFunction = Callable[[torch.Tensor, Any], torch.Tensor]
"""A network as a function `(model_input, timestep) -> raw model output`, which autograd can differentiate. The
timestep is that of the state."""

SAME_OUTPUT = 1e-3
"""Relative difference that two evaluations of one denoiser may have in any dtype. On the embedded checkpoint rounding
in float32 makes 1e-5, and another prompt, or guidance at scale 1 instead of 2, 0.04 or more. Differences of outputs
allow less than a gradient does: their error is this one divided by the length of the difference, 0.01."""

ROUNDINGS = 4.0
"""Roundings of the network's dtype in a relative difference. Stable Diffusion with Euler's scaled input has 1.2."""

TF32_ROUNDING = 2.0**-10
"""Accelerators may multiply float32 numbers with this rounding."""


def model_function(denoiser: Denoiser | ModelFunction | None) -> ModelFunction:
    """Returns the raw model output of a `Denoiser` as a function, and returns functions unchanged.

    Raises:
        InputError: there is no denoiser.
    """
    if denoiser is None:
        raise InputError(
            "The estimator has no denoiser; give it one, such as AutodiffFisher(PipelineDenoiser(pipe, prompt=...)), "
            "or pass it to a pipeline's `guide` or `log_likelihood`, which put in their own."
        )
    return denoiser.model_output if isinstance(denoiser, Denoiser) else denoiser


@torch.no_grad()
def check_states(denoiser: Denoiser | ModelFunction | None, states: Sequence[DenoisingState]) -> None:
    """Compares a denoiser with the model outputs of a run's first, middle and last state, by one call for each.

    Raises:
        InputError: the outputs differ by more than rounding.
    """
    function = model_function(denoiser)
    for index in sorted({0, len(states) // 2, len(states) - 1}):
        state = states[index]
        model_input = expand(state.input_scale, state.sample) * state.sample
        check_output(denoiser, state, function(model_input, state.known_timestep))


def check_output(denoiser: Denoiser | ModelFunction | None, state: DenoisingState, output: torch.Tensor) -> None:
    """Compares the `output` of an estimator's denoiser at `state` with the state's own model output.

    Raises:
        InputError: the outputs differ by more than rounding, in any sample.
    """
    difference, tolerance = output_difference(denoiser, state, output)
    if not difference <= tolerance:
        known = denoiser if isinstance(denoiser, Denoiser) else None
        scale = None if known is None else known.guidance_scale
        own = "" if scale is None else f" (guidance scale {scale:g})"
        raise InputError(
            f"The estimator's denoiser{own} differs from the run's output by {difference:.2g} of its size at timestep "
            f"{state.timestep}, where rounding explains {tolerance:.2g}; usual causes are another guidance scale or "
            "prompt, a cache, dropout, or conditions that change during the run. Make it with the arguments of the "
            "run's call, as PipelineDenoiser(pipe, guidance_scale=..., prompt=...), or pass `adjoint_guidance_scale` "
            "if it has another guidance scale on purpose."
        )


def output_difference(
    denoiser: Denoiser | ModelFunction | None, state: DenoisingState, output: torch.Tensor
) -> tuple[float, float]:
    """Returns the largest difference over the samples between a denoiser's `output` at `state` and the state's own,
    relative to its size, and how large rounding may make it.

    Raises:
        InputError: the outputs have different shapes.
    """
    expected = state.model_output.detach()
    if output.shape != expected.shape:
        raise InputError(
            f"The estimator's denoiser returned the shape {tuple(output.shape)} where the run's output has "
            f"{tuple(expected.shape)}. Make it return the raw model output at its input, without a learned variance."
        )
    known = denoiser if isinstance(denoiser, Denoiser) else None
    scale = 1.0 if known is None or known.guidance_scale is None else known.guidance_scale
    dtypes = {output.dtype, (known.input_dtype if known is not None else None) or output.dtype}
    rounding = max(torch.finfo(dtype).eps for dtype in dtypes)
    if output.device.type != "cpu":
        rounding = max(rounding, TF32_ROUNDING)
    # Guidance adds two rounded outputs with these factors, and its result need not be larger than either.
    tolerance = max(SAME_OUTPUT, ROUNDINGS * rounding * max(1.0, math.hypot(scale, scale - 1)))
    error = (output.detach().to(expected.dtype) - expected).flatten(1).norm(dim=1)
    return float((error / expected.flatten(1).norm(dim=1).clamp_min(1e-30)).max()), tolerance
