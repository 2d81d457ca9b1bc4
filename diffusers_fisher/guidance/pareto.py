"""Guidance by several rewards at once: one run per set of weights, and which images no other one beats."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput

from ..arguments import check_kinds
from ..backbones.conditions import Condition
from ..errors import InputError
from .checks import Reward, checked_reward
from .output import GuidanceOutput
from .pipeline import guide
from .rewards.named import WeightedReward, named_reward


@dataclasses.dataclass
class ParetoOutput(BaseOutput):
    """Holds the guidance of every set of weights, and the rewards of its images.

    Args:
        names: names of the R rewards.
        weights: (W, R) float64, each row with sum one.
        rewards: (W, B, R) float64, of the images of every set of weights.
        initial_rewards: (B, R) float64, of the images without guidance.
        is_efficient: (W, B) bool, whether no other set of weights has an image of the same sample whose rewards are
            all as large and one of them larger.
        outputs: W outputs of `guide`, with images as tensors (B, 3, H, W) in [0, 1].
    """

    names: list[str]
    weights: torch.Tensor
    rewards: torch.Tensor
    initial_rewards: torch.Tensor
    is_efficient: torch.Tensor
    outputs: list[GuidanceOutput]

    def __str__(self) -> str:
        width = max(10, *map(len, self.names))
        lines = [f"{'weights':<24}" + "".join(f"{name:>{width + 2}}" for name in self.names) + "   efficient"]
        means = [self.initial_rewards.mean(0), *self.rewards.mean(1)]
        for place, row in enumerate(means):
            words = " ".join(f"{weight:.2f}" for weight in self.weights[place - 1].tolist())
            count = f"{int(self.is_efficient[place - 1].sum())} of {self.is_efficient.shape[1]}"
            numbers = "".join(f"{value:>{width + 2}.4g}" for value in row.tolist())
            lines.append(f"{words if place else 'without guidance':<24}{numbers}" + (f"   {count}" if place else ""))
        return "\n".join(lines)


@check_kinds
def guide_pareto(
    pipe: DiffusionPipeline,
    prompt: Condition,
    rewards: Mapping[str, Reward | str],
    *,
    num_weights: int = 5,
    scales: Mapping[str, float] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> ParetoOutput:
    """Guides by weighted sums of several rewards, from the same noise, and says which images no other one beats.

        out = guide_pareto(pipe, "a photo of a sneaker", {"class": reward, "brightness": brightness})
        print(out)

    Args:
        pipe, prompt: as in `guide`.
        rewards: two or more rewards, or their names as in `named_reward`, by the names that the report has.
        num_weights: number of weights from 0 to 1 that each reward has, 1/(num_weights - 1) apart; the sets of weights
            are all those with sum one: 5 for two rewards, 15 for three.
        scales: by reward the number by which it is divided, because rewards have different units; 1 where it is left
            out. The rewards' standard deviations over images without guidance are good scales.
        seed: seed of the generator of every run.
        **arguments: arguments of `guide`, such as `num_guidance_steps` or `held_out_reward`.

    Returns:
        `ParetoOutput`. Cost: one call of `guide` per set of weights.

    Raises:
        InputError: fewer than two rewards or weights, scales that are not positive or of no reward, arguments that
            belong to this function; else as `guide`.
    """
    if len(rewards) < 2 or num_weights < 2:
        raise InputError(
            f"There are {len(rewards)} rewards and `num_weights` is {num_weights}; allowed: at least 2 of both."
        )
    sizes = dict.fromkeys(rewards, 1.0) | dict(scales or {})
    if sizes.keys() != rewards.keys() or not all(0 < size < float("inf") for size in sizes.values()):
        raise InputError(f"`scales` is {scales}; allowed: a positive number for some of {', '.join(rewards)}.")
    fixed = sorted({"generator", "output_type", "return_dict"} & arguments.keys())
    if fixed:
        raise InputError(f"`{fixed[0]}` belongs to `guide_pareto`; leave it out, or pass `seed` for the generator.")
    loaded = {name: named_reward(each) if isinstance(each, str) else each for name, each in rewards.items()}
    weights = [[part / (num_weights - 1) for part in parts] for parts in _compositions(num_weights - 1, len(loaded))]
    outputs = []
    for row in weights:
        terms = [(weight / sizes[name], loaded[name]) for name, weight in zip(loaded, row, strict=True) if weight]
        outputs.append(
            guide(
                pipe, prompt, WeightedReward(*terms), generator=torch.Generator().manual_seed(seed), output_type="pt",
                **arguments,
            )
        )  # fmt: skip
    prompts = [""] * len(outputs[0].best_rewards) if not isinstance(prompt, (str, list)) else prompt
    values = [_rewards_of(loaded, each.images, prompts) for each in outputs]
    return ParetoOutput(
        list(loaded), torch.tensor(weights, dtype=torch.float64), torch.stack(values),
        _rewards_of(loaded, outputs[0].initial_images, prompts), efficient(torch.stack(values)), outputs,
    )  # fmt: skip


def efficient(rewards: torch.Tensor) -> torch.Tensor:
    """Returns which of W points no other one beats, (W, B) bool, for rewards (W, B, R)."""
    as_large = (rewards[:, None] >= rewards).all(-1)  # [i, j]: is i at least as good as j?
    larger = (rewards[:, None] > rewards).any(-1)
    return ~(as_large & larger).any(0)


def _compositions(total: int, parts: int) -> Iterator[list[int]]:
    """Yields all lists of `parts` numbers from 0 on with sum `total`."""
    if parts == 1:
        yield [total]
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, parts - 1):
            yield [first, *rest]


@torch.no_grad()
def _rewards_of(rewards: Mapping[str, Reward], images: torch.Tensor, prompt: Any) -> torch.Tensor:
    """Returns the rewards (B, R) float64 of images."""
    prompts = [prompt] * len(images) if isinstance(prompt, str) else prompt
    prompts = [each for each in prompts for _ in range(len(images) // len(prompts))]
    return torch.stack([checked_reward(each, images, prompts).double().cpu() for each in rewards.values()], dim=-1)
