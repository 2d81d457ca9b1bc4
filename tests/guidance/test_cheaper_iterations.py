"""Guidance steps without classifier-free guidance, and rewards of smaller images, in the runs that climb."""

import pytest
import tiny
import torch

from diffusers_fisher import AutodiffFisher, DirectFisher, InputError, PipelineDenoiser, guide

PROMPTS = ["a b", "c"]


def reward(images, prompts):
    """How much brighter the left halves are, for images of any size."""
    half = images.shape[-1] // 2
    return images[..., :half].mean((1, 2, 3)) - images[..., half:].mean((1, 2, 3))


def seeded():
    return torch.Generator().manual_seed(1)


def guided(pipe, prompts=PROMPTS, **options):
    settings = {
        "num_inference_steps": 3, "num_guidance_steps": 4, "generator": seeded(), "output_type": "pt",
        "step_size": 0.1, "guidance_scale": 3.0,
    }  # fmt: skip
    return guide(pipe, prompts, options.pop("reward", reward), **{**settings, **options})


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


class Evaluations:
    """Counts the samples of every evaluation of a network in the block."""

    def __init__(self, network):
        self.network, self.samples = network, []

    def __enter__(self):
        hook = lambda module, args: self.samples.append(len(args[0]))  # noqa: E731
        self.hook = self.network.register_forward_pre_hook(hook)
        return self.samples

    def __exit__(self, *_):
        self.hook.remove()


# Without classifier-free guidance


def test_first_iterations_evaluate_one_branch(pipe):
    before = tiny.snapshot(pipe)
    with Evaluations(pipe.unet) as samples:
        out = guided(pipe, num_unguided_iterations=2, estimator=DirectFisher())
    assert before == tiny.snapshot(pipe)
    # Three runs without guidance, and three with it: each of three steps.
    assert samples == [2] * 9 + [4] * 9
    assert out.num_denoiser_calls == 18 and len(out.rewards) == 6 and len(out.gradient_norms) == 4
    assert bool((out.best_runs >= 3).all()) and torch.equal(out.best_rewards, out.rewards[3:].max(0).values)


def test_the_first_phase_is_guidance_at_scale_one_and_the_images_those_of_the_pipeline(pipe):
    out = guided(pipe, num_unguided_iterations=2)
    alone = guided(pipe, num_guidance_steps=2, guidance_scale=1.0)
    assert torch.equal(out.rewards[:3], alone.rewards) and torch.equal(out.initial_images, alone.initial_images)
    again = pipe(PROMPTS, latents=out.latents, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    assert torch.equal(out.images, again)
    guided_start = guided(pipe, num_guidance_steps=0, latents=alone.latents)
    assert torch.equal(out.rewards[3], guided_start.rewards[0])  # from the best noise of the first phase


def test_all_iterations_may_be_without_guidance_and_cheap(pipe):
    steps = []
    out = guided(
        pipe, num_unguided_iterations=4, num_inference_steps=5, num_guidance_inference_steps=2,
        callback_on_guidance_step=lambda step: steps.append((step.run, step.num_runs)),
    )  # fmt: skip
    # Five runs without guidance, one with it, and the full run.
    assert steps == [(run, 7) for run in range(7)]
    assert (out.num_cheap_runs, len(out.rewards), out.status) == (6, 7, "completed")
    assert torch.equal(out.cheap_rewards, out.rewards[5]) and torch.equal(out.full_rewards, out.rewards[6])


def test_a_guidance_that_stops_early_still_draws_guided_images(pipe):
    out = guided(pipe, num_unguided_iterations=3, callback_on_guidance_step=lambda step: step.run == 1)
    assert out.status == "stopped by the callback after run 1" and len(out.rewards) == 3
    again = pipe(PROMPTS, latents=out.latents, num_inference_steps=3, guidance_scale=3.0, output_type="pt").images
    assert torch.equal(out.images, again)


REFUSALS = {
    "too many": ({"num_unguided_iterations": 5}, "is 5; allowed: 0 to 4"),
    "negative": ({"num_unguided_iterations": -1}, "is -1; allowed: 0 to 4"),
    "full": ({"num_unguided_iterations": 3, "num_full_iterations": 2, "num_guidance_inference_steps": 2},
             "is 3; allowed: 0 to 2, the guidance steps that no full run takes"),
    "unguided": ({"num_unguided_iterations": 1, "guidance_scale": 1.0}, "have no classifier-free guidance"),
    "text": ({"num_unguided_iterations": 1, "optimise": ["noise", "text"]}, "`optimise` has \"text\", which belongs"),
    "full size": ({"reward_downscale": 2}, "is 2, which is for runs of fewer steps"),
    "zero": ({"reward_downscale": 0, "num_guidance_inference_steps": 2}, "is 0; allowed: 1, or a number by which"),
    "odd size": ({"reward_downscale": 4, "num_guidance_inference_steps": 2}, "the 16x16 pixels become multiples of 8"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_options_out_of_range_are_refused_before_the_network_is_called(pipe, kind):
    options, message = REFUSALS[kind]
    with Evaluations(pipe.unet) as samples, pytest.raises(InputError, match=message):
        guided(pipe, **options)
    assert samples == []


def test_an_estimators_own_denoiser_belongs_to_the_guided_runs(pipe):
    estimator = AutodiffFisher(PipelineDenoiser(pipe, guidance_scale=3.0, prompt=PROMPTS))
    with pytest.raises(InputError, match="the estimator has a denoiser of its own, which belongs to the guided runs"):
        guided(pipe, num_unguided_iterations=1, estimator=estimator)


# Smaller images


@pytest.mark.parametrize("family", [tiny.stable_diffusion, tiny.flux])
def test_cheap_runs_decode_smaller_images(family):
    pipe = tiny.quiet(family())
    sizes = []

    def watching(images, prompts):
        sizes.append(tuple(images.shape[-2:]))
        return reward(images, prompts)

    options = {"prompts": PROMPTS}
    if family is tiny.flux:
        options = {"prompts": None, "height": 32, "width": 32, "guidance_scale": None, **tiny.embeds(2)}
    before = tiny.snapshot(pipe)
    out = guided(pipe, reward=watching, reward_downscale=2, num_guidance_inference_steps=2, **options)
    assert before == tiny.snapshot(pipe)
    full, small = out.images.shape[-1], out.images.shape[-1] // 2
    trials = 2  # of the reward, at both sizes
    assert sizes[:trials] == [(full, full), (small, small)]
    assert sizes[trials:] == [(small, small)] * 5 + [(full, full)]
    assert out.initial_images.shape == out.images.shape
    assert float((out.cheap_rewards - out.rewards[0]).sum()) > 0


def test_a_reward_that_needs_full_images_is_refused_before_the_network_is_called(pipe):
    from diffusers_fisher import LinearReward

    with Evaluations(pipe.unet) as samples, pytest.raises(InputError, match=r"\(16, 16\) pixels, the images \(8, 8\)"):
        guided(pipe, reward=LinearReward.left_minus_right(16, 16), reward_downscale=2, num_guidance_inference_steps=2)
    assert samples == []
