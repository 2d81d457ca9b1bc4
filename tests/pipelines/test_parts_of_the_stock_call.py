"""Parts that the stock call takes: small autoencoders, double precision, learned variance; and words for others."""

import copy

import pytest
import tiny
import torch
from cases import relative
from diffusers import AutoencoderTiny, DDPMPipeline, DDPMScheduler

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    InputError,
    PipelineDenoiser,
    UnsupportedError,
    fisher_pipeline,
    fisher_scheduler,
    guide,
    log_likelihood,
)
from diffusers_fisher.backbones import backbone_of
from pipelines.backbones import BACKBONES

QUICK = {"num_inference_steps": 2, "num_guidance_steps": 1}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bright(images, prompts):
    return images.mean((1, 2, 3))


# Autoencoders without a distribution


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.stable_diffusion_3])
def test_a_tiny_autoencoder_takes_the_place_of_the_pipelines_own(make):
    torch.manual_seed(0)
    pipe = make()
    pipe.vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), scaling_factor=0.5,
    )  # fmt: skip
    images = torch.rand(2, 3, 16, 16, generator=seeded())
    with torch.no_grad():
        expected = pipe.vae.encode(2 * images - 1).latents * 0.5
    assert torch.equal(backbone_of(pipe).samples_of(images), expected)
    arguments = {"prompt": ["a", "b"]} if make is tiny.stable_diffusion else tiny.embeds(2)
    scores = log_likelihood(pipe, images, **arguments, num_inference_steps=2, estimator=DirectFisher())
    assert bool(torch.isfinite(scores.bits_per_dim).all())
    if make is tiny.stable_diffusion:
        out = guide(pipe, ["a", "b"], bright, height=16, width=16, **QUICK)
        assert bool((out.gradient_norms > 0).all())


# Double precision


@pytest.mark.parametrize("name", BACKBONES)
def test_guidance_and_likelihood_in_double_precision_are_those_of_single(name):
    backbone = BACKBONES[name]
    noise, results = backbone.noise(), []
    for dtype in (torch.float32, torch.float64):
        pipe = backbone.ours().to(dtype)
        out = backbone.guide(pipe, bright, **QUICK, latents=backbone.packed(pipe, noise), generator=seeded())
        scores = backbone.score(pipe, latents=0.5 * noise, num_probes=1)
        assert out.latents.dtype == torch.float32
        results.append((out.latents, out.rewards, scores.log_prob))
    for single, double in zip(*results, strict=True):
        assert relative(double.double(), single.double()) < 1e-3  # a random network amplifies rounding


# Learned variance


def make_learned_variance(variance_type="learned_range"):
    torch.manual_seed(0)
    network = tiny.unconditional_unet(3)
    network.conv_out = torch.nn.Conv2d(network.conv_out.in_channels, 6, 3, padding=1)
    network.register_to_config(out_channels=6)
    scheduler = DDPMScheduler(variance_type=variance_type, clip_sample=False)
    return tiny.quiet(DDPMPipeline(unet=network, scheduler=scheduler)), network


@pytest.mark.parametrize("variance_type", ["learned_range", "learned"])
def test_a_denoiser_of_learned_variance_gives_the_mean_half(variance_type):
    pipe, network = make_learned_variance(variance_type)
    x = torch.randn(2, 3, 4, 4, generator=seeded())
    with torch.no_grad():
        expected = network(x, 500).sample[:, :3]
        assert torch.equal(PipelineDenoiser(pipe, batch_size=2).model_output(x, 500), expected)


def test_likelihood_of_a_pixel_model_of_learned_variance_is_that_of_its_mean_half():
    pipe, network = make_learned_variance()
    mean = tiny.unconditional(unet=copy.deepcopy(network), scheduler=DDPMScheduler(clip_sample=False))
    half = torch.nn.Conv2d(network.conv_out.in_channels, 3, 3, padding=1)
    half.weight.data, half.bias.data = network.conv_out.weight.data[:3], network.conv_out.bias.data[:3]
    mean.unet.conv_out = half
    images = torch.rand(2, 3, 4, 4, generator=seeded())
    options = {"num_inference_steps": 2, "estimator": AutodiffFisher(), "num_probes": 1}
    scores = [fisher_pipeline(each).log_likelihood(images, **options, generator=seeded()) for each in (pipe, mean)]
    assert torch.equal(scores[0].log_prob, scores[1].log_prob)


