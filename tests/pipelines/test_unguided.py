"""Denoisers and likelihoods without guidance: switched off where the library knows how, verified everywhere."""

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import (
    Backbone,
    InputError,
    PipelineDenoiser,
    UnsupportedError,
    compare_likelihood,
    log_likelihood,
    register_backbone,
)
from diffusers_fisher.backbones import registry
from diffusers_fisher.backbones.networks import denoising_networks
from diffusers_fisher.backbones.stable_diffusion import StableDiffusionBackbone
from diffusers_fisher.features import count_evaluations

from .outside import SET_UPS, hunyuan_image

CFG = diffusers.ClassifierFreeGuidance


@pytest.fixture
def backbones(monkeypatch):
    """Takes the backbones that a test registers away again."""
    monkeypatch.setattr(registry, "BACKBONES", dict(registry.BACKBONES))


def evaluations(denoiser, x):
    """Returns how often one evaluation of the denoiser evaluates the network per sample, and the model output."""
    with count_evaluations(denoising_networks(denoiser.pipe.components).values()) as counts:
        output = denoiser.model_output(x, 500.0)
    return sum(counts) / len(x), output


@pytest.mark.parametrize("name", ["z_image", "krea2"])
def test_a_scale_of_one_is_refused_where_it_guides(name):
    setup = SET_UPS[name]()
    denoiser = PipelineDenoiser(setup.pipe, 1.0, **setup.conditions)
    with pytest.raises(UnsupportedError, match=r"on 4 samples for 2, although no guidance.*guidance_scale"):
        denoiser.model_output(setup.noise(), 500.0)
    guided = PipelineDenoiser(setup.pipe, **setup.conditions, **setup.guidance)
    assert guided.is_guided and evaluations(guided, setup.noise())[0] == 2


def test_other_arguments_that_guide_count_as_guidance():
    setup = SET_UPS["qwen_image"]()
    guided = PipelineDenoiser(setup.pipe, **setup.conditions, true_cfg_scale=4.0)
    plain = PipelineDenoiser(setup.pipe, **setup.conditions)
    assert (guided.is_guided, plain.is_guided) == (True, False)
    assert plain.call_arguments["true_cfg_scale"] == 1.0
    assert (evaluations(guided, setup.noise())[0], evaluations(plain, setup.noise())[0]) == (2, 1)


def test_a_guider_is_switched_off_on_a_copy():
    setup = hunyuan_image(CFG(guidance_scale=5.0))
    own = dict(vars(setup.pipe.guider))
    plain, guided = (PipelineDenoiser(setup.pipe, scale, **setup.conditions) for scale in (None, 5.0))
    count, output = evaluations(plain, setup.noise())
    guided_count, guided_output = evaluations(guided, setup.noise())
    assert (count, guided_count) == (1, 2)
    conditional = hunyuan_image(CFG(enabled=False))
    expected = PipelineDenoiser(conditional.pipe, **conditional.conditions).model_output(setup.noise(), 500.0)
    assert torch.equal(output, expected) and not torch.allclose(guided_output, expected, rtol=0.05)
    assert vars(setup.pipe.guider) == own  # its step, too


@pytest.mark.parametrize(
    "make", [lambda: CFG(stop=0.5), lambda: CFG(start=0.2), diffusers.AdaptiveProjectedMixGuidance]
)
def test_guiders_that_act_by_the_step_are_refused(make):
    setup = hunyuan_image(make())
    with pytest.raises(UnsupportedError, match=r"The guider .* acts by the step's index"):
        PipelineDenoiser(setup.pipe, 5.0, **setup.conditions)
    assert evaluations(PipelineDenoiser(setup.pipe, **setup.conditions), setup.noise())[0] == 1


def test_a_scale_that_the_call_does_not_take_is_refused():
    with pytest.raises(InputError, match=r"takes no `guidance_scale`; got 4\.0"):
        PipelineDenoiser(tiny.unconditional(), 4.0)
    assert not PipelineDenoiser(tiny.unconditional(), 1.0).is_guided


