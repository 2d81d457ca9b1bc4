"""Differences of log-likelihoods with their paired error: which prompt fits an image, which image is likelier."""

from __future__ import annotations

import dataclasses

import torch
from diffusers.utils import BaseOutput

from .squared_error import stratified_error
from .traces import level_error, scatter_error

METHODS = ("squared error", "ode")
MAX_IMAGES = 10  # in print


@dataclasses.dataclass
class LikelihoodComparison(BaseOutput):
    """Holds log-likelihoods of B images under P prompts by the same noise, levels and probes. Float64 on the CPU.

    Args:
        log_prob: (P, B) nats.
        contributions: nats by each random draw, paired over prompts. "squared error": (n, P, B), `log_prob` by each
            level with its noise, paired over images too. "ode": (levels, k, P, B), parts of `log_prob` by each level
            and probe; k = 0 where nothing was random.
        discretisation_error: (P, B) nats, error of the ODE, mostly equal for all prompts; zero with "squared error".
        dims: dimensions of one sample.
        num_denoiser_calls: evaluations of the denoiser for the whole table.
        space: "latent" or "pixel".
        method: "squared error" or "ode".
        trace_weights: (levels,) nats of "ode", see `LikelihoodOutput`; None for "squared error".
        fixed_probes: whether "ode" took the same probes at all levels.
    """

    log_prob: torch.Tensor
    contributions: torch.Tensor
    discretisation_error: torch.Tensor
    dims: int
    num_denoiser_calls: int
    space: str
    method: str
    trace_weights: torch.Tensor | None = None
    fixed_probes: bool = False

    def __str__(self) -> str:
        prompts, images = self.log_prob.shape
        lines = [
            f"Log-likelihoods of {images} {self.space} sample{'s' * (images > 1)} under {prompts} "
            f"prompt{'s' * (prompts > 1)}, by method '{self.method}' with {self.num_denoiser_calls} denoiser calls"
        ]
        if prompts > 1:
            differences, errors = (each.gather(0, self.prompt_order[1:2])[0] for each in self.behind_best_prompt())
            lines += [
                f"  image {index}: prompt {best} is likeliest, the next by {-difference:.4g} +- {error:.2g} nats less"
                for index, (best, difference, error) in enumerate(
                    zip(self.best_prompt.tolist()[:MAX_IMAGES], differences.tolist(), errors.tolist(), strict=False)
                )
            ]
            lines += ["  ..."] * (images > MAX_IMAGES)
        return "\n".join(lines)

    @property
    def best_prompt(self) -> torch.Tensor:
        """(B,) index of each image's likeliest prompt."""
        return self.log_prob.argmax(0)

    @property
    def prompt_order(self) -> torch.Tensor:
        """(P, B) indices of the prompts, the likeliest first, for each image."""
        return self.log_prob.argsort(0, descending=True)

    @property
    def image_order(self) -> torch.Tensor:
        """(P, B) indices of the images, the likeliest first, under each prompt."""
        return self.log_prob.argsort(1, descending=True)

    def behind_best_prompt(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each prompt's difference from the image's best prompt, (P, B) nats, at most 0, and its error."""
        return self._differences_from_best(0)

    def behind_best_image(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns each image's difference from the likeliest under the prompt, (P, B) nats, and its standard error.

        Between images, the log-likelihood also depends on how much texture the images have, whatever the prompt is.
        """
        return self._differences_from_best(1)

    def _differences_from_best(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        best = self.log_prob.argmax(axis, keepdim=True)
        difference = self.log_prob - self.log_prob.gather(axis, best)
        draws = self.contributions
        index = best.expand(*draws.shape[:-2], *best.shape)
        return difference, self._error(draws - draws.gather(axis - 2, index))

    def _error(self, differences: torch.Tensor) -> torch.Tensor:
        """Returns the standard error of differences (P, B); zero for a best entry against itself."""
        if self.trace_weights is None:
            return stratified_error(differences)
        if differences.shape[1] == 0:
            return torch.zeros_like(self.log_prob)
        return scatter_error(differences.sum(0)) if self.fixed_probes else level_error(differences, self.trace_weights)
