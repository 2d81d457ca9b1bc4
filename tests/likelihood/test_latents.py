"""Which latent stands for an image, and spectral statistics of a checkpoint's latents."""

import pytest
import tiny
import torch
from cases import relative
from diffusers import AutoencoderTiny, DDPMPipeline, StableDiffusionPipeline

from diffusers_fisher import (
    FluxFisherPipeline,
    InputError,
    StableDiffusionFisherPipeline,
    compare_checkpoints,
    compare_likelihood,
    log_likelihood,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.jobs.identity import pipeline_digests
from diffusers_fisher.likelihood.draws import ImageDraws

QUICK = {"num_inference_steps": 3}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=3):
    return torch.rand(count, 3, 8, 8, generator=seeded(3))


def scores(pipe, x=None, seed=0, **options):
    return log_likelihood(pipe, images() if x is None else x, generator=seeded(seed), **QUICK, **options)


def test_sampled_latents_are_draws_of_the_posterior_by_seed_and_image_alone():
    pipe = tiny.one_channel()
    out = scores(pipe, sample_latents=True)
    mean, deviation = backbone_of(pipe).posterior_of(images())
    keys = ["a", "b", "c"]
    named = scores(pipe, sample_latents=True, image_keys=keys)
    noise = ImageDraws(mean, seeded(), keys).normal("latents").float()
    latents = mean + deviation * noise
    by_hand = log_likelihood(pipe, latents=latents, generator=seeded(), image_keys=keys, **QUICK)
    # Differences divide the rounding of float32, which depends on the place in memory, by their length.
    assert relative(named.log_prob, by_hand.log_prob) < 5e-3
    assert (out.latents, by_hand.latents, scores(pipe).latents) == ("sampled", "given", "mean")
    # Encoders and networks round by batch, in float32.
    turned = scores(pipe, images().flip(0), sample_latents=True).log_prob.flip(0)
    assert relative(turned, out.log_prob) < 5e-3
    assert relative(scores(pipe, images()[:1], sample_latents=True).log_prob, out.log_prob[:1]) < 5e-3
    assert relative(scores(pipe, seed=1, sample_latents=True).log_prob, out.log_prob) > 0.02


def test_draws_of_latents_leave_the_other_draws_alone():
    pipe = tiny.one_channel()
    generators = [seeded(), seeded()]
    for generator, sample in zip(generators, (True, False), strict=True):
        log_likelihood(pipe, images(1), generator=generator, sample_latents=sample, **QUICK)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())


def test_comparisons_take_sampled_latents():
    pipe = tiny.one_channel()
    expected = scores(pipe, prompt="a", sample_latents=True).log_prob
    by_ode = compare_likelihood(
        pipe, images(), ["a", "b"], method="ode", generator=seeded(), sample_latents=True, **QUICK
    )
    # Differences divide the rounding of float32, which depends on the place in memory, by their length.
    assert relative(by_ode.log_prob[0], expected) < 5e-3 and by_ode.latents == "sampled"
    squares = compare_likelihood(pipe, images(), ["a"], num_levels=4, sample_latents=True)
    assert squares.latents == "sampled"
    assert compare_likelihood(pipe, images(), ["a"], num_levels=4).latents == "mean"
    table = compare_checkpoints([pipe, pipe], images(), "a", generator=seeded(), sample_latents=True, **QUICK)
    assert relative(table.log_prob[0], expected) < 5e-3 and table.latents == "sampled"


def test_texts_say_which_latents():
    pipe = tiny.one_channel()
    assert "(mean of the encoder)" in str(scores(pipe))
    assert "(drawn from the encoder)" in str(scores(pipe, sample_latents=True))
    assert "encoder" not in str(log_likelihood(pipe, latents=torch.zeros(1, 1, 4, 4), **QUICK))


def tiny_autoencoder():
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=1,
    )  # fmt: skip


def test_encoders_without_a_posterior_say_so():
    pipe = tiny.one_channel(vae=tiny_autoencoder())
    assert scores(pipe).latents == "encoded"
    with pytest.raises(InputError, match="but AutoencoderTiny has no posterior with a variance"):
        scores(pipe, sample_latents=True)


