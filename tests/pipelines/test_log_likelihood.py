"""The pipeline's likelihood: it does not depend on the form of the image, and equals that of an independent loop."""

import math

import diffusers
import numpy
import pytest
import tiny
import torch
from cases import relative
from PIL import Image

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    InputError,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    fisher_scheduler,
)

PROMPTS = ["a b", "c"]


def make(**scheduler):
    """Latents of 16 dimensions, so that exact traces take 16 products."""
    return tiny.one_channel(StableDiffusionFisherPipeline, scheduler=tiny.scheduler(**scheduler))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def eight_bit_images(count=2, side=8):
    """Returns seeded images that 8 bits hold exactly."""
    return torch.randint(0, 256, (count, 3, side, side), generator=seeded()).float() / 255


def latents(count=2, side=4):
    return torch.randn(count, 1, side, side, generator=seeded())


def score(pipe, images=None, prompt=PROMPTS, **options):
    options = {"num_inference_steps": 4, "step_halving": False, "generator": seeded(), **options}
    return pipe.log_likelihood(images, prompt=prompt, **options)


# Inputs


@pytest.mark.parametrize(("kind", "dtype"), [("I;16", numpy.uint16), ("F", numpy.float32), ("I", numpy.int32)])
def test_pil_images_of_more_than_8_bits_are_refused_and_not_clipped(kind, dtype):
    picture = Image.fromarray(numpy.full((8, 8), 200, dtype))
    with pytest.raises(InputError, match=f"has mode '{kind}' .* allowed: 8-bit modes, such as L and RGB"):
        score(make(), picture, prompt="a")


def forms(images):
    arrays = images.permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(numpy.round(array * 255).astype(numpy.uint8)) for array in arrays]
    return {
        "PIL images": pictures,
        "array": arrays,
        "double array": arrays.astype(numpy.float64),
        "flipped twice": arrays[:, :, ::-1].copy()[:, :, ::-1],
        "list of arrays": list(arrays),
        "tensor": images,
        "double tensor": images.double(),
        "list of tensors": list(images),
        "tuple": tuple(pictures),
    }


@pytest.mark.parametrize("form", forms(eight_bit_images()))
def test_every_form_of_the_same_images_gives_the_same_likelihood(form):
    pipe, images = make(), eight_bit_images()
    with torch.no_grad():
        latents = pipe.vae.encode(2 * images - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    out = score(pipe, forms(images)[form])
    assert torch.equal(out.log_prob, score(pipe, images).log_prob)
    # Images and latents are other values, so their keys differ; equal keys have equal draws.
    keys = {"image_keys": ["a", "b"]}
    assert torch.equal(score(pipe, images, **keys).log_prob, score(pipe, latents=latents, **keys).log_prob)
    assert out.log_prob.shape == (2,)
    assert float(out.log_prob[0]) != float(out.log_prob[1])


def test_one_pil_image_and_grey_or_transparent_ones():
    pipe, picture = make(), forms(eight_bit_images(1))["PIL images"][0]
    expected = score(pipe, eight_bit_images(1), prompt="a b")
    assert torch.equal(score(pipe, picture, prompt="a b").log_prob, expected.log_prob)
    opaque = picture.copy()
    opaque.putalpha(255)
    assert torch.equal(score(pipe, opaque, prompt="a b").log_prob, expected.log_prob)
    grey = picture.convert("L")
    assert torch.equal(score(pipe, grey, prompt="a").log_prob, score(pipe, grey.convert("RGB"), prompt="a").log_prob)


def test_prompts():
    pipe, x = make(), latents()
    batch = score(pipe, latents=x).log_prob
    assert torch.equal(score(pipe, latents=x, prompt="c").log_prob, score(pipe, latents=x, prompt=["c", "c"]).log_prob)
    assert torch.equal(score(pipe, latents=x, prompt=None).log_prob, score(pipe, latents=x, prompt="").log_prob)
    values = [float(score(pipe, latents=x, prompt=text).log_prob[0]) for text in (["a b", "c"], ["c", "a b"], None)]
    assert values[0] == float(batch[0])
    assert len({round(value, 4) for value in values}) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_latents_of_other_precision_are_cast_to_float32(dtype):
    pipe, x = make(), latents().to(dtype)
    assert torch.equal(score(pipe, latents=x).log_prob, score(pipe, latents=x.float()).log_prob)


# The value


def smooth_in_time(pipe):
    """Weakens the random network's dependence on time, which no integration of a few steps could follow."""
    pipe.unet.time_embedding.linear_2.weight.data.mul_(0.02)
    return pipe


def by_hand(pipe, x, prompt, steps):
    """Returns log p of x (1, ...) by Runge-Kutta of order four over log s, with full Jacobians. No code of ours.

    Notation: x~ = x/alpha, s = sigma/alpha, u = log s: dx~/du = s eps(x, t), d log p~/du = -tr(d(s eps)/dx~).
    """
    config, dimensions = pipe.scheduler.config, x[0].numel()
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - roots**2, 0)
    table = 0.5 * ((1 - alpha_bar) / alpha_bar).log()
    with torch.no_grad():
        words = pipe.tokenizer(prompt, padding="max_length", max_length=8, return_tensors="pt").input_ids
        embeds = pipe.text_encoder(words)[0]

    def field(x, u):
        s = math.exp(u)
        alpha = (1 + s**2) ** -0.5
        t = torch.tensor(numpy.interp(u, table, numpy.arange(1000)), dtype=torch.float32)
        leaf = (alpha * x).float().requires_grad_()
        output = pipe.unet(leaf, t, embeds).sample
        epsilon = output if config.prediction_type == "epsilon" else alpha * output + s * alpha * leaf
        basis = torch.eye(dimensions).view(dimensions, *x.shape)
        (jacobian,) = torch.autograd.grad(epsilon, leaf, basis, is_grads_batched=True)
        trace = jacobian.reshape(dimensions, dimensions).trace().double()
        return s * epsilon.detach().double(), s * alpha * trace

    x, divergence, step = x.double(), 0.0, float(table[-1] - table[0]) / steps
    for index in range(steps):
        u = float(table[0]) + index * step
        k1, t1 = field(x, u)
        k2, t2 = field(x + step / 2 * k1, u + step / 2)
        k3, t3 = field(x + step / 2 * k2, u + step / 2)
        k4, t4 = field(x + step * k3, u + step)
        x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        divergence = divergence + step / 6 * (t1 + 2 * t2 + 2 * t3 + t4)
    variance = 1 + math.exp(2 * float(table[-1]))
    prior = -0.5 * float(x.square().sum()) / variance - dimensions / 2 * math.log(2 * math.pi * variance)
    return prior, float(divergence)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_value_equals_that_of_an_independent_integration(kind):
    pipe, x = smooth_in_time(make(prediction_type=kind)), latents(1)
    exact = {"num_probes": None, "estimator": AutodiffFisher()}
    out = score(pipe, latents=x, prompt="a b", num_inference_steps=24, step_halving=True, **exact)
    prior, divergence = by_hand(pipe, x, "a b", steps=30)
    error = abs(float(out.discretisation_error))  # the loop's own is a hundredth of it
    assert error < 0.4  # nats: small enough for a useful comparison
    assert abs(float(out.log_prob) - prior - divergence) < error
    assert float(out.prior_log_prob) == pytest.approx(prior, abs=error)
    assert float(out.trace_log_prob) == pytest.approx(divergence, abs=error)
    assert torch.equal(out.log_prob, out.prior_log_prob + out.trace_log_prob)


