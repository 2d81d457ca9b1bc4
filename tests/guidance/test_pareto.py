"""Guidance by several rewards, and the images that no other one beats."""

import pytest
import tiny
import torch

from diffusers_fisher import InputError, LinearReward, guide, guide_pareto
from diffusers_fisher.guidance.pareto import efficient

PROMPTS = ["a b", "c"]
LEFT = LinearReward.left_minus_right(16, 16)
SETTINGS = {"num_inference_steps": 2, "num_guidance_steps": 2, "step_size": 0.1}


def top(images, prompts):
    return 10 * (images[..., :8, :].mean((1, 2, 3)) - images[..., 8:, :].mean((1, 2, 3)))


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


def test_points_that_no_other_one_beats():
    rewards = torch.tensor([[3.0, 0.0], [2.0, 2.0], [2.0, 1.0], [0.0, 3.0], [0.0, 3.0]])[:, None]
    assert efficient(rewards).flatten().tolist() == [True, True, False, True, True]


def test_every_set_of_weights_is_guided_from_the_same_noise(pipe):
    before = tiny.snapshot(pipe)
    out = guide_pareto(
        pipe, PROMPTS, {"left": LEFT, "top": top}, num_weights=3, scales={"top": 10.0}, seed=4, **SETTINGS
    )
    assert before == tiny.snapshot(pipe)
    assert out.weights.tolist() == [[1, 0], [0.5, 0.5], [0, 1]]
    alone = guide(pipe, PROMPTS, LEFT, generator=torch.Generator().manual_seed(4), output_type="pt", **SETTINGS)
    assert torch.equal(out.outputs[0].images, alone.images)
    assert all(torch.equal(each.initial_images, alone.initial_images) for each in out.outputs)
    for place, each in enumerate(out.outputs):
        expected = torch.stack([LEFT(each.images, PROMPTS), top(each.images, PROMPTS)], dim=-1).double()
        assert torch.equal(out.rewards[place], expected)
    # The weighted sum has the scale: the best rewards of the second output are those of its images.
    half = 0.5 * out.rewards[1, :, 0] + 0.05 * out.rewards[1, :, 1]
    torch.testing.assert_close(out.outputs[1].best_rewards, half)
    assert bool((out.rewards[0, :, 0] > out.initial_rewards[:, 0]).all())
    assert bool(out.is_efficient.any(0).all())
    lines = str(out).splitlines()
    assert lines[0].split() == ["weights", "left", "top", "efficient"] and len(lines) == 5
    assert lines[1].startswith("without guidance") and lines[3].startswith("0.50 0.50")
    assert lines[4].endswith(f"{int(out.is_efficient[2].sum())} of 2")


def test_three_rewards_and_several_images_per_prompt(pipe):
    def by_prompt(images, prompts):
        assert prompts == ["a b", "a b"]
        return images.mean((1, 2, 3))

    out = guide_pareto(
        pipe, "a b", {"left": LEFT, "top": top, "bright": by_prompt}, num_weights=2, num_images_per_prompt=2,
        num_guidance_steps=0, num_inference_steps=1,
    )  # fmt: skip
    assert out.weights.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert out.rewards.shape == (3, 2, 3) and bool(out.is_efficient.all())  # equal images beat none


REFUSALS = {
    "one reward": ({"rewards": {"left": LEFT}}, "There are 1 rewards"),
    "one weight": ({"num_weights": 1}, "`num_weights` is 1; allowed: at least 2"),
    "scale": ({"scales": {"left": 0.0}}, "allowed: a positive number for some of left, top"),
    "another": ({"scales": {"right": 1.0}}, "allowed: a positive number for some of left, top"),
    "generator": ({"generator": torch.Generator()}, "`generator` belongs to `guide_pareto`; leave it out, or pass `s"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_arguments_out_of_range_are_refused(pipe, kind):
    options, message = REFUSALS[kind]
    rewards = options.pop("rewards", {"left": LEFT, "top": top})
    with pytest.raises(InputError, match=message):
        guide_pareto(pipe, PROMPTS, rewards, **options)
