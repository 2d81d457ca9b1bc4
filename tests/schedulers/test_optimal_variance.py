"""Stochastic sampling with the optimal variance, on Gaussians whose samples have known variances."""

import copy

import diffusers
import pytest
import tiny
import torch
from cases import STABLE_DIFFUSION

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    ExactFisher,
    GaussianMixture,
    InputError,
    OptimalVarianceDDPMScheduler,
    OptimalVarianceFlowMatchScheduler,
    StableDiffusionFisherPipeline,
)
from diffusers_fisher.noise import log_noise_to_signal_range, noise_level
from diffusers_fisher.schedulers import fisher_scheduler
from diffusers_fisher.schedulers.optimal_variance import OPTIONS
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

SHAPE, COUNT = (1, 4, 4), 40_000  # 640,000 numbers: their variance has a relative error of 0.18%
KINDS = {
    "DDPM": (OptimalVarianceDDPMScheduler, STABLE_DIFFUSION),
    "flow": (OptimalVarianceFlowMatchScheduler, {}),
}


DIFFERENTIABLE = MixtureOracle.gaussian(
    torch.zeros(SHAPE, dtype=torch.float64), torch.eye(16, dtype=torch.float64)
)  # the same law as gaussian(1.0), with a graph


def gaussian(*variances):
    """A Gaussian whose elements have these variances, equally many each."""
    values = torch.tensor(variances, dtype=torch.float64).repeat_interleave(16 // len(variances)).view(1, *SHAPE)
    return GaussianMixture(torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.diagonal(values))


def table(law, scheduler):
    """The law's own r at 60 levels."""
    low, high = log_noise_to_signal_range(scheduler)
    levels = torch.linspace(low, high, 60, dtype=torch.float64).exp()
    variances = law.covariance.dense()[0].diagonal()
    fractions = (variances / (variances + levels[:, None].square())).mean(1)
    return {"noise_to_signal": levels.tolist(), "unexplained_noise_fraction": fractions.tolist()}


def sampled(law, scheduler, steps=5):
    """Samples by a run of the scheduler from the law's own noised samples."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    denoiser = OracleDenoiser(law, scheduler)
    level = noise_level(scheduler, scheduler.timesteps[0])
    x = level.alpha * law.sample(COUNT, generator)
    x = x + level.sigma * torch.randn(x.shape, generator=generator, dtype=x.dtype)
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser.model_output(x, t), t, x, generator=generator).prev_sample
    return x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("variance", [0.05, 1.0, 4.0])
def test_isotropic_gaussians_keep_their_variance_at_five_steps(kind, eta, variance):
    cls, config = KINDS[kind]
    law = gaussian(variance)
    options = {"eta": eta, "noise_last_step": True, "data_variance": variance}
    by_table = cls(**config, **options, **table(law, cls(**config)))
    by_estimator = cls(**config, **options).set_estimator(ExactFisher(law))
    for scheduler in (by_table, by_estimator):
        assert float(sampled(law, scheduler).var()) == pytest.approx(variance, rel=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_anisotropic_gaussians_keep_each_variance_with_the_diagonal(kind):
    cls, config = KINDS[kind]
    law = gaussian(0.05, 0.2, 1.0, 2.0)
    options = {"noise_last_step": True, "data_variance": 3.25 / 4}
    total = sampled(law, cls(**config, **options).set_estimator(ExactFisher(law))).square().mean((0, 1)).flatten()
    # One variance for all elements is right on average in a single step. The next step shrinks it in the directions
    # of little variance, to which it gave too much, so that the total is 14% too small after five.
    assert float(total.sum()) == pytest.approx(4 * 3.25, rel=0.2)
    assert float(total[0]) > 1.5 * 0.05
    own = cls(**config, **options, per_element=True).set_estimator(ExactFisher(law))
    each = sampled(law, own).square().mean((0, 1)).flatten()
    expected = law.covariance.dense()[0].diagonal()
    # 40,000 numbers each: a relative error of 0.7%. From pure noise `data_variance` is one number for all elements.
    assert float(each.sum()) == pytest.approx(4 * 3.25, rel=0.01 if kind == "DDPM" else 0.03)
    assert torch.allclose(each, expected, rtol=0.03 if kind == "DDPM" else 0.08)


@pytest.mark.parametrize("cls", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_fixed_variances_are_worse_at_five_steps(cls):
    law = gaussian(1.0)
    scheduler = cls(**STABLE_DIFFUSION)
    assert abs(float(sampled(law, scheduler).var()) - 1) > 0.05


def test_eta_one_without_the_posterior_s_part_is_ddpm_with_small_variance():
    law = gaussian(1.0)
    config = {**STABLE_DIFFUSION, "clip_sample": False}
    ours = OptimalVarianceDDPMScheduler(**config, noise_to_signal=[1.0], unexplained_noise_fraction=[0.0])
    stock = diffusers.DDPMScheduler(**config, variance_type="fixed_small")
    x, y = (sampled(law, scheduler, 4) for scheduler in (ours, stock))
    assert torch.allclose(x, y, atol=1e-5)  # the stock scheduler's levels are in float32


def test_the_configuration_is_kept_and_read_by_from_pretrained(tmp_path):
    scheduler = OptimalVarianceDDPMScheduler(
        **STABLE_DIFFUSION, noise_to_signal=[0.1, 1.0], unexplained_noise_fraction=[0.9, 0.3], eta=0.5
    )
    scheduler.save_pretrained(tmp_path)
    loaded = OptimalVarianceDDPMScheduler.from_pretrained(tmp_path)
    for name in (*OPTIONS, *STABLE_DIFFUSION):
        assert loaded.config[name] == scheduler.config[name]
    changed = OptimalVarianceDDPMScheduler.from_config(diffusers.DDIMScheduler(**STABLE_DIFFUSION).config, eta=0.0)
    assert changed.config.eta == 0.0 and changed.config.beta_schedule == "scaled_linear"


def test_a_copy_shares_the_estimator():
    scheduler = OptimalVarianceDDPMScheduler(**STABLE_DIFFUSION).set_estimator(ExactFisher(gaussian(1.0)))
    scheduler.set_timesteps(3)
    duplicate = copy.deepcopy(scheduler)
    assert duplicate._estimator is scheduler._estimator
    assert duplicate.timesteps is not scheduler.timesteps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_pipeline_samples_with_it_and_probes_need_no_closed_form(dtype):
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    options = {"noise_to_signal": [0.1, 1.0, 10.0], "unexplained_noise_fraction": [0.9, 0.5, 0.1]}
    pipe.scheduler = OptimalVarianceDDPMScheduler.from_config(pipe.scheduler.config, **options)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    pipe.scheduler.set_timesteps(3)
    step = pipe.scheduler.step(0.1 * x, pipe.scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(0))
    assert step.prev_sample.dtype == dtype and torch.isfinite(step.prev_sample).all()
    arguments = {"num_inference_steps": 3, "output_type": "latent"}
    images = [
        pipe("a b", generator=torch.Generator().manual_seed(seed), latents=x[:1].float(), **arguments).images
        for seed in (1, 1, 2)
    ]
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])


def test_probes_of_an_estimator_give_the_variance_on_average():
    law = gaussian(1.0)
    denoiser = OracleDenoiser(DIFFERENTIABLE, diffusers.DDPMScheduler(**STABLE_DIFFUSION))
    scheduler = OptimalVarianceDDPMScheduler(**STABLE_DIFFUSION, num_probes=1, noise_last_step=True)
    out = sampled(law, scheduler.set_estimator(AutodiffFisher(denoiser)), 3)
    assert float(out.var()) == pytest.approx(1.0, rel=0.01)  # random signs are exact for an isotropic Fisher


def test_its_fisher_version_differentiates_a_run():
    law = gaussian(1.0)
    options = {"noise_to_signal": [1.0], "unexplained_noise_fraction": [0.5]}
    scheduler = fisher_scheduler(OptimalVarianceDDPMScheduler)(**STABLE_DIFFUSION, **options)
    scheduler.set_timesteps(3)
    denoiser, x = OracleDenoiser(DIFFERENTIABLE, scheduler), torch.randn(2, *SHAPE, dtype=torch.float64)

    def run(x):
        generator = torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser.model_output(x, t), t, x, generator=generator).prev_sample
        return x

    with scheduler.differentiable(ExactFisher(law)) as trajectory:
        end = run(x)
    gradient = trajectory.gradient(end.square().sum())
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(run(leaf).square().sum(), leaf)[0]
    assert torch.allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": 1.5}, "`eta` is 1.5; allowed: 0 to 1"),
        ({"noise_to_signal": [1.0]}, "Give both `noise_to_signal` and"),
        ({"noise_to_signal": [1.0, 0.5], "unexplained_noise_fraction": [0.5, 0.5]}, "positive increasing levels"),
        ({"num_probes": 0}, "`num_probes` is 0"),
        ({"data_variance": 0.0}, "`data_variance` is 0.0"),
    ],
)
def test_options_that_can_not_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        OptimalVarianceDDPMScheduler(**options)


def test_a_scheduler_without_a_source_of_its_variance_says_so():
    scheduler = OptimalVarianceDDPMScheduler()
    scheduler.set_timesteps(2)
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(InputError, match="has no source of its variance"):
        scheduler.step(x, scheduler.timesteps[0], x)
