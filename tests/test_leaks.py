"""Runs that were let go leave no tensor and no memory behind: every kind of run, ended in every way."""

import contextlib
import gc

import psutil
import pytest
import tiny
import torch

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FisherDDIMScheduler,
    StableDiffusionFisherPipeline,
    fisher_scheduler,
    guide,
    log_likelihood,
    posterior_guidance,
)

RUNS = 50
IMAGES = torch.full((2, 3, 16, 16), 0.4)


def live_tensors():
    """Returns the number of tensors that Python knows, after a collection."""
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def stopping(images, prompts):
    raise KeyboardInterrupt


def scheduler_run(scheduler, estimator, size=8, steps=4):
    """Yields the trajectory of one run and its result."""
    scheduler.set_timesteps(steps)
    with torch.no_grad(), scheduler.differentiable(estimator) as trajectory:
        sample = torch.randn(1, 4, size, size)
        for timestep in scheduler.timesteps:
            model_input = scheduler.scale_model_input(sample, timestep)
            sample = scheduler.step(torch.tanh(model_input), timestep, sample).prev_sample
    return trajectory, sample


def with_gradient(scheduler):
    trajectory, sample = scheduler_run(scheduler, EndpointFisher(centred=True))
    trajectory.gradient(sample.sum())


def without_gradient(scheduler):
    scheduler_run(scheduler, DirectFisher())


def with_two_gradients(scheduler):
    trajectory, sample = scheduler_run(scheduler, DirectFisher())
    trajectory.gradient(sample.sum(), retain_graph=True)
    trajectory.gradient(sample.square().sum())


def with_an_operator(scheduler):
    trajectory, _ = scheduler_run(scheduler, AutodiffFisher(lambda sample, timestep: torch.tanh(sample)))
    trajectory.operator(1).matvec(torch.ones(1, 4, 8, 8))


def with_an_error_in_the_backward_pass(scheduler):
    trajectory, sample = scheduler_run(scheduler, AutodiffFisher(lambda sample, timestep: sample.detach()))
    with contextlib.suppress(ValueError):
        trajectory.gradient(sample.sum())


def with_an_interrupt(scheduler):
    scheduler.set_timesteps(4)
    with contextlib.suppress(KeyboardInterrupt), scheduler.differentiable(DirectFisher()):
        sample = torch.randn(1, 4, 8, 8)
        sample = scheduler.step(torch.tanh(sample), scheduler.timesteps[0], sample).prev_sample
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["DDIMScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler"])
@pytest.mark.parametrize(
    "run", [with_gradient, without_gradient, with_two_gradients, with_an_operator, with_an_error_in_the_backward_pass,
            with_an_interrupt],
    ids=lambda run: run.__name__,
)  # fmt: skip
def test_a_run_of_a_scheduler_leaves_no_tensor(run, name):
    import diffusers

    scheduler = fisher_scheduler(getattr(diffusers, name))()
    for _ in range(2):
        run(scheduler)
    before = live_tensors()
    for _ in range(RUNS):
        run(scheduler)
    assert live_tensors() <= before


def test_a_run_is_freed_without_a_collection():
    """A run holds no circle, so its memory is free as soon as nobody holds its result."""
    scheduler = FisherDDIMScheduler()
    with_gradient(scheduler)
    live_tensors()
    gc.disable()
    try:
        before = sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())
        with_gradient(scheduler)
        assert sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects()) <= before
    finally:
        gc.enable()


def test_the_memory_of_runs_stays_flat():
    """Fifty runs of ten steps with latents of 1 MB; each run used to leave its 80 MB."""
    process, scheduler = psutil.Process(), FisherDDIMScheduler()

    def run():
        trajectory, sample = scheduler_run(scheduler, DirectFisher(), size=256, steps=10)
        trajectory.gradient(sample.sum())

    for _ in range(5):
        run()
    before = process.memory_info().rss
    for _ in range(RUNS):
        run()
    assert process.memory_info().rss - before < 40 * 2**20  # half of what one run of fifty left; the allocator's own


def run_guidance(pipe):
    guide(pipe, "a", brightness, num_guidance_steps=1, num_inference_steps=2)


def guided_with_everything(pipe):
    guide(
        pipe, "a", brightness, num_guidance_steps=1, num_inference_steps=2, optimise=["noise", "text", "control"],
        estimator=AutodiffFisher(), held_out_reward=brightness, checkpoint_decoder=True,
    )  # fmt: skip


def guided_with_an_interrupt(pipe):
    with contextlib.suppress(KeyboardInterrupt):
        guide(pipe, "a", stopping, num_guidance_steps=1, num_inference_steps=2)


def guided_per_step(pipe):
    with posterior_guidance(pipe, brightness, "a", estimator=AutodiffFisher()) as guidance:
        pipe("a", num_inference_steps=2, callback_on_step_end=guidance)


def guided_per_step_with_an_interrupt(pipe):
    with contextlib.suppress(KeyboardInterrupt), posterior_guidance(pipe, stopping, "a") as guidance:
        pipe("a", num_inference_steps=2, callback_on_step_end=guidance)


def likelihood_with_probes(pipe):
    log_likelihood(pipe, IMAGES, "a", num_inference_steps=2, estimator=AutodiffFisher())


def likelihood_with_an_error(pipe):
    with contextlib.suppress(ValueError):
        log_likelihood(pipe, IMAGES * torch.nan, "a", num_inference_steps=2, estimator=AutodiffFisher())


@pytest.mark.parametrize(
    "run", [run_guidance, guided_with_everything, guided_with_an_interrupt, guided_per_step,
            guided_per_step_with_an_interrupt, likelihood_with_probes, likelihood_with_an_error],
    ids=lambda run: run.__name__,
)  # fmt: skip
def test_a_run_of_a_pipeline_leaves_no_tensor(run):
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        run(pipe)
    before = live_tensors()
    for _ in range(RUNS):
        run(pipe)
    assert live_tensors() <= before
