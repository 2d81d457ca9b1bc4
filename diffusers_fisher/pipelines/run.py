"""One sampling run of a pipeline, repeatable, as a function of its initial noise."""

from __future__ import annotations

from typing import Any

import torch

from ..denoiser import PipelineDenoiser, borrowed


class SamplingRun:
    """Initial noise (B, ...) to final latents by the pipeline's own call, the same run every time.

    The pipeline is left as it was after every call: the run has a scheduler of its own. Prompts are encoded once, and
    stochastic schedulers see the same noise in every run, where the pipeline's call passes them its generator.

    Args:
        pipe: the pipeline.
        scheduler: what it runs on.
        denoiser: of the same pipeline and prompts; keeps the encoded prompts.
        generator: of the scheduler's noise; None: one of its own.
        dtype: of the latents that the pipeline is given.
        evaluated: the denoiser that the backward pass evaluates; marked as outdated where a `callback_on_step_end`
            changes what the network is told. None: `denoiser`.
        **call_arguments: to the pipeline's call.
    """

    def __init__(
        self,
        pipe: Any,
        scheduler: Any,
        denoiser: PipelineDenoiser,
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
        evaluated: PipelineDenoiser | None = None,
        **call_arguments: Any,
    ):
        if generator is None:
            seed = int(torch.randint(2**62, (1,)))
            generator = torch.Generator(pipe._execution_device).manual_seed(seed)
        self._pipe = pipe
        self._borrowed = {
            "scheduler": scheduler,
            "_progress_bar_config": {"disable": True},
            **denoiser.encoding(),
        }
        self._arguments = {"output_type": "latent", "return_dict": False, **call_arguments, "generator": generator}
        if self._arguments.get("callback_on_step_end") is not None:
            self._arguments |= _watched(evaluated or denoiser, self._arguments["callback_on_step_end"])
        self._dtype = dtype
        self._generators = generator if isinstance(generator, list) else [generator]
        self._states = [entry.get_state() for entry in self._generators]

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        for entry, state in zip(self._generators, self._states, strict=True):
            entry.set_state(state)
        with borrowed(self._pipe, **self._borrowed):
            return self._pipe(latents=noise.to(self._dtype), **self._arguments)[0]


def _watched(denoiser: PipelineDenoiser, callback: Any) -> dict[str, Any]:
    """The call arguments for `callback`, with which `denoiser` learns of changes to more than the latents."""

    def watched(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in tensors.items() if name != "latents"}
        versions = {name: getattr(value, "_version", None) for name, value in told.items()}
        scale = getattr(pipe, "_guidance_scale", None)
        result = callback(pipe, step, timestep, tensors)
        taken = [name for name in result if name in pipe._callback_tensor_inputs and name != "latents"]
        changed = [name for name in taken if result[name] is not told.get(name)]
        changed += [name for name, value in told.items() if getattr(value, "_version", None) != versions[name]]
        if getattr(pipe, "_guidance_scale", None) != scale:
            changed.append("guidance_scale")
        if changed:
            denoiser.outdated = f"A callback changed {sorted(set(changed))} after step {step} of the run"
        return result

    # The pipelines ask callbacks of diffusers' own class which tensors they take; `watched` is of no class.
    tensors = getattr(callback, "tensor_inputs", None)
    return {"callback_on_step_end": watched} | (
        {} if tensors is None else {"callback_on_step_end_tensor_inputs": tensors}
    )