def test_fields_of_the_output():
    out = score(make(), latents=latents(), num_probes=3, step_halving=True)
    assert (out.space, out.prior, out.density, out.dims) == ("latent", "standard", "smoothed", 16)
    assert out.trace == "FiniteDifferenceFisher, 3 probes per level"
    assert out.unexplained_noise_fraction.shape == (5, 2)
    assert out.noise_to_signal.shape == (5,)
    assert out.num_denoiser_calls == (5 + 3) * (1 + 3)  # half as many steps again; a difference for each probe
    assert torch.equal(out.bits_per_dim, -out.log_prob / (16 * math.log(2)))


def test_probes_agree_with_full_jacobians_within_their_standard_error():
    pipe, x = make(), latents(4)
    prompts = ["a", "b", "c", "d"]
    exact = score(pipe, latents=x, prompt=prompts, num_probes=None)
    assert exact.standard_error.tolist() == [0.0] * 4
    out = score(pipe, latents=x, prompt=prompts, num_probes=12)
    deviations = (out.log_prob - exact.log_prob) / out.standard_error
    assert bool((out.standard_error > 0).all())
    # Twelve probes: beyond 4 standard errors once in a thousand for one image; within 0.1 for all four as rarely.
    assert 0.1 < float(deviations.abs().max()) < 4
    # The path needs no trace; its end is corrected by it.
    assert float((out.prior_log_prob - exact.prior_log_prob).norm() / (out.log_prob - exact.log_prob).norm()) < 0.3
    small_batch = score(pipe, latents=x, prompt=prompts, num_probes=3, generator=seeded(5))
    assert float((small_batch.log_prob - exact.log_prob).norm()) > 0
    assert float(small_batch.standard_error.mean()) > float(out.standard_error.mean())


def test_generator_decides_the_probes():
    pipe, x = make(), latents()
    first, repeat, other = (score(pipe, latents=x, generator=seeded(seed)).log_prob for seed in (1, 1, 2))
    assert torch.equal(first, repeat)
    assert not torch.equal(first, other)


