"""Ten numbers of the package before the house was rebuilt, bit for bit on the CPU. To be deleted when it stands.

`python tests/test_pins.py` writes pins.json anew.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent)]

import pytest
import tiny
import torch

import diffusers_fisher as df

FILE = Path(__file__).with_name("pins.json")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def checkpoint():
    return tiny.quiet(df.StableDiffusionFisherPipeline.from_pretrained(df.embedded_checkpoint()))


def images_and_prompts(count=2):
    images, labels = df.embedded_test_images()
    return images[:count], [df.embedded_prompt(int(label)) for label in labels[:count]]


def brightness(images, prompts):
    return images[..., : images.shape[-1] // 2].mean((1, 2, 3)) - images[..., images.shape[-1] // 2 :].mean((1, 2, 3))


def likelihood_by_trace_model():
    images, prompts = images_and_prompts()
    out = checkpoint().log_likelihood(images, prompts, num_inference_steps=6)
    return torch.cat([out.log_prob, out.discretisation_error, out.prior_log_prob])


def likelihood_by_probes():
    images, prompts = images_and_prompts()
    out = checkpoint().log_likelihood(
        images, prompts, num_inference_steps=4, estimator=df.AutodiffFisher(), generator=seeded(), step_halving=True
    )
    return torch.cat([out.log_prob, out.standard_error, out.discretisation_error])


def likelihood_by_differences_of_noised_images():
    images, prompts = images_and_prompts()
    out = checkpoint().log_likelihood(
        images, prompts, num_inference_steps=4, estimator=df.FiniteDifferenceFisher(), generator=seeded(), noised=True
    )
    return torch.cat([out.log_prob, out.standard_error])


def comparison_by_squared_errors():
    images, prompts = images_and_prompts()
    out = checkpoint().compare_likelihood(images, prompts, num_levels=4, generator=seeded())
    return out.log_prob.flatten()


def guidance_by_default():
    out = checkpoint().guide(
        "a photo of a coat", brightness, num_guidance_steps=2, num_inference_steps=4, generator=seeded(),
        guidance_scale=2.0,
    )  # fmt: skip
    return torch.cat([out.rewards.flatten(), out.gradient_norms.flatten(), out.latents.double().flatten()[:4]])


def guidance_of_text_and_control():
    out = checkpoint().guide(
        "a photo of a coat", brightness, num_guidance_steps=1, num_inference_steps=3, generator=seeded(),
        optimise=("noise", "text", "control"), estimator=df.AutodiffFisher(), adjoint_guidance_scale=1.0,
        guidance_scale=2.0,
    )  # fmt: skip
    return torch.cat([out.rewards.flatten(), out.gradient_norms.flatten()])


def guidance_step_by_step():
    pipe = checkpoint()
    with df.posterior_guidance(pipe, brightness) as guidance:
        out = pipe(
            "a photo of a coat", num_inference_steps=4, generator=seeded(), output_type="latent",
            callback_on_step_end=guidance,
        )  # fmt: skip
    return torch.cat([out.images.double().flatten()[:4], torch.stack(guidance.rewards).flatten()])


def gradient_through_a_multistep_scheduler():
    pipe = tiny.stable_diffusion()
    pipe.scheduler = df.FisherDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=True)
    denoiser = df.PipelineDenoiser(pipe, 4.0, prompt=["a b"])
    with pipe.scheduler.differentiable(df.AutodiffFisher(denoiser)) as trajectory:
        latents = pipe(
            ["a b"], latents=torch.randn(1, 4, 8, 8, generator=seeded()), num_inference_steps=4, guidance_scale=4.0,
            output_type="latent",
        ).images  # fmt: skip
    return trajectory.gradient(latents.square().sum()).double().flatten()[:4]


def packed_latents_and_flow_matching():
    pipe = tiny.flux(df.FluxFisherPipeline, texts=True, guidance_embeds=True)
    x = torch.randn(1, 4, 4, 4, generator=seeded())
    out = pipe.log_likelihood(
        None, "a", latents=x, num_inference_steps=4, generator=seeded(), estimator=df.AutodiffFisher(),
        max_sequence_length=8,
    )  # fmt: skip
    guided = pipe.guide(
        "a", brightness, height=8, width=8, num_guidance_steps=1, num_inference_steps=2, generator=seeded(),
        max_sequence_length=8,
    )  # fmt: skip
    return torch.cat([out.log_prob, guided.rewards.flatten()])


def pixels_and_noise_levels():
    pipe = tiny.unconditional(df.DDPMFisherPipeline)
    out = pipe.log_likelihood(torch.full((1, 3, 4, 4), 0.25), num_inference_steps=3, bins=5, generator=seeded())
    levels = []
    for cls in (df.FisherEulerDiscreteScheduler, df.FisherEDMEulerScheduler, df.FisherFlowMatchHeunDiscreteScheduler):
        scheduler = cls()
        scheduler.set_timesteps(5)
        levels += [df.noise_level(scheduler, scheduler.timesteps[2], 2).sigma]
        levels += [df.noise_level(scheduler, scheduler.timesteps[2]).alpha]
    return torch.cat([out.log_prob, out.bits_per_dim, torch.stack(levels).double()])


PINS = [
    likelihood_by_trace_model, likelihood_by_probes, likelihood_by_differences_of_noised_images,
    comparison_by_squared_errors, guidance_by_default, guidance_of_text_and_control, guidance_step_by_step,
    gradient_through_a_multistep_scheduler, packed_latents_and_flow_matching, pixels_and_noise_levels,
]  # fmt: skip


@pytest.mark.parametrize("pin", PINS, ids=lambda pin: pin.__name__)
def test_pinned(pin):
    kept = [float.fromhex(number) for number in json.loads(FILE.read_text())[pin.__name__]]
    assert pin().tolist() == kept


if __name__ == "__main__":
    torch.set_num_threads(1)
    FILE.write_text(json.dumps({pin.__name__: [x.hex() for x in pin().tolist()] for pin in PINS}, indent=1) + "\n")
