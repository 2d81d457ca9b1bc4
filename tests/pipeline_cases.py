"""Tiny pipelines of the real classes, each with a call: what both mechanisms have to go through unmodified."""

import dataclasses
from collections.abc import Callable
from typing import Any

import tiny
import torch


@dataclasses.dataclass(frozen=True)
class PipelineCase:
    """How to make a pipeline and call it."""

    make: Callable[[], Any]
    guidance_scale: float
    shape: tuple[int, ...] = (2, 4, 8, 8)
    arguments: Callable[[], dict[str, Any]] = lambda: {"prompt": ["a b", "c"]}

    def noise(self) -> torch.Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(0))

    def sample(self, pipe: Any, latents: torch.Tensor, num_inference_steps: int = 4, call=None, **options: Any) -> Any:
        """Returns the pipeline's result for `latents`; `call` stands for its own (one without no_grad, say)."""
        arguments = {**self.arguments(), "guidance_scale": self.guidance_scale, **options}
        call = call or type(pipe).__call__
        return call(
            pipe, latents=latents, num_inference_steps=num_inference_steps, output_type="latent", **arguments
        ).images


def _guided_embeds() -> dict[str, torch.Tensor]:
    embeds = tiny.embeds(2)
    return embeds | {f"negative_{name}": value.flip(0) for name, value in embeds.items()}


PIPELINES = {
    "SD": PipelineCase(tiny.stable_diffusion, 1.0),
    "SD guided": PipelineCase(tiny.stable_diffusion, 4.0),
    "SDXL": PipelineCase(tiny.stable_diffusion_xl, 1.0),
    "SDXL guided": PipelineCase(tiny.stable_diffusion_xl, 4.0),
    "SD3": PipelineCase(tiny.stable_diffusion_3, 1.0, arguments=lambda: tiny.embeds(2)),
    "SD3 guided": PipelineCase(tiny.stable_diffusion_3, 4.0, arguments=_guided_embeds),
    "Flux": PipelineCase(
        tiny.flux, 3.5, (2, 16, 16), lambda: {**tiny.embeds(2), "height": 16, "width": 16}
    ),  # its guidance is an input of the network, so there is one branch
}
