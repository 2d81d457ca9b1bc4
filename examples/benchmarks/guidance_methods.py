"""Makes the guidance methods that are compared: exact gradients in two ways, and every estimator."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    GaussianFisher,
    OneStepFisher,
    PipelineDenoiser,
    fisher_scheduler,
)

DEFAULT = "one step"  # the default of `guide`


class StoredGraph:
    """Full back-propagation through the stock pipeline, with the interface of a differentiable scheduler."""

    def __init__(self, pipe: Any, arguments: dict[str, Any]):
        self.states: list = []
        self._pipe, self._arguments = pipe, arguments
        self._leaf: torch.Tensor | None = None

    @contextlib.contextmanager
    def differentiable(self, estimator: Any, controls: Any = None) -> Iterator["StoredGraph"]:
        yield self

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        self._leaf = noise.detach().requires_grad_()
        with torch.enable_grad():
            call = inspect.unwrap(type(self._pipe).__call__)
            return call(self._pipe, latents=self._leaf, **self._arguments)[0]

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self._leaf)[0]


def embeddings(pipe: Any, prompts: list[str]) -> dict[str, torch.Tensor]:
    """Returns the call arguments that replace `prompts`."""
    positive, negative = pipe.encode_prompt(prompts, pipe.device, 1, True)
    return {"prompt_embeds": positive.detach(), "negative_prompt_embeds": negative.detach()}


class Methods:
    """Holds in `table` (sample, scheduler, estimator) by name of the method; the first two give the exact gradient.

    Args:
        pipe: Stable Diffusion, run on DDIM.
        embeds: `prompt_embeds` and `negative_prompt_embeds`.
        data_latents: (N, C, h, w) clean latents that the Gaussian is fitted to.
    """

    def __init__(
        self, pipe: Any, embeds: dict[str, torch.Tensor], steps: int, guidance_scale: float, data_latents: torch.Tensor
    ):
        self._embeds = embeds
        self._scale, self._latents, self._pipe = guidance_scale, data_latents, pipe
        self.arguments = {
            **self._embeds, "num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "latent",
            "return_dict": False,
        }  # fmt: skip
        config = DDIMScheduler.from_config(pipe.scheduler.config).config
        self._config = config
        scheduler = fisher_scheduler(DDIMScheduler).from_config(config)
        pipeline = self.stock(scheduler)
        stored_graph = StoredGraph(self.stock(), self.arguments)

        def sample(noise: torch.Tensor) -> torch.Tensor:
            return pipeline(latents=noise, **self.arguments)[0]

        # The stored graph needs no estimator; the exact one says that its gradients are not in closed form.
        self.table: dict[str, tuple] = {"stored graph": (stored_graph.sample, stored_graph, AutodiffFisher())}
        self.table |= {name: (sample, scheduler, estimator) for name, estimator in self.estimators().items()}

    def stock(self, scheduler: Any = None) -> StableDiffusionPipeline:
        """Returns the stock pipeline over the same networks, with a scheduler of its own."""
        pipe, components = self._pipe, dict(self._pipe.components)
        components["scheduler"] = DDIMScheduler.from_config(self._config) if scheduler is None else scheduler
        pipeline = StableDiffusionPipeline(**components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(**pipe._progress_bar_config)
        return pipeline

    def estimators(self) -> dict[str, Any]:
        """Returns estimators by name, for any run with these prompts."""
        denoiser = PipelineDenoiser(self.stock(), guidance_scale=self._scale, **self._embeds)
        result: dict[str, Any] = {
            "per-step recomputation": AutodiffFisher(denoiser),
            "direct": DirectFisher(),
            DEFAULT: OneStepFisher(FiniteDifferenceFisher(denoiser)),
            "finite difference": FiniteDifferenceFisher(denoiser),
            "endpoint, centred": EndpointFisher(centred=True),
            "endpoint, paper": EndpointFisher(),
            "gaussian": GaussianFisher.fit_diagonal(self._latents, dct=True),
        }
        if self._scale != 1:  # without classifier-free guidance in the backward pass
            unguided = PipelineDenoiser(self.stock(), guidance_scale=1.0, prompt_embeds=self._embeds["prompt_embeds"])
            result["recomputation, guidance left out"] = AutodiffFisher(unguided).at_guidance_scale(1.0)
            result["finite difference, guidance left out"] = FiniteDifferenceFisher(unguided).at_guidance_scale(1.0)
        return result