@pytest.mark.parametrize(("scale", "expected"), [(None, 3.5), (2.0, 2.0), (1.0, 1.0)])
def test_distilled_guidance_is_told_the_calls_own_default(scale, expected):
    pipe, told = tiny.flux(guidance_embeds=True), []
    tiny.awaken(pipe.transformer)
    with torch.no_grad():
        denoiser = PipelineDenoiser(pipe, scale, **tiny.embeds(2), height=16, width=16)
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, arguments, keywords: told.append(keywords["guidance"]), with_kwargs=True
        )
        denoiser.model_output(torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0)), 500.0)
        hook.remove()
    assert told[0].tolist() == [expected] * 2
    assert denoiser.embedded_guidance_scale == denoiser.guidance_scale == expected and not denoiser.is_guided


def test_other_names_of_distilled_guidance():
    setup = hunyuan_image(None, guidance_embeds=True)
    assert PipelineDenoiser(setup.pipe, **setup.conditions).embedded_guidance_scale == 3.25
    lcm = SET_UPS["lcm"]()
    assert PipelineDenoiser(lcm.pipe, **lcm.conditions).embedded_guidance_scale == 8.5


def test_likelihoods_say_of_which_scale_they_are():
    pipe = tiny.flux(guidance_embeds=True)
    tiny.awaken(pipe.transformer)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = log_likelihood(pipe, latents=latents, num_inference_steps=3, **tiny.embeds(2))
    assert out.guidance_scale == 3.5 and "at guidance scale 3.5" in str(out)
    other = log_likelihood(pipe, latents=latents, num_inference_steps=3, guidance_scale=2.0, **tiny.embeds(2))
    assert other.guidance_scale == 2.0 and not torch.equal(out.log_prob, other.log_prob)
    compared = compare_likelihood(pipe, latents=latents, num_levels=4, **tiny.embeds(2))
    assert compared.guidance_scale == 3.5
    schnell = log_likelihood(tiny.flux(), latents=latents, num_inference_steps=3, **tiny.embeds(2))
    assert schnell.guidance_scale is None and "guidance" not in str(schnell)


def test_likelihood_of_a_family_of_ones_own_is_unguided(backbones):
    setup = SET_UPS["sd_pag"]()
    register_backbone(diffusers.StableDiffusionPAGPipeline, StableDiffusionBackbone)
    latents = setup.noise()
    out = log_likelihood(
        setup.pipe, latents=latents, num_inference_steps=3, generator=torch.Generator().manual_seed(1)
    )
    stock = tiny.stable_diffusion()
    stock.unet = setup.pipe.unet
    expected = log_likelihood(
        stock, latents=latents, num_inference_steps=3, generator=torch.Generator().manual_seed(1)
    )
    torch.testing.assert_close(out.log_prob, expected.log_prob)
    with pytest.raises(InputError, match=r"`pag_scale` is 3\.0; likelihoods and curvature are at 0\.0"):
        log_likelihood(setup.pipe, latents=latents, num_inference_steps=3, pag_scale=3.0)
    with pytest.raises(InputError, match=r"`pag_scale` is 2\.0; likelihoods and curvature are at 0\.0"):
        compare_likelihood(setup.pipe, latents=latents, prompts=["a", "b"], num_levels=2, pag_scale=2.0)


def test_likelihood_of_a_guided_output_is_refused(backbones):
    class WrongScale(Backbone):
        predicts_flow = True
        size_multiple = 16
        latent_channels = 4

        def unguided_scale(self, call_arguments):
            return 1.0  # at which Z-Image is guided

        def conditions(self, prompt, call_arguments, count, num_images_per_prompt=1):
            return [""] * count, setup.conditions

    setup = SET_UPS["z_image"]()
    register_backbone(diffusers.ZImagePipeline, WrongScale)
    with pytest.raises(UnsupportedError, match="although no guidance was asked for"):
        log_likelihood(setup.pipe, latents=setup.noise(), num_inference_steps=3)
