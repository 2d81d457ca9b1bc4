"""A gradient for rewards that have none."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...arguments import check_kinds
from ...errors import InputError
from ..checks import Reward, check_callable, checked_reward, name_of


class FiniteDifferenceReward:
    """Gives a reward that is not differentiable a gradient, by differences of the reward in image space.

    The reward may go through PIL or numpy, or ask another program; it is called with images in [0, 1] without a graph.
    The gradient is the mean over random smooth fields u of (r(image + h u) - r(image - h u)) / (2h) u, so it lies in
    the space of smooth images: few fields find the direction of a reward of large structures, and none that of a
    reward of fine ones. The fields depend on the images and the seed alone, so the same guidance gives the same
    images again.

    Cost: one call of the reward, and in the backward pass two per direction.

    Args:
        reward: `reward(images, prompts) -> (B,)`.
        num_directions: number of fields per gradient. More of them make the direction better, in proportion to their
            root at first.
        step: h, where a field has the root mean square 1. It must change the reward beyond its rounding: 8-bit images
            need several times 1/255.
        resolution: the fields are noise on a grid of this many points along a side, interpolated.
        seed: seed of the fields.

    Raises:
        InputError: a number that is not positive, or something that can't be called with two arguments.
    """

    @check_kinds
    def __init__(
        self, reward: Reward, num_directions: int = 16, step: float = 0.05, resolution: int = 4, seed: int = 0
    ):
        check_callable(reward)
        if num_directions < 1 or resolution < 1 or not 0 < step < 1:
            raise InputError(
                f"`num_directions` is {num_directions}, `resolution` {resolution}, `step` {step}; allowed: at least "
                "1, at least 1, and a number between 0 and 1."
            )
        self.reward, self.num_directions, self.step, self.resolution, self.seed = (
            reward, num_directions, step, resolution, seed
        )  # fmt: skip
        self.__name__ = f"finite differences of {name_of(reward)}"

    def __call__(self, images: torch.Tensor, prompts: Any) -> torch.Tensor:
        return _Differences.apply(images, self, list(prompts))

    @torch.no_grad()
    def evaluate(self, images: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
        """Returns the reward's values (B,), without a graph."""
        return checked_reward(self.reward, images.detach().clone(), prompts).detach().to(images)

    @torch.no_grad()
    def gradient(self, images: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
        """Returns the estimate of the gradient, of the shape of the images (B, 3, H, W)."""
        digest = zlib.crc32(images.detach().float().cpu().numpy().tobytes())
        generator = torch.Generator().manual_seed(self.seed + digest)
        result = torch.zeros_like(images)
        for _ in range(self.num_directions):
            field = self._field(images, generator)
            up, down = (
                self.evaluate((images + sign * self.step * field).clamp(0, 1), prompts) for sign in (1.0, -1.0)
            )
            slopes = (up - down) / (2 * self.step * self.num_directions)
            result += slopes.reshape(-1, 1, 1, 1) * field
        return result

    def _field(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draws a smooth field of root mean square 1 per image."""
        grid = torch.randn(*images.shape[:2], self.resolution, self.resolution, generator=generator).to(images)
        field = F.interpolate(grid, tuple(images.shape[-2:]), mode="bilinear", align_corners=False)
        return field / field.square().mean((1, 2, 3), keepdim=True).sqrt()


class _Differences(torch.autograd.Function):
    """Evaluates the reward in the forward pass, and its differences in the backward pass."""

    @staticmethod
    def forward(ctx: Any, images: torch.Tensor, reward: FiniteDifferenceReward, prompts: list[Any]) -> torch.Tensor:
        ctx.save_for_backward(images)
        ctx.reward, ctx.prompts = reward, prompts
        return reward.evaluate(images, prompts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (images,) = ctx.saved_tensors
        return gradients[0].reshape(-1, 1, 1, 1) * ctx.reward.gradient(images, ctx.prompts), None, None
