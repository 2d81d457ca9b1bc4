"""A brake of guidance: it pulls images back toward those that the model would make."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError
from ..noise import log_noise_to_signal_range, timestep_at
from .checks import normalise, norms


class LikelihoodRegulariser:
    """Adds to a reward's gradient the direction in which the final sample becomes more likely under the model.

    The direction is D(x) - x, with x the final sample and D the mean of the denoised samples that the model makes of
    x with noise of one level. It is the gradient of the log-likelihood of the noised sample (Tweedie), times the
    noise-to-signal ratio squared. No graph of the network is built. At the final sample the gradient of the guidance
    becomes g + weight |g| u, with g that of the reward and u the unit direction, so `weight` has no unit.

        out = pipe.guide(prompt, reward, regulariser=LikelihoodRegulariser(weight=0.3))

    The best images are still those of the largest reward. Cost: two denoiser calls without classifier-free guidance
    per draw and guidance step.

    Args:
        weight: size of the pull relative to the reward's gradient.
        noise_to_signal: sigma/alpha of the level. A large one knows the image's large structures only, a small one its
            details only.
        num_draws: number of noises. Each counts with both signs.
        seed: seed of the noises, which are the same at every step.

    Raises:
        InputError: a number that is not positive.
    """

    @check_kinds
    def __init__(self, weight: float = 0.3, noise_to_signal: float = 0.5, num_draws: int = 1, seed: int = 0):
        if not (0 < weight < math.inf and 0 < noise_to_signal < math.inf and num_draws >= 1):
            raise InputError(
                f"`weight` is {weight}, `noise_to_signal` {noise_to_signal}, `num_draws` {num_draws}; allowed: "
                "positive, positive, and at least 1."
            )
        self.weight, self.noise_to_signal, self.num_draws, self.seed = weight, noise_to_signal, num_draws, seed

    def check_level(self, denoiser: Denoiser) -> None:
        """Refuses a level that the denoiser's scheduler does not have. Raises `InputError`."""
        lowest, highest = (math.exp(value) for value in log_noise_to_signal_range(denoiser.scheduler))
        if not lowest <= self.noise_to_signal <= highest:
            raise InputError(
                f"`noise_to_signal` of the regulariser is {self.noise_to_signal}; the model's levels are from "
                f"{lowest:.3g} to {highest:.3g}. Take one between them, such as 0.5."
            )

    @torch.no_grad()
    def direction(self, denoiser: Denoiser, x: torch.Tensor) -> torch.Tensor:
        """Returns the unit direction of each clean sample x (B, ...) in which it becomes more likely."""
        log_s = torch.tensor(math.log(self.noise_to_signal), dtype=torch.float64)
        timestep = timestep_at(denoiser.scheduler, log_s)
        level = denoiser.level(timestep)
        alpha, sigma = float(level.alpha), float(level.sigma)
        generator, denoised = torch.Generator().manual_seed(self.seed), torch.zeros_like(x)
        for _ in range(self.num_draws):
            noise = sigma * torch.randn(x.shape, generator=generator).to(x)
            for sign in (1, -1):
                denoised += denoiser.state(alpha * x + sign * noise, timestep).pred_original_sample
        return normalise(denoised / (2 * self.num_draws) - x)[0]

    def regularised(
        self, decode: Callable[[torch.Tensor], torch.Tensor], denoiser: Denoiser
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Returns `decode`, whose gradient at the latents has the pull of the regulariser."""

        def decode_with_pull(latents: torch.Tensor) -> torch.Tensor:
            if not (torch.is_grad_enabled() and latents.requires_grad):
                return decode(latents)
            unit = self.direction(denoiser, latents.detach().float())
            result = latents.view_as(latents)  # so that the hook sees the gradient of the reward alone
            result.register_hook(lambda gradient: gradient + self.weight * norms(gradient) * unit.to(gradient))
            return decode(result)

        return decode_with_pull
