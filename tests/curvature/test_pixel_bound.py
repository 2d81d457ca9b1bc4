"""The bound in pixels of models in latents, against its three terms by torch's own distributions."""

import math

import pytest
import tiny
import torch

from diffusers_fisher import (
    InputError,
    LevelFisher,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    fit_decoder_variance,
    likelihood_bound,
    pixel_likelihood_bound,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.likelihood.draws import ImageDraws

TABLE = LevelFisher(torch.tensor([0.1, 1.0]), torch.tensor([0.8, 0.3]))
QUICK = {"num_inference_steps": 2, "num_draws": 2, "estimator": TABLE}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipe():
    return tiny.one_channel(StableDiffusionFisherPipeline)


def images(count=2):
    return torch.randint(0, 256, (count, 3, 8, 8), generator=seeded()).float() / 255


@pytest.mark.parametrize("bins", [256, None])
def test_is_the_sum_of_its_terms(pipe, bins):
    keys, generator, pixels = ["a", "b"], seeded(), images()
    out = pipe.pixel_likelihood_bound(
        pixels, "a", decoder_variance=0.1, num_encodings=2, bins=bins, generator=seeded(), image_keys=keys, **QUICK
    )
    backbone = backbone_of(pipe)
    with torch.no_grad():
        mean, deviation = backbone.encode(2 * pixels - 1)
    draws = ImageDraws(mean, generator, keys)
    entropy = torch.distributions.Normal(mean.double(), deviation.double()).entropy().flatten(1).sum(1)
    assert torch.allclose(out.encoder_term, -entropy)
    decoder, latent = [], []
    for number in range(2):
        z = mean + deviation * draws.normal("encoding", number).float()
        with torch.no_grad():
            law = torch.distributions.Normal(backbone.decode_scaled(z).double(), math.sqrt(0.1))
        x = 2 * pixels.double() - 1
        if bins is None:
            terms = law.log_prob(x)
        else:
            upper = torch.where(pixels == 1, 1.0, law.cdf(x + 1 / 255))
            terms = (upper - torch.where(pixels == 0, 0.0, law.cdf(x - 1 / 255))).log()
        decoder.append(-terms.flatten(1).sum(1))
        encoding_keys = [f"{key}, encoding {number}" for key in keys]
        latent.append(
            likelihood_bound(pipe, None, "a", latents=z, generator=generator, image_keys=encoding_keys, **QUICK).value
        )
    assert torch.allclose(out.decoder_term, torch.stack(decoder).mean(0), rtol=1e-5)
    assert torch.allclose(out.latent_term, torch.stack(latent).mean(0), rtol=1e-5)
    assert torch.allclose(out.value, out.decoder_term + out.encoder_term + out.latent_term)
    assert torch.allclose(out.bits_per_dim, out.value / (192 * math.log(2)))
    scatter = (torch.stack(decoder) + torch.stack(latent)).std(0) / math.sqrt(2)
    assert torch.allclose(out.standard_error, scatter, rtol=1e-3)
    assert (out.dims, out.num_denoiser_calls, out.decoder_variance) == (192, 8, 0.1)
    assert out.density == ("data" if bins is None else "bins")


def test_the_fitted_variance_is_the_best(pipe):
    """Among the decoder's variances, the fitted one has the least decoder term on the images of the fit."""
    fitted = fit_decoder_variance(pipe, images(4), generator=seeded())
    terms = [
        float(
            pixel_likelihood_bound(
                pipe, images(4), "a", decoder_variance=factor * fitted, num_encodings=1, bins=None, generator=seeded(),
                **QUICK,
            ).decoder_term.sum()
        )
        for factor in (0.8, 1.0, 1.25)
    ]  # fmt: skip
    assert terms[1] < min(terms[0], terms[2])


def test_an_image_has_the_same_number_in_every_batch(pipe):
    options = {"decoder_variance": 0.1, "num_encodings": 1, **QUICK}
    whole = pipe.pixel_likelihood_bound(images(3), "a", generator=seeded(), **options)
    alone = pipe.pixel_likelihood_bound(images(3)[1:2], "a", generator=seeded(), **options)
    assert float((whole.value[1] - alone.value[0]).abs()) < 1e-3 * abs(float(alone.value[0]))
    assert torch.isinf(alone.standard_error).all()


def test_wrong_arguments_are_refused(pipe):
    with pytest.raises(InputError, match=r"`decoder_variance` is 0.0 and `num_encodings` 4; allowed: above 0"):
        pipe.pixel_likelihood_bound(images(), "a", decoder_variance=0.0)
    with pytest.raises(InputError, match=r"`decoder_variance` is 1.0 and `num_encodings` 0; allowed"):
        pipe.pixel_likelihood_bound(images(), "a", decoder_variance=1.0, num_encodings=0)
    with pytest.raises(InputError, match="`latents` and `maps` have no use for a bound in pixels"):
        pipe.pixel_likelihood_bound(images(), "a", decoder_variance=1.0, maps=True)
    with pytest.raises(InputError, match="1 image keys were given for 2 images"):
        pipe.pixel_likelihood_bound(images(), "a", decoder_variance=1.0, image_keys=["a"])
    with pytest.raises(InputError, match="beside the 256 values"):
        pipe.pixel_likelihood_bound(images() * 0.9987, "a", decoder_variance=1.0)
    with pytest.raises(UnsupportedError, match=r"DDPMPipeline is in pixels itself; take `likelihood_bound`"):
        fit_decoder_variance(tiny.unconditional(), images())


def test_encodings_that_are_not_random_are_refused():
    from pipelines.backbones import BACKBONES

    with pytest.raises(UnsupportedError, match=r"The encoding of .* is not random, so there is no bound in pixels"):
        fit_decoder_variance(BACKBONES["LDM"].ours(), torch.rand(1, 3, 32, 32))
