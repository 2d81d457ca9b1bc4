"""Guidance that climbs by runs of few steps and draws its images by full runs."""

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import InputError, UnsupportedError, guide
from diffusers_fisher.guidance.phases import reordered_pairs

PROMPTS = ["a b", "c"]
WEIGHTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5))


def reward(images, prompts):
    return (images * WEIGHTS.to(images)).flatten(1).sum(1)


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def seeded():
    return torch.Generator().manual_seed(1)


def cheaply(pipe, prompts=PROMPTS, **options):
    settings = {
        "num_inference_steps": 5, "num_guidance_inference_steps": 2, "num_guidance_steps": 3, "generator": seeded(),
        "output_type": "pt", "step_size": 0.1,
    }  # fmt: skip
    return guide(pipe, prompts, options.pop("reward", reward), **{**settings, **options})


class Steps:
    """A callback that counts the steps of every run."""

    def __init__(self):
        self.runs = []

    def __call__(self, pipe, step, timestep, tensors):
        self.runs[-1:] = [step + 1] if step else [*self.runs[-1:], 1]
        return tensors


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@pytest.mark.parametrize("num_full_iterations", [0, 2])
def test_images_are_those_of_the_pipelines_own_call(pipe, num_full_iterations):
    before, callback = tiny.snapshot(pipe), Steps()
    out = cheaply(pipe, num_full_iterations=num_full_iterations, callback_on_step_end=callback)
    assert before == tiny.snapshot(pipe)
    assert callback.runs == [2] * (4 - num_full_iterations) + [5] * (num_full_iterations + 1)
    assert len(out.rewards) == len(out.seconds) == len(out.whiteness) == 5
    assert (out.num_cheap_runs, out.guidance_scheduler) == (4 - num_full_iterations, "DPMSolverMultistepScheduler")
    assert len(out.gradient_norms) == 3
    images = pipe(
        PROMPTS, latents=out.latents, num_inference_steps=5, output_type="pt", generator=seeded()
    ).images  # fmt: skip
    assert torch.equal(out.images, images)
    assert torch.equal(out.best_rewards, reward(images, PROMPTS).double())
    assert torch.equal(out.best_rewards, out.rewards.gather(0, out.best_runs[None])[0])
    assert bool((out.best_runs >= out.num_cheap_runs).all())


def test_cheap_and_full_rewards_are_those_of_the_same_noise(pipe):
    out = cheaply(pipe, num_full_iterations=0)
    copy = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    copy.set_progress_bar_config(disable=True)
    copy.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    images = copy(PROMPTS, latents=out.latents, num_inference_steps=2, output_type="pt").images
    torch.testing.assert_close(out.cheap_rewards, reward(images, PROMPTS).double(), rtol=1e-5, atol=1e-5)  # float32
    assert torch.equal(out.cheap_rewards, out.rewards[: out.num_cheap_runs].max(0).values)
    assert torch.equal(out.full_rewards, out.rewards[out.num_cheap_runs])
    assert out.reordered == reordered_pairs(out.cheap_rewards, out.full_rewards)
    cheap, full = float(out.cheap_rewards.mean()), float(out.full_rewards.mean())
    assert f"cheap     {cheap:.4g} in runs of DPMSolverMultistepScheduler, {full:.4g} in full runs" in str(out)
    assert bool((out.cheap_rewards > out.rewards[0]).all())


def test_pairs_that_are_ranked_differently():
    cheap, full = torch.tensor([1.0, 2.0, 3.0, 3.0]), torch.tensor([0.0, 5.0, 4.0, -1.0])
    assert reordered_pairs(cheap, full) == [(0, 3), (1, 2), (1, 3)]
    assert reordered_pairs(cheap, 2 * cheap) == []


def flux_condition():
    return {"prompt_embeds": torch.zeros(2, 4, 16), "pooled_prompt_embeds": torch.zeros(2, 16)}


def sd3_condition():
    names = ("prompt_embeds", "negative_prompt_embeds")
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: torch.ones(2, 4, 16) for name in names} | {name: torch.ones(2, 16) for name in pooled}


