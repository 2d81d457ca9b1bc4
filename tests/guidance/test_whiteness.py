"""The whiteness of noise: calibration on white noise, exact degrees of freedom, other colours, outputs of `guide`."""

import pytest
import scipy.stats
import tiny
import torch

from diffusers_fisher import (
    FluxFisherPipeline,
    InputError,
    LinearReward,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    noise_whiteness,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.guidance.whiteness import project_to_white

SIZES = [(4, 8, 8), (4, 16, 12), (1, 4, 4), (4, 3, 8, 8), pytest.param((16, 32, 32), marks=pytest.mark.slow)]
"""Channels and sides; the fourth are frames of a video."""


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def white(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=seeded(seed), dtype=torch.float64)


def low_frequencies(noise, gain):
    """Multiplies the coefficients of at most one wave along every side by `gain`."""
    axes = tuple(range(2, noise.ndim))
    coefficients = torch.fft.fftn(noise, dim=axes)
    for axis in axes:
        size = noise.shape[axis]
        is_low = torch.fft.fftfreq(size, 1 / size).abs() <= 1
        coefficients = coefficients * is_low.reshape(-1, *[1] * (noise.ndim - 1 - axis))
    return noise + (gain - 1) * torch.fft.ifftn(coefficients, dim=axes).real


def brightness(images, prompts):
    return images.mean((1, 2, 3))


# White noise


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_p_values_of_white_noise_are_uniform(shape):
    count = 10_000
    p_values = torch.cat([noise_whiteness(white(500, *shape, seed=seed)).p_values for seed in range(count // 500)])
    assert scipy.stats.kstest(p_values.numpy(), "uniform").pvalue > 1e-3
    for level in (0.01, 0.05, 0.5, 0.95):
        error = (level * (1 - level) / count) ** 0.5
        assert abs(float((p_values < level).double().mean()) - level) < 3 * error


def test_packed_white_noise_is_measured_through_the_backbones_unpack():
    backbone = backbone_of(tiny.flux(FluxFisherPipeline))
    noise = white(2000, 4, 8, 8)
    packed = backbone.pack(noise)
    assert packed.ndim == 3
    whiteness = noise_whiteness(backbone.unpack(packed, (16, 16)))
    assert torch.equal(whiteness.p_values, noise_whiteness(noise).p_values)
    assert scipy.stats.kstest(whiteness.p_values.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("shape", [(2, 8, 8), (2, 5, 4), (2, 3, 4, 4)], ids=str)
def test_every_score_is_a_standard_normal_number(shape):
    """Conjugate pairs count twice and coefficients that are their own conjugates once, in every band."""
    whiteness = noise_whiteness(white(10_000, *shape))
    scores = torch.cat([whiteness.band_scores.flatten(1), whiteness.correlation_scores], dim=1)
    # Bonferroni. A correlation is only nearly normal: its tails are those of a cosine.
    assert min(scipy.stats.kstest(column, "norm").pvalue for column in scores.T.numpy()) > 1e-3 / scores.shape[1]
    assert float((scores.T.corrcoef() - torch.eye(scores.shape[1])).abs().max()) < 5 / 10_000**0.5


def test_scores_have_the_probabilities_of_chi_square():
    """The mean of a channel is one coefficient; the whole power is the squared norm."""
    noise = white(50, 1, 8, 8)
    scores = noise_whiteness(noise).band_scores[:, 0]
    assert scores.shape == (50, 4)
    mean_powers = (noise.flatten(1).sum(1) / 8).square()
    probabilities = scipy.stats.norm.cdf(scores)
    powers = [
        scipy.stats.chi2(count).ppf(column) for count, column in zip((1, 8, 16, 39), probabilities.T, strict=True)
    ]
    torch.testing.assert_close(torch.from_numpy(powers[0]), mean_powers, rtol=1e-9, atol=1e-12)
    total = torch.from_numpy(sum(powers))
    torch.testing.assert_close(total, noise.flatten(1).square().sum(1), rtol=1e-9, atol=0)


# Noise of other colours


def test_low_frequencies_and_correlated_channels_are_found():
    noise = white(200, 4, 8, 8)
    louder = low_frequencies(noise, 2.0)
    louder *= (noise.flatten(1).norm(dim=1) / louder.flatten(1).norm(dim=1))[:, None, None, None]  # on the shell
    whiteness = noise_whiteness(louder)
    assert float((whiteness.p_values < 0.01).double().mean()) > 0.9
    means = whiteness.band_scores.mean((0, 1))
    assert bool((means[:2] > 0.5).all()) and bool((means[2:] < 0).all())
    mixed = noise.clone()
    mixed[:, 1] = (noise[:, 0] + noise[:, 1]) / 2**0.5
    whiteness = noise_whiteness(mixed)
    assert float((whiteness.p_values < 0.01).double().mean()) > 0.9
    means = whiteness.correlation_scores.mean(0)  # pairs (0, 1), (0, 2), (0, 3), (1, 2), ...
    assert float(means[0]) == pytest.approx(8 / 2**0.5, rel=0.1) and float(means[1:].abs().max()) < 1


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_scores_of_extreme_noise_are_finite(scale):
    whiteness = noise_whiteness(scale * white(2, 4, 8, 8))
    assert torch.equal(whiteness.p_values, torch.zeros(2).double())
    assert bool(torch.isfinite(whiteness.band_scores).all() and torch.isfinite(whiteness.correlation_scores).all())


BAD_NOISE = {
    "packed": (torch.zeros(2, 16), r"`noise` has shape \(2, 16\); allowed: .* Unpack packed latents first"),
    "empty": (torch.zeros(0, 4, 8, 8), r"`noise` has shape \(0, 4, 8, 8\); allowed"),
    "not finite": (torch.full((1, 4, 8, 8), torch.nan), "allowed: .*, finite and below 1e70"),
    "too large": (torch.full((1, 4, 8, 8), 1e80, dtype=torch.float64), "finite and below 1e70"),
    "whole numbers": (torch.zeros(1, 4, 8, 8, dtype=torch.long), "`noise`: got dtype torch.int64; allowed: real"),
    "a list": ([1.0], "`noise`: got a list; allowed: a tensor"),
}


@pytest.mark.parametrize("kind", BAD_NOISE)
def test_noise_of_another_form_is_refused(kind):
    noise, message = BAD_NOISE[kind]
    with pytest.raises(InputError, match=message):
        noise_whiteness(noise)


# Outputs of `guide`


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.flux], ids=["in latents", "packed"])
def test_outputs_have_the_whiteness_of_every_run(make):
    pipe = make({tiny.flux: FluxFisherPipeline}.get(make, StableDiffusionFisherPipeline))
    backbone, pixels = backbone_of(pipe), (16, 16)
    prompts = ["a", "b"]
    condition = {} if make is tiny.stable_diffusion else {
        "prompt_embeds": torch.zeros(2, 4, 16), "pooled_prompt_embeds": torch.zeros(2, 16),
    }  # fmt: skip
    out = pipe.guide(
        None if condition else prompts, brightness, num_guidance_steps=2, num_inference_steps=2, output_type="pt",
        height=16, width=16, generator=seeded(), **condition,
    )  # fmt: skip
    expected = noise_whiteness(backbone.unpack(out.latents, pixels))
    assert out.whiteness.shape == out.rewards.shape == (3, 2)
    assert out.noise_band_scores.shape == (3, 2, 4, expected.band_scores.shape[-1])
    assert out.noise_correlation_scores.shape == (3, 2, 6)
    best = out.rewards.argmax(0)
    for index in range(2):
        assert float(out.whiteness[best[index], index]) == float(expected.p_values[index])
        assert torch.equal(out.noise_band_scores[best[index], index], expected.band_scores[index])
        assert torch.equal(out.noise_correlation_scores[best[index], index], expected.correlation_scores[index])


def guide_to_the_left(projection):
    """Guides the embedded checkpoint by a reward for bright left halves, which asks for low frequencies."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe.guide(
        ["a photo of a sneaker", "a photo of a bag"], LinearReward.left_minus_right(32, 32), num_guidance_steps=4,
        num_inference_steps=3, guidance_scale=2.0, output_type="pt", generator=seeded(), step_size=0.3,
        noise_projection=projection,
    )  # fmt: skip


@pytest.fixture(scope="module")
def guided():
    """The output of guidance without a projection."""
    return guide_to_the_left(None)


def test_whiteness_shows_what_the_norm_does_not(guided):
    out = guided
    assert float((out.shell_distances - out.shell_distances[0]).abs().max()) < 1e-3
    assert float(out.whiteness[-1].max()) < 1e-3 < float(out.whiteness[0].min())
    assert float(out.noise_band_scores[-1, :, :, :2].mean()) > 1


# Projections


def coloured(kind, noise):
    """Returns noise of another colour with the norms of `noise`."""
    waves = torch.linspace(-1, 1, noise.shape[-1], dtype=torch.float64)
    result = {
        "white": noise, "low": low_frequencies(noise, 3.0), "high": low_frequencies(noise, 0.2),
        "equal channels": noise + waves,
    }[kind]  # fmt: skip
    return result * (noise.flatten(1).norm(dim=1) / result.flatten(1).norm(dim=1)).reshape(-1, *[1] * (noise.ndim - 1))


@pytest.mark.parametrize("shape", [(4, 8, 8), (1, 8, 8), (4, 5, 8, 8), (16, 12, 12)], ids=str)
@pytest.mark.parametrize("projection", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["white", "low", "high", "equal channels"])
def test_projections_make_noise_of_every_colour_white(kind, projection, shape):
    noise = coloured(kind, white(200, *shape))
    result = project_to_white(noise, projection)
    whiteness = noise_whiteness(result)
    assert float((whiteness.p_values < 0.01).double().mean()) <= 0.02
    torch.testing.assert_close(result.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1), rtol=1e-12, atol=0)
    norms = (noise[0].numel() ** 0.5 / result.flatten(1).norm(dim=1)).reshape(-1, *[1] * (noise.ndim - 1))
    scores = noise_whiteness(result * norms).band_scores
    if projection == "hard":  # the score of a band of one coefficient is not 0 at its mean power
        assert float((scores - scores[0, 0]).abs().max()) < 1e-9
    else:
        assert float(scores.abs().max()) < 2.1  # the return to the norm changes the powers a little


@pytest.mark.parametrize("projection", ["soft", "hard"])
def test_projections_keep_the_phases(projection):
    noise = coloured("low", white(50, 1, 8, 8))
    result = project_to_white(noise, projection)
    ratios = torch.fft.fftn(result, dim=(2, 3)) / torch.fft.fftn(noise, dim=(2, 3))
    assert float(ratios.imag.abs().max()) < 1e-9 and float(ratios.real.min()) > 0


def test_soft_projection_leaves_noise_within_the_ranges():
    noise = white(300, 4, 8, 8)
    noise *= (16 / noise.flatten(1).norm(dim=1))[:, None, None, None]  # the powers are those relative to the norm
    whiteness = noise_whiteness(noise)
    is_within = (whiteness.band_scores.flatten(1).abs().amax(1) < 1.7) & (whiteness.p_values > 0.2)
    is_within &= whiteness.correlation_scores.square().sum(1) < 12
    assert int(is_within.sum()) > 50
    result = project_to_white(noise, "soft")
    torch.testing.assert_close(result[is_within], noise[is_within], rtol=0, atol=1e-12)
    assert torch.equal(project_to_white(noise.float(), "soft")[is_within], noise.float()[is_within])


def test_projections_of_extreme_noise_are_finite():
    for projection in ("soft", "hard"):
        for noise in (0 * white(2, 4, 8, 8), 1e30 * white(2, 4, 8, 8), torch.ones(2, 4, 8, 8), white(1, 2, 1, 1)):
            result = project_to_white(noise, projection)
            assert bool(torch.isfinite(result).all()) and result.dtype == noise.dtype
            torch.testing.assert_close(result.flatten(1).norm(dim=1), noise.flatten(1).norm(dim=1))
    with pytest.raises(InputError, match="`noise_projection` is 'firm'; allowed: soft, hard, or None"):
        project_to_white(white(1, 4, 8, 8), "firm")


@pytest.mark.parametrize("projection", ["soft", "hard"])
def test_guided_noise_stays_white_with_a_projection(projection, guided):
    out, reference = guide_to_the_left(projection), guided
    assert float(out.whiteness.min()) > 0.01 > float(reference.whiteness[-1].max())
    assert float((out.shell_distances - out.shell_distances[0]).abs().max()) < 1e-3
    assert bool((out.best_rewards > out.rewards[0]).all())
    assert torch.equal(out.rewards[0], reference.rewards[0])


def test_projection_of_packed_noise_and_under_an_optimiser():
    condition = {"prompt_embeds": torch.zeros(2, 4, 16), "pooled_prompt_embeds": torch.zeros(2, 16)}
    flux = tiny.flux(FluxFisherPipeline)
    options = {"num_guidance_steps": 2, "num_inference_steps": 2, "output_type": "pt", "generator": seeded()}
    out = flux.guide(None, brightness, height=16, width=16, noise_projection="hard", **condition, **options)
    noise = backbone_of(flux).unpack(out.latents, (16, 16))
    torch.testing.assert_close(noise, project_to_white(noise, "hard"), rtol=0, atol=1e-5)  # float32
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    adam = {"optimizer": "Adam", "step_size": 0.1, "noise_projection": "hard"}
    out = pipe.guide(["a", "b"], lambda images, prompts: 1e3 * brightness(images, prompts), **options, **adam)
    moved = out.rewards.argmax(0) > 0
    assert bool(moved.any())
    torch.testing.assert_close(out.latents[moved], project_to_white(out.latents, "hard")[moved], rtol=0, atol=1e-5)


def test_projections_that_guide_can_not_use_are_refused():
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    with pytest.raises(InputError, match="`noise_projection` is 'firm'; allowed: soft, hard, or None"):
        pipe.guide("a", brightness, noise_projection="firm")
    with pytest.raises(InputError, match=r"`noise_projection` is 'soft' while `optimise` is .'text'.; allowed: None"):
        pipe.guide("a", brightness, noise_projection="soft", optimise=["text"])
