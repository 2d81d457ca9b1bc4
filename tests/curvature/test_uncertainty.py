"""Posterior uncertainties against closed forms, and in pixels under pipelines."""

import diffusers
import pytest
import tiny
import torch
from cases import STABLE_DIFFUSION
from pipelines.backbones import BACKBONES

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    ExactFisher,
    FiniteDifferenceFisher,
    GaussianMixture,
    InputError,
    NumericalError,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    decode_uncertainty,
    posterior_uncertainty,
    state_uncertainty,
    uncertainty_pictures,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.likelihood.draws import ImageDraws
from diffusers_fisher.likelihood.pipeline import pixel_keys
from diffusers_fisher.noise import expand, timestep_at
from diffusers_fisher.testing import OracleDenoiser

SHAPE = (1, 6, 6)
SCHEDULERS = {
    "epsilon": diffusers.DDIMScheduler(**STABLE_DIFFUSION),
    "v": diffusers.DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
}
VP = SCHEDULERS["epsilon"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def law(modes):
    """Returns one Gaussian, or a mixture, of variances 10 to 0.001 along random directions."""
    bases = torch.linalg.qr(torch.randn(modes, 36, 36, dtype=torch.float64, generator=seeded(1)))[0]
    variances = torch.logspace(1, -3, 36, dtype=torch.float64)
    centres = torch.randn(modes, *SHAPE, dtype=torch.float64, generator=seeded(2)) * (2 * (modes > 1))
    return GaussianMixture(centres, Covariance.full((bases * variances) @ bases.mT, SHAPE))


def noisy(data, noise_to_signal, count=60, scheduler=VP):
    """Returns samples of a law, the exact denoiser and its states at a noise level."""
    clean, denoiser = data.sample(count, seeded(3)), OracleDenoiser(data, scheduler)
    timestep = timestep_at(scheduler, torch.tensor(noise_to_signal, dtype=torch.float64).log())
    level = denoiser.level(timestep)
    noise = torch.randn(clean.shape, dtype=torch.float64, generator=seeded(4))
    return (
        clean,
        denoiser,
        denoiser.state(expand(level.alpha, clean) * clean + expand(level.sigma, clean) * noise, timestep),
    )


def exact_covariance(data, state):
    """Returns Cov[x_0|x_t], (B, d, d)."""
    fisher, level = ExactFisher(data)(state).dense(), state.level
    return level.noise_to_signal**2 * (torch.eye(fisher.shape[1], dtype=torch.float64) - level.sigma**2 * fisher)


@pytest.mark.parametrize(("modes", "scheduler"), [(1, "epsilon"), (4, "epsilon"), (1, "v"), (4, "flow")])
def test_intervals_cover_what_they_say(modes, scheduler):
    data = law(modes)
    for noise_to_signal in (0.1, 0.7):
        clean, denoiser, state = noisy(data, noise_to_signal, scheduler=SCHEDULERS[scheduler])
        out = state_uncertainty(FiniteDifferenceFisher(denoiser)(state), num_probes=24, generator=seeded())
        for deviations, share in ((1.0, 0.683), (1.96, 0.95)):
            low, high = out.interval(deviations)
            covered = ((low <= clean) & (clean <= high)).double().mean()
            assert abs(float(covered) - share) < 0.03  # 2,160 elements: 0.010, and the noise of the probes
        along = torch.einsum("nb...,b...->nb", out.directions, clean - out.mean) / out.eigenvalues.sqrt()
        assert abs(float((along.abs() <= 1.96).double().mean()) - 0.95) < 0.05  # 180 numbers: 0.016


@pytest.mark.parametrize("noise_to_signal", [0.1, 0.7, 3.0])
def test_variances_and_directions_are_those_of_the_covariance(noise_to_signal):
    data = law(4)
    _, _, state = noisy(data, noise_to_signal, 6)
    covariance = exact_covariance(data, state)
    exact = state_uncertainty(ExactFisher(data)(state), num_probes=None, num_iterations=12)
    diagonal = covariance.diagonal(dim1=1, dim2=2).view_as(exact.variance)
    assert torch.allclose(exact.variance, diagonal, rtol=1e-9)
    assert not exact.variance_error.any()
    assert torch.allclose(exact.mean, state.pred_original_sample)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(1)[:, :3].T
    assert torch.allclose(exact.eigenvalues, eigenvalues, rtol=1e-3)
    few = state_uncertainty(ExactFisher(data)(state), num_probes=16, num_iterations=4, generator=seeded())
    assert bool(((few.eigenvalues - eigenvalues).abs() <= few.eigenvalue_error + 1e-12).all())
    distances = (few.variance - diagonal) / few.variance_error
    assert 0.8 < float(distances.square().mean().sqrt()) < 1.3
    assert torch.allclose(exact.total_variance, covariance.diagonal(dim1=1, dim2=2).sum(1))
    assert torch.allclose(exact.noise_to_signal, torch.full((6,), noise_to_signal, dtype=torch.float64))
    assert torch.allclose(exact.directions.flatten(2).norm(dim=2), torch.ones(3, 6, dtype=torch.float64))


def test_draws_have_the_mean_the_variances_and_the_directions():
    data = law(1)
    _, _, state = noisy(data, 0.7, 2)
    out = state_uncertainty(ExactFisher(data)(state), num_probes=None)
    draws = out.sample(20000, seeded())
    assert draws.shape == (20000, 2, *SHAPE)
    assert float((draws.mean(0) - out.mean).abs().max()) < 0.05
    assert torch.allclose(draws.var(0), out.variance, rtol=0.05)
    along = torch.einsum("nb...,kb...->knb", out.directions, draws - out.mean)
    # The rest of the law, whose elements are independent, has a part along the directions too.
    rest = (out.variance - (out.eigenvalues[:, :, None, None, None] * out.directions.square()).sum(0)).clamp_min(0)
    expected = out.eigenvalues + torch.einsum("nb...,b...->nb", out.directions.square(), rest)
    assert torch.allclose(along.var(0), expected, rtol=0.05)


def test_no_directions_and_single_probes():
    data = law(1)
    _, denoiser, state = noisy(data, 0.7, 2)
    operator = FiniteDifferenceFisher(denoiser)(state)
    out = state_uncertainty(operator, num_directions=0, num_probes=1, generator=seeded())
    assert out.directions.shape == (0, 2, *SHAPE) and out.explained.shape == (0, 2)
    assert bool(out.variance_error.isinf().all())
    assert out.num_denoiser_calls == 1
    assert bool((out.standard_deviation >= 0).all())
    assert "directions  none of the total variance" in str(out)
    more = state_uncertainty(operator, num_directions=2, num_probes=5, num_iterations=3)
    assert more.num_denoiser_calls == 4 * 3 + 5


def test_a_batch_has_the_numbers_of_each_sample_alone():
    data = law(4)
    _, denoiser, state = noisy(data, 0.7, 3)
    whole = state_uncertainty(ExactFisher(data)(state), generator=seeded())
    alone = denoiser.state(state.sample[2:], state.timestep)
    alone = state_uncertainty(ExactFisher(data)(alone), generator=seeded())
    assert torch.allclose(whole.variance[2], alone.variance[0], rtol=1e-6)
    assert torch.allclose(whole.eigenvalues[:, 2], alone.eigenvalues[:, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_directions": 36}, "`num_directions` is 36, .* allowed: 0 to 35, at least 1"),
        ({"num_directions": -1}, "`num_directions` is -1"),
        ({"num_iterations": 0}, "`num_iterations` 0"),
        ({"num_probes": 0}, "`num_probes` 0; allowed"),
        ({"generator": [seeded()] * 3}, "3 generators were given for 2 images"),
    ],
)
def test_wrong_numbers_are_refused(options, message):
    data = law(1)
    _, _, state = noisy(data, 0.7, 2)
    with pytest.raises(InputError, match=message):
        state_uncertainty(ExactFisher(data)(state), **options)


def test_products_that_are_not_finite_are_refused():
    class Broken(Denoiser):
        def model_output(self, x, timestep):
            return torch.full_like(x, torch.inf)

    denoiser = Broken(VP)
    operator = FiniteDifferenceFisher(denoiser)(denoiser.state(torch.ones(1, *SHAPE), 500))
    with pytest.raises(NumericalError, match="A product of the operator is not finite"):
        state_uncertainty(operator)
    with pytest.raises(NumericalError, match="36 posterior variances are not finite"):
        state_uncertainty(operator, num_directions=0)


# Pipelines


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion(StableDiffusionFisherPipeline)


def images(count=2):
    return torch.rand(count, 3, 16, 16, generator=seeded())


def test_equals_that_of_the_pipelines_denoiser(pipe):
    out = pipe.posterior_uncertainty(
        images(), ["a b", "c"], noise_to_signal=0.7, num_directions=1, num_probes=2, generator=seeded()
    )
    function = posterior_uncertainty(
        pipe, images(), ["a b", "c"], noise_to_signal=0.7, num_directions=1, num_probes=2, generator=seeded()
    )
    assert torch.equal(out.variance, function.variance)
    assert (out.space, out.dims, out.num_denoiser_calls) == ("latent", out.mean[0].numel(), 18 + 2)
    latents, generator = backbone_of(pipe).samples_of(images()), seeded()
    noise = ImageDraws(latents, generator, pixel_keys(images())).normal("noise").float()
    denoiser = PipelineDenoiser(pipe, prompt=["a b", "c"])
    timestep = timestep_at(pipe.scheduler, torch.tensor(0.7, dtype=torch.float64).log())
    level = denoiser.level(timestep)
    x = expand(level.alpha, latents) * latents + expand(level.sigma, latents) * noise
    operator = FiniteDifferenceFisher(denoiser)(denoiser.state(x, timestep.float()))
    expected = state_uncertainty(operator, 1, 2, generator, pixel_keys(images()))
    assert torch.equal(out.mean, expected.mean)
    assert torch.equal(out.variance, expected.variance)


def test_differences_and_back_propagation_have_the_same_variances(pipe):
    options = {"noise_to_signal": 0.7, "num_directions": 1, "num_probes": 24}
    differences = pipe.posterior_uncertainty(images(1), "a", **options, generator=seeded())
    jacobian = pipe.posterior_uncertainty(images(1), "a", estimator=AutodiffFisher(), **options, generator=seeded(1))
    error = torch.hypot(differences.variance_error, jacobian.variance_error)
    assert 0.8 < float(((differences.variance - jacobian.variance) / error).square().mean().sqrt()) < 1.3
    assert jacobian.num_denoiser_calls == 0  # it takes backward passes instead


@pytest.mark.parametrize("name", BACKBONES)
def test_every_family_has_an_uncertainty_in_pixels(name):
    backbone = BACKBONES[name]
    first = () if backbone.condition is None else (backbone.condition,)
    pipe = backbone.ours()
    out = pipe.posterior_uncertainty(
        None, *first, latents=0.5 * backbone.noise(), noise_to_signal=0.8, num_directions=1, num_probes=2
    )
    assert out.mean.shape == out.variance.shape == out.directions[0].shape == backbone.noise().shape
    pixels = decode_uncertainty(pipe, out, num_samples=3, generator=seeded())
    assert pixels.mean.shape == pixels.standard_deviation.shape
    assert pixels.mean.shape[0] == len(out.mean)
    assert bool(torch.isfinite(pixels.standard_deviation).all())


def test_pixels_are_those_of_decoded_draws(pipe):
    out = pipe.posterior_uncertainty(
        images(), "a", noise_to_signal=0.7, num_directions=1, num_probes=4, generator=seeded()
    )
    pixels = decode_uncertainty(pipe, out, num_samples=4, generator=seeded(1))
    draws = out.sample(4, seeded(1)).float()
    decoded = torch.stack([backbone_of(pipe).decode(latents) for latents in draws])
    assert torch.allclose(pixels.standard_deviation, decoded.std(0), atol=1e-6)
    assert torch.allclose(pixels.mean, backbone_of(pipe).decode(out.mean.float()), atol=1e-6)
    assert torch.allclose(pixels.standard_error, pixels.standard_deviation / 6**0.5)
    with pytest.raises(InputError, match="`num_samples` is 1 and the samples have shape"):
        decode_uncertainty(pipe, out, num_samples=1)


def test_pictures_show_the_mean_the_deviation_and_the_moves(pipe, tmp_path):
    out = pipe.posterior_uncertainty(
        images(), "a", noise_to_signal=0.7, num_directions=2, num_probes=4, generator=seeded()
    )
    pixels = decode_uncertainty(pipe, out, num_samples=4, generator=seeded(1))
    figure = uncertainty_pictures(pipe, out, pixels)
    assert [part.get_suptitle() for part in figure.subfigs] == [" ", "direction 1", "direction 2"]
    axes = [each for each in figure.subfigs[0].axes if each.get_images()]
    assert [each.get_title() for each in axes[:2]] == [r"E$[x_0|x_t]$", "deviation"]
    shown = torch.as_tensor(axes[1].get_images()[0].get_array())
    assert torch.allclose(shown, pixels.standard_deviation[0].mean(0))
    move = 2 * out.eigenvalues[0].clamp_min(0).sqrt().view(2, 1, 1, 1) * out.directions[0]
    plus = backbone_of(pipe).decode((out.mean + move).float())
    shown = figure.subfigs[1].axes[1].get_images()[0].get_array()
    assert torch.allclose(torch.as_tensor(shown), plus[0].permute(1, 2, 0), atol=1e-5)
    assert figure.subfigs[1].axes[1].get_xlabel() == f"{float(out.explained[0, 0]):.0%}"
    figure.savefig(tmp_path / "uncertainty.png")
    with pytest.raises(InputError, match=r"`deviations` is 0.0; allowed: \(B, C, H, W\), and a positive number"):
        uncertainty_pictures(pipe, out, deviations=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_to_signal": 100.0}, "`noise_to_signal` goes from 100 to 100; the schedule of "),
        ({"noise_to_signal": 0.7, "guidance_scale": 3.0}, "guidance"),
        ({"noise_to_signal": 0.7, "num_probe": 2}, "does not take `num_probe`. Did you mean `num_probes`"),
        ({"noise_to_signal": [0.7]}, "`noise_to_signal` is "),
        ({"noise_to_signal": 0.7, "generator": [seeded()]}, "1 generators were given for 2 images"),
    ],
)
def test_wrong_arguments_are_refused(pipe, options, message):
    with pytest.raises(InputError, match=message):
        pipe.posterior_uncertainty(images(), "a", **options)
