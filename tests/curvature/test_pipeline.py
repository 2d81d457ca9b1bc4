"""The bound of images under a pipeline: the denoiser's bound at the images' latents, on stock and on our classes."""

import math

import pytest
import tiny
import torch
from pipelines.backbones import BACKBONES

from diffusers_fisher import (
    AutodiffFisher,
    FiniteDifferenceFisher,
    InputError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    likelihood_bound,
)
from diffusers_fisher.curvature import BoundOptions, denoiser_likelihood_bound
from diffusers_fisher.fisher import LevelFisher

PROMPTS = ["a b", "c"]
QUICK = {"num_inference_steps": 3, "num_draws": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def latents(count=2):
    return torch.randn(count, 1, 4, 4, generator=seeded())


@pytest.fixture(scope="module")
def pipe():
    return tiny.one_channel(StableDiffusionFisherPipeline)


def test_equals_the_bound_of_the_pipelines_denoiser(pipe):
    out = pipe.likelihood_bound(None, PROMPTS, latents=latents(), **QUICK, generator=seeded())
    denoiser = PipelineDenoiser(pipe, prompt=PROMPTS)
    options = BoundOptions(num_steps=3, num_draws=2, num_probes=1, generator=seeded())
    expected = denoiser_likelihood_bound(denoiser, latents(), FiniteDifferenceFisher(), options)
    assert torch.equal(out.value, expected.value)
    assert torch.equal(
        likelihood_bound(pipe, None, PROMPTS, latents=latents(), **QUICK, generator=seeded()).value, out.value
    )
    assert (out.num_denoiser_calls, out.space, out.dims) == (12, "latent", 16)


def test_a_batch_of_images_has_the_numbers_of_each_alone(pipe):
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=seeded()).float() / 255
    options = {**QUICK, "estimator": AutodiffFisher(), "num_probes": None}
    whole = pipe.likelihood_bound(images, "a", **options, generator=seeded())
    for row in (2, 0):
        alone = pipe.likelihood_bound(images[row : row + 1], "a", **options, generator=seeded())
        assert float((whole.bits_per_dim[row] - alone.bits_per_dim[0]).abs()) < 1e-4  # float32 in other batches


@pytest.mark.parametrize("name", BACKBONES)
def test_every_family_has_bounds_and_maps(name):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    samples = 0.5 * backbone.noise()
    first = () if backbone.condition is None else (backbone.condition,)
    table = LevelFisher(torch.tensor([0.1, 1.0]), torch.tensor([0.8, 0.3]))
    out = pipe.likelihood_bound(
        None, *first, latents=samples, estimator=table, maps=True, num_inference_steps=2, num_draws=1,
        generator=seeded(),
    )  # fmt: skip
    assert torch.isfinite(out.value).all()
    assert out.maps.shape == samples.shape
    height, width = (side * 8 for side in samples.shape[2:])
    maps = out.image_maps(height, width)
    assert maps.shape == (len(samples), height, width)
    assert torch.allclose(maps.flatten(1).sum(1), out.value)


def test_maps_are_refused_without_maps_and_at_other_sizes(pipe):
    out = pipe.likelihood_bound(None, "a", latents=latents(1), **QUICK)
    with pytest.raises(InputError, match="The maps are None for images of 8x8 pixels; allowed: maps"):
        out.image_maps(8, 8)
    out = pipe.likelihood_bound(None, "a", latents=latents(1), maps=True, **QUICK)
    with pytest.raises(InputError, match=r"The maps are \(1, 1, 4, 4\) for images of 8x9 pixels"):
        out.image_maps(8, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bins": 256}, "`bins` is 256, but StableDiffusionFisherPipeline is in latents"),
        ({"guidance_scale": 3.0}, "guidance"),
        ({"negative_prompt": "d"}, "`negative_prompt` is 'd'; likelihoods and curvature are without guidance"),
        ({"num_draw": 2}, "`likelihood_bound` does not take `num_draw`. Did you mean `num_draws`"),
        ({"num_inference_steps": 0}, "`num_steps` is 0; allowed"),
        ({"image_keys": ["a"]}, "1 image keys were given for 2 images"),
    ],
)
def test_wrong_arguments_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.likelihood_bound(None, "a", latents=latents(), **options)


def test_embedded_checkpoint_is_bounded_near_the_odes_value():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = (tensor[:4] for tensor in embedded_test_images())
    prompts = [embedded_prompt(int(label)) for label in labels]
    out = pipe.likelihood_bound(images, prompts, num_inference_steps=10, num_draws=6, generator=seeded())
    ode = pipe.log_likelihood(images, prompts, generator=seeded())
    gap = float((out.bits_per_dim - ode.bits_per_dim).mean())
    error = float(out.standard_error.square().sum().sqrt()) / 4 / (256 * math.log(2))
    assert -3 * error < gap < 0.3
    assert out.num_denoiser_calls == 60
    assert out.variance == "optimal, TraceMatchingFisher (target jacobian), no probes"
