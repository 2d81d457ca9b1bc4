"""Stock pipelines with a Fisher scheduler give the same pictures, and gradients of the whole run."""

import inspect

import diffusers
import pytest
import tiny
import torch
from cases import relative
from pipeline_cases import PIPELINES, PipelineCase

from diffusers_fisher import AutodiffFisher, DirectFisher, PipelineDenoiser, TrajectoryError, fisher_scheduler

GRADIENT = 1e-5  # float32, the same products in another order through four steps: measured up to 2e-6


def swap(pipe, cls=None, **changes):
    """Sets the Fisher version of its scheduler (or of `cls`) on `pipe`, and returns the pipeline."""
    cls = fisher_scheduler(cls or type(pipe.scheduler))
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
    return pipe


def back_propagation(case, pipe, weight):
    """Returns result and gradient by autograd through the pipeline's call without its no_grad decorator."""
    leaf = case.noise().requires_grad_()
    result = case.sample(pipe, leaf, call=inspect.unwrap(type(pipe).__call__))
    (gradient,) = torch.autograd.grad((weight * result).sum(), leaf)
    return result.detach(), gradient


def weight_of(case):
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PIPELINES)
def test_swapped_scheduler_gives_the_same_result_and_the_gradient_of_back_propagation(name):
    case = PIPELINES[name]
    stock, weight = case.make(), weight_of(case)
    reference, exact = back_propagation(case, stock, weight)
    assert torch.equal(case.sample(stock, case.noise()), reference)
    pipe = swap(case.make())
    denoiser = PipelineDenoiser(pipe, guidance_scale=case.guidance_scale, **case.arguments())
    assert torch.equal(case.sample(pipe, case.noise()), reference)  # untracked
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = case.sample(pipe, case.noise())
    assert torch.equal(result.detach(), reference)
    assert relative(trajectory.gradient((weight * result).sum()), exact) < GRADIENT
    assert denoiser.num_calls == len(trajectory.states) == 4
    assert torch.equal(case.sample(pipe, case.noise()), reference)  # untracked again


SAMPLERS = [
    (diffusers.DPMSolverMultistepScheduler, {}),
    (diffusers.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    (diffusers.EulerDiscreteScheduler, {}),
    (diffusers.EulerAncestralDiscreteScheduler, {}),
    (diffusers.HeunDiscreteScheduler, {}),
    (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    (diffusers.UniPCMultistepScheduler, {}),
    (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("cls", "changes"), SAMPLERS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_guided_stable_diffusion_with_other_samplers(cls, changes):
    case = PipelineCase(tiny.stable_diffusion, 4.0)
    weight, pipe = weight_of(case), case.make()
    stock = cls.from_config(pipe.scheduler.config, **changes)
    seeded = {"generator": lambda: torch.Generator().manual_seed(3)}
    pipe.scheduler = stock
    leaf = case.noise().requires_grad_()
    call = inspect.unwrap(type(pipe).__call__)
    reference = case.sample(pipe, leaf, call=call, generator=seeded["generator"]())
    (exact,) = torch.autograd.grad((weight * reference).sum(), leaf)
    swap(pipe)
    denoiser = PipelineDenoiser(pipe, guidance_scale=case.guidance_scale, **case.arguments())
    with pipe.scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        result = case.sample(pipe, case.noise(), generator=seeded["generator"]())
    assert torch.equal(result.detach(), reference.detach())
    assert relative(trajectory.gradient((weight * result).sum()), exact) < GRADIENT


def test_eta_reaches_the_scheduler():
    """Pipelines pass `eta` and `generator` only to a step whose signature names them."""
    case, results = PIPELINES["SD"], []
    for pipe in (case.make(), swap(case.make())):
        seeded = torch.Generator().manual_seed(3)
        results.append(case.sample(pipe, case.noise(), eta=1.0, generator=seeded))
    assert torch.equal(*results)
    assert not torch.equal(results[0], case.sample(case.make(), case.noise()))


def test_network_is_called_without_a_graph_and_left_as_it_was():
    case = PIPELINES["SD guided"]
    pipe, modes = swap(case.make()), []
    hook = pipe.unet.register_forward_pre_hook(lambda module, inputs: modes.append(torch.is_grad_enabled()))
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    with pipe.scheduler.differentiable(DirectFisher()) as trajectory:
        result = case.sample(pipe, case.noise())
    hook.remove()
    assert modes == [False] * 4
    assert result.requires_grad
    assert trajectory.gradient(result.sum()).shape == case.shape
    assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize("mode", ["refuse", "additive"])
def test_callbacks_that_change_the_latents(mode):
    case = PIPELINES["SD guided"]
    pipe, weight = swap(case.make()), weight_of(case)

    def callback(pipe, index, t, arguments):
        return {"latents": arguments["latents"] + 0.1 * weight} if index < 3 else {}

    def tracked_run():
        denoiser = PipelineDenoiser(pipe, guidance_scale=case.guidance_scale, **case.arguments())
        with pipe.scheduler.differentiable(AutodiffFisher(denoiser), changed_latents=mode) as trajectory:
            result = case.sample(pipe, case.noise(), callback_on_step_end=callback)
        return trajectory.gradient((weight * result).sum())

    if mode == "refuse":
        with pytest.raises(TrajectoryError, match="Step 1 received other latents than step 0 returned"):
            tracked_run()
        return
    leaf, stock = case.noise().requires_grad_(), case.make()
    call = inspect.unwrap(type(stock).__call__)
    reference = case.sample(stock, leaf, call=call, callback_on_step_end=callback)
    (exact,) = torch.autograd.grad((weight * reference).sum(), leaf)
    assert relative(tracked_run(), exact) < GRADIENT
