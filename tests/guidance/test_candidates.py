"""Rewards by name, the best of several noises, and callbacks after every run of `guide`."""

import pytest
import tiny
import torch

from diffusers_fisher import ClassifierReward, GuidanceStep, InputError, embedded_checkpoint, guide, noise_whiteness
from diffusers_fisher.backbones import backbone_of

PROMPTS = ["a b", "c"]
WEIGHTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5))


def reward(images, prompts):
    return (images * WEIGHTS.to(images)).flatten(1).sum(1)


def seeded():
    return torch.Generator().manual_seed(1)


def guided(pipe, prompts=PROMPTS, **options):
    settings = {
        "num_inference_steps": 3, "num_guidance_steps": 2, "generator": seeded(), "output_type": "pt",
        "step_size": 0.1,
    }  # fmt: skip
    return guide(pipe, prompts, options.pop("reward", reward), **{**settings, **options})


def draw(pipe, latents, steps=3):
    return pipe(PROMPTS, latents=latents, num_inference_steps=steps, output_type="pt", generator=seeded()).images


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


# Candidates


def candidates(pipe, count):
    generator = seeded()
    return [backbone_of(pipe).initial_noise(None, 2, (16, 16), generator) for _ in range(count)]


def test_best_of_several_noises_without_guidance_steps(pipe):
    """The reward needs no gradient."""
    before = tiny.snapshot(pipe)
    out = guided(
        pipe, reward=lambda images, prompts: reward(images, prompts).detach().round(), num_guidance_steps=0,
        num_candidates=4,
    )  # fmt: skip
    assert before == tiny.snapshot(pipe)
    noises = candidates(pipe, 4)
    rewards = torch.stack([reward(draw(pipe, noise), PROMPTS).round().double() for noise in noises])
    assert torch.equal(out.rewards, rewards)
    assert torch.equal(out.best_runs, rewards.argmax(0)) and torch.equal(out.best_rewards, rewards.max(0).values)
    best = torch.stack([noises[run][index] for index, run in enumerate(out.best_runs.tolist())])
    assert torch.equal(out.latents, best)
    assert torch.equal(out.images, draw(pipe, best)) and torch.equal(out.initial_images, draw(pipe, noises[0]))


def test_guidance_begins_with_the_best_candidate(pipe):
    first = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    out = guided(pipe, num_candidates=3, latents=first, held_out_reward=lambda images, prompts: images.mean((1, 2, 3)))
    assert out.rewards.shape == out.held_out_rewards.shape == (3 + 3, 2)
    assert torch.equal(out.rewards[0], reward(draw(pipe, first), PROMPTS).double())
    assert torch.equal(out.rewards[3], out.rewards[:3].max(0).values)
    assert bool((out.best_rewards > out.rewards[3]).all()) and bool((out.best_runs >= 3).all())
    assert torch.equal(out.images, draw(pipe, out.latents))
    single = guided(pipe)
    assert torch.equal(guided(pipe, num_candidates=1).rewards, single.rewards)


def test_candidates_of_cheap_runs(pipe):
    out = guided(pipe, num_candidates=3, num_guidance_steps=0, num_guidance_inference_steps=2, num_inference_steps=5)
    assert (len(out.rewards), out.num_cheap_runs) == (4, 3)
    assert torch.equal(out.cheap_rewards, out.rewards[:3].max(0).values)
    assert torch.equal(out.images, draw(pipe, out.latents, 5))
    noises = torch.stack(candidates(pipe, 3))
    assert torch.equal(out.latents, torch.stack([noises[run, i] for i, run in enumerate(out.rewards[:3].argmax(0))]))


@pytest.mark.parametrize(("value", "message"), [
    (0, "`num_candidates` is 0; allowed: at least 1"),
    (2.5, "`num_candidates` is 2.5 .float.; allowed: a whole number"),
    (10**6, "`num_candidates` is 1000000; allowed: at most 10000"),
])  # fmt: skip
def test_numbers_of_candidates_that_are_refused(pipe, value, message):
    with pytest.raises(InputError, match=message):
        guided(pipe, num_candidates=value)


