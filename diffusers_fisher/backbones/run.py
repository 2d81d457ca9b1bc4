"""One sampling run of a pipeline, repeatable, as a function of its initial noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from .base import Generators
from .denoiser import PipelineDenoiser

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

StepCallback: TypeAlias = "Callable[[DiffusionPipeline, int, Any, dict[str, Any]], dict[str, Any]]"


class SamplingRun:
    """Runs the pipeline's call from initial noise (B, ...) to final latents, the same run every time.

    Nothing on the pipeline changes: the run has a scheduler of its own. Prompts are encoded once, and stochastic
    schedulers see the same noise in every run, where the pipeline's call passes them its generator.

    Args:
        denoiser: denoiser of the same pipeline and prompts; keeps the encoded prompts.
        scheduler: scheduler of the run.
        generator: generator of the scheduler's noise; None: the run makes one.
        backward_denoiser: denoiser that the backward pass evaluates. It is marked as outdated where a
            `callback_on_step_end` changes the network's conditions.
        **call_arguments: arguments of the pipeline's call.
    """

    def __init__(
        self,
        denoiser: PipelineDenoiser,
        scheduler: SchedulerMixin,
        generator: Generators,
        backward_denoiser: PipelineDenoiser,
        **call_arguments: Any,
    ):
        self._denoiser, self._scheduler = denoiser, scheduler
        if generator is None:
            seed = int(torch.randint(2**62, (1,)))
            generator = torch.Generator(denoiser.device).manual_seed(seed)
        self._arguments = {"output_type": "latent", "return_dict": False, **call_arguments, "generator": generator}
        if self._arguments.get("callback_on_step_end") is not None:
            self._arguments |= _watch_steps(backward_denoiser, self._arguments["callback_on_step_end"])
        generators = generator if isinstance(generator, list) else [generator]
        self._states = [(entry, entry.get_state()) for entry in generators]

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        for entry, state in self._states:
            entry.set_state(state)
        backbone = self._denoiser.backbone
        dtype = backbone.noise_dtype or backbone.dtype
        return backbone.call(
            self._scheduler, noise.to(dtype), encode_prompt=self._denoiser.encode_prompt, **self._arguments
        )[0]


def _watch_steps(denoiser: PipelineDenoiser, callback: StepCallback) -> dict[str, Any]:
    """Returns call arguments for `callback` that mark `denoiser` as outdated after changes to more than latents."""

    def watch(pipe: DiffusionPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        before = {name: value for name, value in tensors.items() if name != "latents"}
        # A tensor's `_version` counts its changes in place.
        versions = {name: getattr(value, "_version", None) for name, value in before.items()}
        scale = vars(pipe).get("_guidance_scale")
        result = callback(pipe, step, timestep, tensors)
        names = [name for name in result if name in pipe._callback_tensor_inputs and name != "latents"]
        changes = [name for name in names if result[name] is not before.get(name)]
        changes += [name for name, value in before.items() if getattr(value, "_version", None) != versions[name]]
        if vars(pipe).get("_guidance_scale") != scale:
            changes.append("guidance_scale")
        if changes:
            denoiser.outdated = f"A callback changed {sorted(set(changes))} after step {step} of the run"
        return result

    # Pipelines ask callbacks of diffusers' own class which tensors they take; `watch` has no such class.
    tensors = getattr(callback, "tensor_inputs", None)
    return {"callback_on_step_end": watch} | (
        {} if tensors is None else {"callback_on_step_end_tensor_inputs": tensors}
    )