def test_score_of_an_image_does_not_depend_on_the_batch():
    pipe, x, prompts = make(), latents(3), ["a b", "c", "d"]
    batch = score(pipe, latents=x, prompt=prompts, num_probes=None)
    singles = [score(pipe, latents=x[i : i + 1], prompt=prompts[i], num_probes=None) for i in range(3)]
    # float32 products summed in another order for another batch
    torch.testing.assert_close(batch.log_prob, torch.cat([out.log_prob for out in singles]), rtol=0, atol=1e-3)
    reverse = score(pipe, latents=x.flip(0), prompt=prompts[::-1], num_probes=None)
    torch.testing.assert_close(batch.log_prob, reverse.log_prob.flip(0), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "cls", [diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler, diffusers.DDPMScheduler]
)
def test_value_is_the_models_and_not_the_samplers(cls):
    reference, pipe = make(), make()
    pipe.scheduler = cls.from_config(pipe.scheduler.config)
    expected = score(reference, latents=latents()).log_prob
    for scheduler in (pipe.scheduler, fisher_scheduler(cls).from_config(pipe.scheduler.config)):
        pipe.scheduler = scheduler
        out = score(pipe, latents=latents())
        # Measured 1e-14; an input rounded to the neighbouring float32 would make it 1e-4.
        torch.testing.assert_close(out.log_prob, expected, rtol=0, atol=1e-3)


def test_other_estimators():
    pipe, x = make(), latents()
    options = {"num_probes": None, "num_inference_steps": 2}
    exact = score(pipe, latents=x, estimator=AutodiffFisher(), **options)
    default = score(pipe, latents=x, **options)
    assert torch.equal(
        default.log_prob, score(pipe, latents=x, estimator=FiniteDifferenceFisher(), **options).log_prob
    )
    differences = score(pipe, latents=x, estimator=FiniteDifferenceFisher(central=True), **options)
    # Error of central differences, square of a step of 1/100, and their rounding in float32.
    assert relative(differences.trace_log_prob, exact.trace_log_prob) < 1e-2
    assert differences.num_denoiser_calls == exact.num_denoiser_calls * (1 + 2 * 16)
    direct = score(pipe, latents=x, estimator=DirectFisher(), **options)
    assert "DirectFisher" in direct.trace
    assert not torch.equal(direct.trace_log_prob, exact.trace_log_prob)
    with pytest.raises(InputError, match="EndpointFisher needs the clean end of the run"):
        score(pipe, latents=x, estimator=EndpointFisher())


# The prior


def normal_log_density(x, mean, variance):
    return -0.5 * ((x - mean).square() / variance + (2 * math.pi * variance).log()).flatten(1).sum(1)


@pytest.mark.parametrize("side", [4, 8], ids=["own size", "other size"])
def test_latent_statistics_are_the_prior_and_the_output_says_so(side):
    pipe = make()
    mean = 0.3 * torch.randn(1, 4, 4, generator=seeded(1))
    variance = 0.5 + torch.rand(1, 4, 4, generator=seeded(2))
    standard = score(pipe, latents=latents(side=side), num_probes=1)
    pipe.latent_statistics = mean, variance
    out = score(pipe, latents=latents(side=side), num_probes=1)
    assert (standard.prior, out.prior) == ("standard", "moment-matched")
    assert torch.equal(out.final_latents, standard.final_latents)
    if side == 8:  # for another size only the mean over space is left
        mean, variance = mean.mean(), variance.mean()
    total = variance.double() + out.noise_to_signal[-1] ** 2
    expected = normal_log_density(out.final_latents, mean.double(), total)
    # The mean over space is taken in float32.
    torch.testing.assert_close(out.prior_log_prob, expected, rtol=1e-7, atol=1e-5)
    assert not torch.equal(out.log_prob, standard.log_prob)
    override = score(pipe, latents=latents(side=side), num_probes=1, prior_mean=0.0, prior_variance=1.0)
    torch.testing.assert_close(override.log_prob, standard.log_prob, rtol=1e-12, atol=0)


def test_real_images_are_likelier_than_inverted_ones_on_the_trained_checkpoint():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = embedded_test_images()
    images, prompts = images[:4], [embedded_prompt(int(label)) for label in labels[:4]]
    real, inverted = (score(pipe, version, prompt=prompts, num_inference_steps=10) for version in (images, 1 - images))
    assert real.prior == "moment-matched"
    # Bits per dimension: they differ by 0.8 and more; probes and steps err by up to 0.3, much the same for both.
    assert bool((inverted.bits_per_dim - real.bits_per_dim > 0.4).all())


# The surroundings


@pytest.mark.parametrize("grad", [True, False], ids=["enable_grad", "no_grad"])
@pytest.mark.parametrize("num_probes", [2, None])
def test_nothing_of_the_caller_changes(grad, num_probes):
    pipe = make()
    with torch.set_grad_enabled(grad):
        before = tiny.snapshot(pipe)
        score(pipe, eight_bit_images(), num_probes=num_probes)
        assert tiny.snapshot(pipe) == before


def test_scale_of_an_earlier_guided_call_does_not_matter():
    pipe = make()
    expected = score(pipe, latents=latents()).log_prob
    pipe(PROMPTS, guidance_scale=9.0, num_inference_steps=1)
    assert torch.equal(score(pipe, latents=latents()).log_prob, expected)


def test_progress_bar_is_shown_and_can_be_disabled(capsys):
    pipe = make()
    pipe.set_progress_bar_config()
    score(pipe, latents=latents(), step_halving=True)
    assert "8/8" in capsys.readouterr().err  # five nodes, and three of half as many steps
    pipe.set_progress_bar_config(disable=True)
    score(pipe, latents=latents())
    assert capsys.readouterr().err == ""
