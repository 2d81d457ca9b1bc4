"""A modular pipeline with a guider, whose run is differentiated by its scheduler."""

import diffusers
import tiny
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.stable_diffusion_3 import modular_blocks_stable_diffusion_3 as blocks

from diffusers_fisher import AutodiffFisher, DirectFisher, fisher_scheduler

SCALE = 4.0


def modular_pipeline():
    """Makes the denoising part of Stable Diffusion 3 in blocks, with a component that guides."""
    stock = tiny.stable_diffusion_3()
    tiny.awaken(stock.transformer)
    pipe = blocks.StableDiffusion3T2ICoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=stock.transformer.eval(), guider=ClassifierFreeGuidance(guidance_scale=SCALE),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
    return pipe


def conditions():
    embeds = tiny.embeds(2)
    return embeds | {f"negative_{name}": value.flip(0) for name, value in embeds.items()}


def guided_output(pipe):
    """Returns the guided output of the network as a function of (B, C, h, w) and a timestep, by its own class."""
    embeds = conditions()

    def evaluate(x, t):
        time = t.expand(len(x))
        with_prompt, without = (
            pipe.transformer(x, embeds[f"{sign}prompt_embeds"], embeds[f"{sign}pooled_prompt_embeds"], time).sample
            for sign in ("", "negative_")
        )
        return without + SCALE * (with_prompt - without)

    return evaluate


def run(pipe, latents):
    size = {"height": 64, "width": 64}  # the pipeline has no autoencoder, and takes 8 pixels to a latent
    return pipe(latents=latents, num_inference_steps=4, output="latents", **size, **conditions())


def test_gradient_of_a_modular_pipelines_run_is_that_of_full_backpropagation():
    pipe = modular_pipeline()
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    expected_end = run(pipe, noise)

    function, leaf = guided_output(pipe), noise.clone().requires_grad_()
    sample, scheduler = leaf, type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(4)
    for timestep in scheduler.timesteps:
        sample = scheduler.step(function(sample, timestep), timestep, sample, return_dict=False)[0]
    (expected,) = torch.autograd.grad((sample * weights).sum(), leaf)

    pipe.update_components(scheduler=fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config))
    with pipe.scheduler.differentiable(AutodiffFisher(function)) as trajectory:
        end = run(pipe, noise)
    assert torch.equal(end.detach(), expected_end)
    gradient = trajectory.gradient((end * weights).sum())
    assert float((gradient - expected).norm() / expected.norm()) < 1e-5

    with pipe.scheduler.differentiable(DirectFisher()) as trajectory:  # needs no function of the network
        end = run(pipe, noise)
    direct = trajectory.gradient((end * weights).sum())
    assert float(torch.cosine_similarity(direct.flatten(), expected.flatten(), dim=0)) > 0.5
