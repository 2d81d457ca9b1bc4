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
        **call_arguments: to the pipeline's call.
    """

    def __init__(
        self,
        pipe: Any,
        scheduler: Any,
        denoiser: PipelineDenoiser,
        generator: torch.Generator | list[torch.Generator] | None,
        dtype: torch.dtype,
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
        self._dtype = dtype
        self._generators = generator if isinstance(generator, list) else [generator]
        self._states = [entry.get_state() for entry in self._generators]

    def __call__(self, noise: torch.Tensor) -> torch.Tensor:
        for entry, state in zip(self._generators, self._states, strict=True):
            entry.set_state(state)
        with borrowed(self._pipe, **self._borrowed):
            return self._pipe(latents=noise.to(self._dtype), **self._arguments)[0]
