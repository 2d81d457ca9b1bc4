"""The pull of guidance toward images that are likely under the model."""

import pytest
import tiny
import torch

from diffusers_fisher import FisherDDIMScheduler, InputError, LikelihoodRegulariser, PipelineDenoiser, guide
from diffusers_fisher.noise import NoiseLevel, noise_level, timestep_at
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

PROMPTS = ["a b", "c"]
SETTINGS = {
    "num_inference_steps": 2, "num_guidance_steps": 2, "output_type": "pt", "step_size": 0.1, "guidance_scale": 2.0,
}  # fmt: skip
WEIGHTS = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(5))


def reward(images, prompts):
    return (images * WEIGHTS.to(images)).flatten(1).sum(1)


def guided(pipe, **options):
    return guide(pipe, PROMPTS, reward, generator=torch.Generator().manual_seed(1), **SETTINGS, **options)


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


def test_the_direction_is_the_score_of_the_noised_law():
    """For one Gaussian the denoiser is linear, so that two signs of a noise give the mean exactly."""
    law = GAUSSIAN
    scheduler = FisherDDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    denoiser, ratio = OracleDenoiser(law, scheduler), 0.7
    x = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    direction = LikelihoodRegulariser(noise_to_signal=ratio).direction(denoiser, x)
    level = noise_level(scheduler, timestep_at(scheduler, torch.tensor(ratio, dtype=torch.float64).log()))
    score = -law.epsilon(level.alpha * x, level)
    expected = score / score.flatten(1).norm(dim=1).reshape(-1, *[1] * len(SHAPE))
    torch.testing.assert_close(direction, expected, rtol=1e-5, atol=1e-6)
    assert isinstance(level, NoiseLevel) and denoiser.num_calls == 2


SHAPE = (1, 2, 2)
GAUSSIAN = MixtureOracle(
    torch.full((1, *SHAPE), 0.5, dtype=torch.float64), torch.diag(torch.tensor([0.1, 0.2, 0.4, 0.8]).double())[None],
)  # fmt: skip


def test_the_gradient_at_the_latents_is_the_rewards_and_the_pull(pipe):
    denoiser = PipelineDenoiser(pipe, prompt=PROMPTS)
    regulariser = LikelihoodRegulariser(weight=0.4, num_draws=2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    decode = regulariser.regularised(lambda x: x**2, denoiser)
    with torch.no_grad():
        assert torch.equal(decode(latents), latents**2) and denoiser.num_calls == 0
    images = decode(latents)
    assert torch.equal(images, latents**2) and denoiser.num_calls == 4
    (gradient,) = torch.autograd.grad(images.sum(), latents)
    own = 2 * latents.detach()
    unit = regulariser.direction(denoiser, latents.detach())
    norms = own.flatten(1).norm(dim=1).reshape(2, 1, 1, 1)
    torch.testing.assert_close(gradient, own + 0.4 * norms * unit)
    torch.testing.assert_close(unit.flatten(1).norm(dim=1), torch.ones(2))


def test_guidance_by_the_pull(pipe):
    before = tiny.snapshot(pipe)
    free, pulled, almost = (
        guided(pipe, **options)
        for options in (
            {}, {"regulariser": LikelihoodRegulariser(weight=3.0)}, {"regulariser": LikelihoodRegulariser(weight=1e-9)}
        )
    )  # fmt: skip
    assert before == tiny.snapshot(pipe)
    torch.testing.assert_close(almost.rewards, free.rewards)
    assert torch.equal(pulled.rewards[0], free.rewards[0])
    assert not torch.allclose(pulled.rewards[1:], free.rewards[1:])
    # Two gradients, with two calls each.
    assert pulled.num_denoiser_calls == almost.num_denoiser_calls == free.num_denoiser_calls + 4
    # The images come from the pipeline's own call.
    again = pipe(PROMPTS, latents=pulled.latents, num_inference_steps=2, guidance_scale=2.0, output_type="pt").images
    assert torch.equal(pulled.images, again)


def test_the_pull_works_with_cheap_runs_and_packed_latents():
    flux = tiny.flux()
    out = guide(
        flux, None, lambda images, prompts: images[..., :8].mean((1, 2, 3)), height=16, width=16,
        num_inference_steps=3, num_guidance_inference_steps=2, num_guidance_steps=1, output_type="pt",
        regulariser=LikelihoodRegulariser(), generator=torch.Generator().manual_seed(1), **tiny.embeds(2),
    )  # fmt: skip
    assert out.status == "completed" and len(out.rewards) == 3


@pytest.mark.parametrize("options", [{"weight": 0.0}, {"noise_to_signal": -1.0}, {"num_draws": 0}])
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(InputError, match=r"allowed: positive, positive, and at least 1\."):
        LikelihoodRegulariser(**options)


def test_levels_that_the_model_does_not_have_and_other_objects_are_refused(pipe):
    with pytest.raises(InputError, match=r"is 1000\.0; the model's levels are from 0\.0\d+ to \d+.*Take one between"):
        guided(pipe, regulariser=LikelihoodRegulariser(noise_to_signal=1000.0))
    with pytest.raises(InputError, match=r"`regulariser` is 0\.3"):
        guided(pipe, regulariser=0.3)
