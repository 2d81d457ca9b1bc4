"""Rewards without a gradient, which differences in image space give one."""

import numpy
import pytest
import tiny
import torch

from diffusers_fisher import FiniteDifferenceReward, InputError, LinearReward, NumericalError, WeightedReward, guide

PROMPTS = ["a b", "c"]
SMOOTH = LinearReward.left_minus_right(16, 16)


def eight_bit(images, prompts):
    """The left halves of 8-bit images, less the right ones, by numpy."""
    arrays = (images.numpy() * 255).round().astype(numpy.uint8)
    return torch.tensor([float(array[..., :8].mean() - array[..., 8:].mean()) for array in arrays])


def images(count=2):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2 + 0.25


def gradient(reward, x):
    x = x.clone().requires_grad_()
    values = reward(x, PROMPTS)
    return values.detach(), torch.autograd.grad(values.sum(), x)[0]


def test_values_are_the_rewards_and_the_gradient_points_along_its_smooth_part():
    x = images()
    exact = gradient(SMOOTH, x)[1]
    cosines = {}
    for count in (4, 64):
        values, estimate = gradient(FiniteDifferenceReward(eight_bit, num_directions=count), x)
        torch.testing.assert_close(values, eight_bit(x, PROMPTS))
        cosines[count] = torch.nn.functional.cosine_similarity(estimate.flatten(1), exact.flatten(1)).mean()
    assert 0.15 < cosines[4] < cosines[64]
    assert cosines[64] > 0.6


def test_the_estimate_is_the_gradient_on_average():
    """On a grid of one point the fields are constant per channel: the slope along them is known."""
    weights = torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1).expand(3, 16, 16) / 256
    reward = FiniteDifferenceReward(LinearReward(weights), num_directions=4000, resolution=1)
    estimate = reward.gradient(images(1), [""])[0]
    means = estimate.mean((1, 2))
    torch.testing.assert_close(estimate, means[:, None, None].expand_as(estimate))
    # The fields are uniform on the sphere of 3 channels with root mean square 1: E[u u^T] is the identity.
    torch.testing.assert_close(means, torch.tensor([1.0, 2.0, 4.0]) / 3, rtol=0.1, atol=0.03)


def test_the_same_images_have_the_same_directions_and_others_have_others():
    reward, x = FiniteDifferenceReward(SMOOTH), images()
    assert torch.equal(reward.gradient(x, PROMPTS), reward.gradient(x, PROMPTS))
    assert not torch.equal(reward.gradient(x, PROMPTS), FiniteDifferenceReward(SMOOTH, seed=1).gradient(x, PROMPTS))
    ratio = reward.gradient(x + 0.01, PROMPTS) / reward.gradient(x, PROMPTS)
    assert float((ratio - 1).abs().max()) > 0.01


def test_guidance_by_a_reward_of_numpy():
    pipe = tiny.stable_diffusion()
    out = [
        guide(
            pipe, PROMPTS, FiniteDifferenceReward(eight_bit, num_directions=32), num_guidance_steps=3,
            num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt",
        )
        for _ in range(2)
    ]  # fmt: skip
    assert torch.equal(out[0].rewards, out[1].rewards)
    assert bool((out[0].best_rewards > out[0].rewards[0]).all())
    with pytest.raises(InputError, match="not differentiable"):
        guide(pipe, PROMPTS, eight_bit_with_detached_images, num_guidance_steps=1, num_inference_steps=2)


def eight_bit_with_detached_images(images, prompts):
    return eight_bit(images.detach(), prompts)


def test_it_can_be_a_term_of_a_sum_and_keeps_messages():
    x = images()
    both = WeightedReward((2.0, FiniteDifferenceReward(SMOOTH)), (1.0, SMOOTH))
    torch.testing.assert_close(gradient(both, x)[0], 3 * SMOOTH(x, PROMPTS))
    with pytest.raises(NumericalError, match="The reward 'empty' is not finite"):
        FiniteDifferenceReward(empty)(x, PROMPTS)
    with pytest.raises(InputError, match="returned a float for 2 images"):
        FiniteDifferenceReward(lambda images, prompts: 1.0)(x, PROMPTS)


def empty(images, prompts):
    return torch.full((len(images),), torch.nan)


@pytest.mark.parametrize("options", [{"num_directions": 0}, {"step": 0.0}, {"step": 1.0}, {"resolution": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=r"allowed: at least 1, at least 1, and a number between 0 and 1\."):
        FiniteDifferenceReward(SMOOTH, **options)


def test_classes_and_functions_of_one_argument_are_refused():
    with pytest.raises(InputError, match="`reward` is the class LinearReward; allowed: a function"):
        FiniteDifferenceReward(LinearReward)
    with pytest.raises(InputError, match=r"can't be called as reward\(images, prompts\)"):
        FiniteDifferenceReward(lambda images: images.mean((1, 2, 3)))
