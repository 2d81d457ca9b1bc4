"""The scheduler that stands for a pipeline's own, and the comparison of one step with a run."""

import copy
import inspect

import diffusers
import pytest
import tiny
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput

from diffusers_fisher import PipelineDenoiser, UnsupportedError, fisher_scheduler
from diffusers_fisher.backbones.echo import echo_scheduler


class SmallPipeline(diffusers.DiffusionPipeline):
    """Samples by a loop that does, on request, what a single step can't show."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, latents=None, num_inference_steps=4, change="", output_type="", return_dict=False):
        self.scheduler.set_timesteps(num_inference_steps)
        latents = 2 * latents if change == "scale" else latents
        second = copy.deepcopy(self.scheduler) if change == "sound" else None
        for index, t in enumerate(self.scheduler.timesteps):
            epsilon = self.unet(latents, t + (index if change == "timestep" else 0)).sample
            if change == "network" and index:
                epsilon = epsilon + self.unet(latents, t).sample
            if change == "output":
                epsilon = epsilon * num_inference_steps
            if change == "table":
                epsilon = epsilon * self.scheduler.alphas_cumprod[int(t)]
            latents = self.scheduler.step(epsilon, t, latents).prev_sample
            if change == "blend":
                latents = latents + 1
            if second is not None:
                second.step(epsilon, t, epsilon)
        latents = latents * 3 if change == "finish" else latents
        return (latents,)


REFUSED = {
    "scale": "changes the `latents` of its call",
    "sound": "a second kind of samples",
    "timestep": "step 1 of 4 gives its network other inputs than a single step",
    "network": "step 1 of 4 evaluates its network more often than a single step",
    "output": "step 0 of 4 makes another model output than a single step",
    "table": "reads `scheduler.alphas_cumprod`, which belongs to a whole run",
    "blend": "returned other latents than its scheduler's step",
}


def denoiser(change):
    unet = tiny.unconditional_unet(3)
    tiny.awaken(unet)
    return PipelineDenoiser(SmallPipeline(unet, tiny.scheduler()), change=change)


def noise():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("change", REFUSED)
def test_what_a_single_step_can_not_show_is_refused_in_words(change):
    with pytest.raises(UnsupportedError, match=REFUSED[change]):
        denoiser(change).model_output(noise(), 500)


@pytest.mark.parametrize("change", ["", "finish"])
def test_output_is_the_networks_own_and_the_network_is_evaluated_once(change):
    function, calls = denoiser(change), []
    hook = function.network.register_forward_pre_hook(lambda module, arguments: calls.append(arguments))
    state = torch.get_rng_state()
    x = noise().requires_grad_()
    output = function.model_output(x, 500)
    assert len(calls) == 1 and function.num_calls == 1 and torch.equal(torch.get_rng_state(), state)
    hook.remove()
    assert torch.equal(output, function.network(x, 500).sample) and output.requires_grad
    assert torch.equal(function.model_output(x, 500), output)


def test_a_changed_call_of_a_known_class_is_compared_too():
    class Fading(diffusers.DDPMPipeline):
        @torch.no_grad()
        def __call__(self, latents=None, num_inference_steps=4, output_type="", return_dict=False):
            return SmallPipeline.__call__(self, latents, num_inference_steps, "timestep")

    unet = tiny.unconditional_unet(3)
    tiny.awaken(unet)
    with pytest.raises(UnsupportedError, match=REFUSED["timestep"]):
        PipelineDenoiser(Fading(unet, tiny.scheduler())).model_output(noise(), 500)


def test_signatures_and_results_are_those_of_the_scheduler():
    real = fisher_scheduler(diffusers.LCMScheduler)()
    echo = echo_scheduler(real, 500)
    for name in ("step", "set_timesteps"):
        assert inspect.signature(getattr(echo, name)) == inspect.signature(getattr(real, name))
    echo.set_timesteps(4, device="cpu", original_inference_steps=50, strength=1.0)
    result = echo.step(noise() + 1, 500, noise(), generator=None)
    assert isinstance(result, LCMSchedulerOutput) and torch.equal(result.denoised, noise() + 1)
    assert torch.equal(echo.outputs[0], noise() + 1) and torch.equal(echo.samples[0], noise())
    assert torch.equal(echo.step(noise(), 500, noise(), return_dict=False)[0], noise())
    with pytest.raises(TypeError, match="eta"):
        echo.step(noise(), 500, noise(), eta=0.5)
    assert copy.deepcopy(echo).outputs == [] and len(echo.copies) == 1


def test_noise_is_added_at_the_level_of_the_networks_input():
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    image, added = noise() + 1, noise()
    noised = echo_scheduler(scheduler, 500).add_noise(image, added, torch.tensor([500]))
    bar = scheduler.alphas_cumprod[500]
    torch.testing.assert_close(noised, bar.sqrt() * image + (1 - bar).sqrt() * added)
    flow = echo_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), 250.0)
    torch.testing.assert_close(flow.scale_noise(image, 250.0, added), 0.75 * image + 0.25 * added)


@pytest.mark.parametrize(
    ("scheduler", "timestep", "sigmas"),
    [
        (diffusers.FlowMatchEulerDiscreteScheduler(), 250.0, [0.25, 0.0]),
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 250.0, [0.25, 1.0]),
        (
            diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
            torch.tensor([250, 500]),
            [[0.25, 0.5], [0.0, 0.0]],
        ),
    ],
)
def test_sigmas_are_those_of_the_timestep(scheduler, timestep, sigmas):
    torch.testing.assert_close(echo_scheduler(scheduler, timestep).sigmas, torch.tensor(sigmas))