def test_guidance_of_a_pixel_model_of_learned_variance_starts_from_the_stock_image():
    pipe, _ = make_learned_variance()
    noise = torch.randn(1, 3, 8, 8, generator=seeded())
    ours = fisher_pipeline(pipe)
    out = ours.guide(bright, latents=noise, generator=seeded(1), height=8, width=8, output_type="np", **QUICK)
    assert bool((out.gradient_norms > 0).all())
    generator = seeded(1)
    stock = backbone_of(pipe).call(pipe.scheduler, noise, batch_size=1, generator=generator, num_inference_steps=2,
                                   output_type="np").images  # fmt: skip
    assert abs(out.initial_images - stock).max() < 1e-6


def test_gradient_of_a_run_of_learned_variance_is_that_of_the_run_with_this_variance():
    """The reference is back-propagation through the stock scheduler in float64, with the variance half detached."""
    pipe, network = make_learned_variance()
    network.double()
    stock, ours = pipe.scheduler, fisher_pipeline(pipe)
    scheduler = fisher_scheduler(type(stock)).from_config(stock.config)
    x = torch.randn(1, 3, 4, 4, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(1, 3, 4, 4, generator=seeded(3), dtype=torch.float64)

    def run(sampler, sample, detach):
        sampler.set_timesteps(4)
        generator = seeded(2)
        for timestep in sampler.timesteps:
            output = network(sample, timestep).sample
            if detach:
                output = torch.cat([output[:, :3], output[:, 3:].detach()], dim=1)
            sample = sampler.step(output, timestep, sample, generator=generator).prev_sample
        return sample

    leaf = x.clone().requires_grad_()
    expected = run(stock, leaf, detach=True)
    (expected * weight).sum().backward()
    denoiser = PipelineDenoiser(ours, batch_size=1)
    with torch.no_grad(), scheduler.differentiable(AutodiffFisher(denoiser)) as trajectory:
        last = run(scheduler, x, detach=False)
    assert torch.equal(last, expected)
    assert relative(trajectory.gradient((last * weight).sum()), leaf.grad) < 1e-10


# Networks that take more than latents


@pytest.mark.parametrize("channels", [8, 9])
def test_a_network_with_more_channels_than_latents_is_refused_in_words(channels):
    pipe = tiny.stable_diffusion(unet=tiny.unet(in_channels=channels))
    message = (
        f"network of StableDiffusionPipeline takes {channels} channels, but latents of its autoencoder have 4: it"
    )
    for arguments in ({"images": torch.rand(1, 3, 16, 16)}, {"latents": torch.zeros(1, 4, 8, 8)}):
        with pytest.raises(UnsupportedError, match=message):
            log_likelihood(pipe, **arguments, prompt="a")
    with pytest.raises(UnsupportedError, match=message):
        guide(pipe, "a", bright)


# Weights that were loaded under inference mode


def loaded_under_inference_mode(name="StableDiffusion"):
    with torch.inference_mode():
        return BACKBONES[name].ours()


@pytest.mark.parametrize("name", ["StableDiffusion", "DDPM", "DiT"])
def test_a_pipeline_loaded_under_inference_mode_works_without_derivatives_of_its_networks(name):
    backbone, pipe = BACKBONES[name], loaded_under_inference_mode(name)
    scores = [backbone.score(each, latents=backbone.noise(), estimator=DirectFisher()).log_prob
              for each in (pipe, backbone.ours())]  # fmt: skip
    assert torch.equal(*scores)
    out = backbone.guide(pipe, bright, num_inference_steps=2, num_guidance_steps=0)
    assert bool(torch.isfinite(out.rewards).all())


@pytest.mark.parametrize("name", ["StableDiffusion", "DDPM", "DiT"])
def test_derivatives_of_networks_loaded_under_inference_mode_are_refused_in_words(name):
    backbone, pipe = BACKBONES[name], loaded_under_inference_mode(name)
    message = r"The weights of \w+ were made under torch.inference_mode, so nothing .* Load the pipeline outside of it"
    with pytest.raises(UnsupportedError, match=message):
        backbone.score(pipe, latents=backbone.noise(), estimator=AutodiffFisher())
    assert bool(torch.isfinite(backbone.score(pipe, latents=backbone.noise()).log_prob).all())  # by differences
    with pytest.raises(UnsupportedError, match=message):
        backbone.guide(pipe, bright, **QUICK, estimator=AutodiffFisher())


def test_scheduler_without_learned_variance_still_refuses_two_halves():
    pipe, _ = make_learned_variance("fixed_small")
    with pytest.raises(InputError, match="two halves: pass the mean half alone"):
        log_likelihood(pipe, torch.rand(1, 3, 4, 4), num_inference_steps=2)
