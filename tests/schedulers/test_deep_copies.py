"""Pipelines that copy their scheduler within a call (LTX-2, panoramas) copy neither its run nor the user's model."""

import copy
import gc

import pytest
import tiny
import torch

from diffusers_fisher import AutodiffFisher, PipelineDenoiser, fisher_scheduler, posterior_guidance

PROMPT = "a b"


def pipeline():
    pipe = tiny.stable_diffusion()
    tiny.awaken(pipe.unet)
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    return pipe


def noise():
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def networks(kind):
    return {id(module) for module in gc.get_objects() if type(module) is kind}


def copy_and_step(pipe, copies):
    """Returns a callback that copies the scheduler in both of the ways, and takes a step with the copy."""

    def callback(pipe, index, timestep, tensors):
        before = networks(type(pipe.unet))
        twin = copy.deepcopy(pipe.scheduler)
        status = copy.deepcopy(pipe.scheduler.__dict__)
        assert networks(type(pipe.unet)) == before
        shape = 1, 2, 3  # not that of the run
        twin.step(torch.ones(shape), pipe.scheduler.timesteps[index], torch.ones(shape))
        copies.append((twin, status))
        return tensors

    return callback


def test_copies_inside_a_recorded_run_have_neither_run_nor_model():
    pipe, copies = pipeline(), []
    denoiser = PipelineDenoiser(pipe, prompt=PROMPT)
    gradients = []
    for options in ({}, {"callback_on_step_end": copy_and_step(pipe, copies)}):
        with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
            latents = pipe(
                PROMPT, latents=noise(), guidance_scale=1.0, num_inference_steps=3, output_type="latent", **options
            ).images
            vars(pipe.scheduler).update(copy.deepcopy(vars(pipe.scheduler)))  # as panoramas restore it
        assert len(trajectory.states) == 3
        gradients.append(trajectory.gradient(latents.sum()))
    assert torch.equal(*gradients)
    assert len(copies) == 3
    assert all(twin._trajectory is None for twin, _ in copies)


def test_copies_inside_guidance_per_step_are_not_watched():
    pipe, copies, results = pipeline(), [], []
    for callback in (None, copy_and_step(pipe, copies)):
        with posterior_guidance(pipe, lambda images, prompts: images.mean((1, 2, 3)), PROMPT) as guidance:

            def guide_and_copy(*args, callback=callback, guidance=guidance):
                tensors = guidance(*args)
                return tensors if callback is None else callback(*args[:3], tensors)

            results.append(
                pipe(
                    PROMPT, latents=noise(), guidance_scale=1.0, num_inference_steps=3, output_type="latent",
                    callback_on_step_end=guide_and_copy,
                ).images
            )  # fmt: skip
        assert len(guidance.rewards) == 3
    assert torch.equal(*results)
    assert [type(twin) for twin, _ in copies] == 3 * [type(pipe.scheduler)]
    before = results[0].clone()
    for twin, _ in copies:  # they work after the block, too
        twin.step(torch.ones(1, 2, 3), twin.timesteps[0], torch.ones(1, 2, 3))
    assert torch.equal(results[0], before)
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize("name", ["step", "set_timesteps", "scale_model_input"])
def test_watched_methods_keep_their_signature(name):
    import inspect

    pipe = pipeline()
    expected = inspect.signature(getattr(pipe.scheduler, name))
    with posterior_guidance(pipe, lambda images, prompts: images.mean((1, 2, 3)), PROMPT):
        assert inspect.signature(getattr(pipe.scheduler, name)) == expected
        pipe.scheduler.set_timesteps(2)