FAMILIES = {
    "Flux": (tiny.flux, flux_condition, "FlowMatchEulerDiscreteScheduler", None),
    "Stable Diffusion 3": (tiny.stable_diffusion_3, sd3_condition, "FlowMatchEulerDiscreteScheduler", None),
    "Stable Diffusion 3 by Heun": (
        tiny.stable_diffusion_3, sd3_condition, "FlowMatchHeunDiscreteScheduler",
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    ),
    "Stable Diffusion XL": (tiny.stable_diffusion_xl, dict, "DPMSolverMultistepScheduler", None),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_its_scheduler(family):
    make, condition, name, scheduler = FAMILIES[family]
    pipe, arguments = make(), condition()
    prompts = None if arguments else PROMPTS
    size = {"height": 16, "width": 16, **arguments}
    out = cheaply(pipe, prompts, num_guidance_steps=1, guidance_scheduler=scheduler, **size)
    assert out.guidance_scheduler == name
    images = pipe(
        prompts, latents=out.latents, num_inference_steps=5, output_type="pt", generator=seeded(), **size
    ).images  # fmt: skip
    assert torch.equal(out.images, images)


def test_text_moves_in_cheap_runs_and_is_that_of_the_full_run(pipe):
    out = cheaply(pipe, optimise=["noise", "text"], num_full_iterations=1)
    negative = pipe.encode_prompt([""] * 2, "cpu", 1, False)[0]
    images = pipe(
        prompt_embeds=out.prompt_embeds, negative_prompt_embeds=negative, latents=out.latents, num_inference_steps=5,
        output_type="pt", generator=seeded(),
    ).images  # fmt: skip
    torch.testing.assert_close(out.images, images, rtol=0, atol=1e-5)  # float32
    assert bool((out.cheap_rewards > out.rewards[0]).all())


def test_images_are_drawn_after_an_ascent_that_stopped(pipe):
    calls = []

    def fragile(images, prompts):
        calls.append(None)
        return reward(images, prompts) * (torch.nan if len(calls) == 4 else 1)  # one call is the trial

    out = cheaply(pipe, reward=fragile, num_full_iterations=1, num_guidance_steps=5)
    assert out.status.startswith("stopped in run 2: The reward 'fragile' is not finite")
    assert (len(out.rewards), out.num_cheap_runs) == (3, 2)
    images = pipe(PROMPTS, latents=out.latents, num_inference_steps=5, output_type="pt", generator=seeded()).images
    assert torch.equal(out.images, images)


def other(name, pipe, **changes):
    return getattr(diffusers, name).from_config(pipe.scheduler.config, **changes)


REFUSALS = {
    "flow": (lambda pipe: {"guidance_scheduler": diffusers.FlowMatchHeunDiscreteScheduler()}, UnsupportedError,
             "was given FlowMatchHeunDiscreteScheduler, a scheduler of flow matching"),
    "levels": (lambda pipe: {"guidance_scheduler": diffusers.DPMSolverMultistepScheduler()}, InputError,
               r"a DPMSolverMultistepScheduler with other noise levels .* Make it by DPMSolverMultistep"),
    "outputs": (lambda pipe: {"guidance_scheduler": other("DDIMScheduler", pipe, prediction_type="v_prediction")},
                InputError, "or another prediction type than the pipeline's DDIMScheduler"),
    "a class": (lambda pipe: {"guidance_scheduler": diffusers.DDIMScheduler}, InputError,
                "`guidance_scheduler` is the class DDIMScheduler; allowed: a diffusers scheduler"),
    "a name": (lambda pipe: {"guidance_scheduler": "DDIMScheduler"}, InputError, "`guidance_scheduler` is 'DDIM"),
    "no steps": (lambda pipe: {"num_guidance_inference_steps": None, "num_full_iterations": 1}, InputError,
                 "are for runs of fewer steps; give `num_guidance_inference_steps` too"),
    "zero": (lambda pipe: {"num_guidance_inference_steps": 0}, InputError, "steps` is 0; allowed: at least 1"),
    "too many": (lambda pipe: {"num_guidance_inference_steps": 2000, "guidance_scheduler": pipe.scheduler},
                 InputError, "`num_guidance_inference_steps` is 2000; DDIMScheduler allows at most 1000"),
    "iterations": (lambda pipe: {"num_full_iterations": 4}, InputError, "is 4; allowed: 0 to .*, which is 3"),
    "control": (lambda pipe: {"optimise": ["noise", "control"]}, InputError, "has \"control\", which has one tensor"),
    "timesteps": (lambda pipe: {"timesteps": [900, 500]}, InputError, "`timesteps` fixes the steps of every run"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_cheap_runs_that_can_not_be_made_are_refused_before_the_network_is_called(pipe, kind):
    options, error, message = REFUSALS[kind]
    calls = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: calls.append(None))
    try:
        with pytest.raises(error, match=message):
            cheaply(pipe, **options(pipe))
    finally:
        hook.remove()
    assert calls == []


def test_schedulers_that_the_pipelines_call_can_not_use_are_refused_by_name():
    flux, heun = tiny.flux(), diffusers.FlowMatchHeunDiscreteScheduler()
    before = tiny.snapshot(flux)
    with pytest.raises(UnsupportedError, match="FluxPipeline can't run on the `guidance_scheduler` FlowMatchHeun"):
        cheaply(flux, None, height=16, width=16, guidance_scheduler=heun, **flux_condition())
    assert before == tiny.snapshot(flux)
    dit, ddim = tiny.dit(), tiny.unconditional(diffusers.DDIMPipeline)
    with pytest.raises(
        UnsupportedError, match="DDIMPipeline can't run on the `guidance_scheduler` DPMSolverMultistep"
    ):
        cheaply(ddim, None, reward=brightness, guidance_scheduler=other("DPMSolverMultistepScheduler", ddim))
    assert cheaply(ddim, None, reward=brightness, num_guidance_steps=1).guidance_scheduler == "DDIMScheduler"
    with pytest.raises(UnsupportedError, match="was given EulerDiscreteScheduler, whose noise and model input must"):
        cheaply(dit, [1, 2], guidance_scheduler=other("EulerDiscreteScheduler", dit))


def test_errors_of_later_runs_keep_their_words(pipe):
    calls = []

    def callback(pipe, step, timestep, tensors):
        calls.append(None)
        if len(calls) == 3:
            raise ValueError("of the callback")
        return tensors

    with pytest.raises(ValueError, match=r"^of the callback$"):
        cheaply(pipe, callback_on_step_end=callback)