def test_a_candidate_whose_reward_is_not_finite_ends_the_search(pipe):
    calls = []

    def fragile(images, prompts):
        calls.append(None)
        return reward(images, prompts) * (torch.nan if len(calls) == 4 else 1)  # one call is the trial

    out = guided(pipe, reward=fragile, num_candidates=5)
    assert out.status.startswith("stopped in run 2: The reward 'fragile' is not finite") and len(out.rewards) == 2
    assert torch.equal(out.images, draw(pipe, out.latents))


# Rewards by name


def test_rewards_by_name_are_those_of_the_objects(pipe):
    name = "classifier:embedded:ankle boot"
    classifier = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target="ankle boot")
    out = guided(pipe, reward=name, held_out_reward="classifier:embedded:bag", num_guidance_steps=1)
    by_object = guided(pipe, reward=classifier, num_guidance_steps=1)
    assert torch.equal(out.rewards, by_object.rewards)
    assert out.held_out_rewards.shape == (2, 2) and not torch.equal(out.held_out_rewards, out.rewards)
    with pytest.raises(InputError, match="The reward is 'beauty'; allowed: classifier:PATH:CLASS"):
        guided(pipe, reward="beauty")
    with pytest.raises(InputError, match="The reward is 'beauty'; allowed: classifier:PATH:CLASS"):
        guided(pipe, held_out_reward="beauty")


def test_a_reward_that_changes_its_list_of_prompts_changes_nothing_else(pipe):
    def greedy(images, prompts):
        assert prompts == PROMPTS
        prompts.clear()
        return reward(images, prompts)

    prompts = list(PROMPTS)
    out = guided(pipe, prompts, reward=greedy, num_candidates=2)
    assert prompts == PROMPTS and torch.equal(out.rewards, guided(pipe, num_candidates=2).rewards)


# Callbacks


def test_callbacks_get_every_run(pipe):
    steps = []
    out = guided(pipe, num_candidates=2, num_guidance_inference_steps=2, callback_on_guidance_step=steps.append)
    assert [step.run for step in steps] == list(range(len(out.rewards))) == list(range(2 + 3 + 1))
    assert {step.num_runs for step in steps} == {6} and {type(step) for step in steps} == {GuidanceStep}
    assert torch.equal(torch.stack([step.rewards for step in steps]), out.rewards)
    assert torch.equal(torch.stack([step.whiteness for step in steps]), out.whiteness)
    assert steps[0].held_out_rewards is None
    last = steps[-1]
    assert torch.equal(last.best_rewards, out.best_rewards) and torch.equal(last.best_latents, out.latents)
    assert torch.equal(last.best_images, out.images)
    assert torch.equal(noise_whiteness(last.best_latents).p_values, last.whiteness)


def test_callbacks_stop_the_guidance_and_change_nothing(pipe):
    def spoil(step):
        step.best_images.zero_()
        step.best_latents.zero_()
        step.best_rewards.fill_(9.0)
        return step.run == 1

    out = guided(pipe, callback_on_guidance_step=spoil, num_guidance_steps=4)
    assert out.status == "stopped by the callback after run 1" and len(out.rewards) == 2
    assert torch.equal(out.rewards, guided(pipe, num_guidance_steps=1).rewards)
    assert torch.equal(out.images, draw(pipe, out.latents))
    cheap = guided(pipe, callback_on_guidance_step=spoil, num_guidance_steps=4, num_guidance_inference_steps=2)
    assert cheap.status == out.status and (len(cheap.rewards), cheap.num_cheap_runs) == (3, 2)
    assert torch.equal(cheap.images, draw(pipe, cheap.latents))
    among_candidates = guided(pipe, callback_on_guidance_step=spoil, num_candidates=5)
    assert among_candidates.status == out.status and len(among_candidates.rewards) == 2
    assert torch.equal(among_candidates.images, draw(pipe, among_candidates.latents))


def test_errors_of_callbacks_are_raised_and_leave_no_trace(pipe):
    def fail(step):
        raise KeyError("of the callback")

    before = tiny.snapshot(pipe)
    with pytest.raises(KeyError, match="of the callback"):
        guided(pipe, callback_on_guidance_step=fail)
    assert before == tiny.snapshot(pipe)
    with pytest.raises(InputError, match=r"`callback_on_guidance_step` can't be called as callback\(step\): too many"):
        guided(pipe, callback_on_guidance_step=lambda: None)
    with pytest.raises(InputError, match=r"`callback_on_guidance_step` is 3 \(int\); allowed: a function"):
        guided(pipe, callback_on_guidance_step=3)