def test_sampled_latents_need_an_encoder():
    with pytest.raises(
        InputError, match="draws latents of images from the posterior of an autoencoder, but `latents` were passed"
    ):
        log_likelihood(tiny.one_channel(), latents=torch.zeros(1, 1, 4, 4), sample_latents=True, **QUICK)
    pixels = tiny.unconditional(DDPMPipeline, unet=tiny.unconditional_unet(3))
    assert scores(pixels, images(1)).latents == "pixels"
    with pytest.raises(InputError, match="but samples of DDPMPipeline are pixels"):
        scores(pixels, images(1), sample_latents=True)
    with pytest.raises(InputError, match="2 image keys were given for 3 images; give as many"):
        scores(tiny.one_channel(), sample_latents=True, image_keys=["a", "b"])


# Spectral statistics

STATISTICS = torch.full((1, 4, 4), 0.2), torch.full((1, 4, 4), 1.5)
SPECTRUM = torch.linspace(0.5, 3, 16).view(1, 4, 4)


def with_spectrum():
    pipe = tiny.one_channel(StableDiffusionFisherPipeline)
    pipe.latent_statistics = STATISTICS
    pipe.latent_spectrum = SPECTRUM
    return pipe


def test_spectrum_is_the_prior_of_latents_of_its_size():
    pipe = with_spectrum()
    out = scores(pipe)
    assert out.prior == "spectral" and "prior spectral" in str(out)
    assert compare_likelihood(pipe, images(), ["a"], num_levels=4).log_prob.shape == (1, 3)
    wide = torch.rand(1, 3, 8, 16, generator=seeded())
    assert scores(pipe, wide).prior == "moment-matched"  # by the mean over space
    assert scores(pipe, prior_mean=0.0, prior_variance=1.0).prior == "moment-matched"
    pipe.latent_statistics = STATISTICS
    assert pipe.latent_spectrum is None  # it belonged to the mean before
    assert scores(pipe).prior == "moment-matched"


def test_spectrum_is_saved_loaded_and_part_of_the_digest(tmp_path):
    pipe = with_spectrum()
    pipe.save_pretrained(tmp_path)
    loaded = StableDiffusionFisherPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.latent_spectrum, SPECTRUM)
    stock = tiny.quiet(StableDiffusionPipeline.from_pretrained(tmp_path))
    assert scores(stock).prior == "spectral"
    before = pipeline_digests(pipe)
    pipe.latent_spectrum = SPECTRUM + 1
    assert pipeline_digests(pipe)["weights"] != before["weights"]
    pipe.latent_spectrum = None
    pipe.save_pretrained(tmp_path)
    assert StableDiffusionFisherPipeline.from_pretrained(tmp_path).latent_spectrum is None


def test_packed_latents_have_the_variances_of_their_elements():
    pipe = tiny.quiet(tiny.flux(FluxFisherPipeline))
    backbone = backbone_of(pipe)
    samples = torch.zeros(1, backbone.latent_channels, 8, 8)
    pipe.latent_statistics = torch.zeros(samples.shape[1:]), torch.ones(samples.shape[1:])
    pipe.latent_spectrum = torch.ones(samples.shape[1:])
    assert backbone.prior(None, None, samples)[2] == "pixel"


@pytest.mark.parametrize(
    ("statistics", "spectrum", "message"),
    [
        (None, SPECTRUM, r"shape \(1, 4, 4\), the mean of `latent_statistics` None; allowed: one shape"),
        (STATISTICS, torch.ones(1, 2, 2), r"shape \(1, 2, 2\), the mean of `latent_statistics` \(1, 4, 4\)"),
    ],
)
def test_spectrum_without_its_mean_is_refused(statistics, spectrum, message):
    pipe = tiny.one_channel(StableDiffusionFisherPipeline)
    pipe.latent_statistics = statistics
    with pytest.raises(InputError, match=message):
        pipe.latent_spectrum = spectrum
