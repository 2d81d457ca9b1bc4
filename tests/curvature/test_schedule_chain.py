"""The variances of the papers on pixel models, against loops that are written from the papers' formulas."""

import math

import diffusers
import pytest
import tiny
import torch
from cases import ORACLE_SHAPE, ORACLES

from diffusers_fisher import (
    Covariance,
    DirectFisher,
    ExactFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
    UnsupportedError,
    likelihood_bound,
)
from diffusers_fisher.curvature import BoundOptions, denoiser_likelihood_bound
from diffusers_fisher.curvature.draws import antithetic_noise
from diffusers_fisher.likelihood.draws import ImageDraws
from diffusers_fisher.seeds import content_key
from diffusers_fisher.testing import OracleDenoiser

LEVELS = {"num_train_timesteps": 12, "beta_start": 0.001, "beta_end": 0.6, "beta_schedule": "linear"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ddpm(variance_type="fixed_small", **changes):
    """Returns DDPM on 8-bit pixels, with outputs of twice the channels for a learned variance."""
    torch.manual_seed(0)
    channels = 6 if variance_type == "learned_range" else 3
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=channels, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    scheduler = diffusers.DDPMScheduler(**{**LEVELS, "variance_type": variance_type, **changes})
    pipe = diffusers.DDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(count=2):
    """Returns images with 8-bit values, both ends of the range among them."""
    values = torch.randint(0, 256, (count, 3, 8, 8), generator=seeded())
    values[:, 0, 0], values[:, 0, 1] = 0, 255
    return values.float() / 255


def loop_of_the_papers(network_output, x_0, noises, variance, clip, bins):
    """Returns the NLL (B,) in nats by Ho et al., equations 5 to 13, and Nichol and Dhariwal, equation 15.

    Args:
        network_output: `(x_t, t) -> (eps, share of log beta or None)`, with t from 1 to T.
        noises: one noise (B, ...) per t.
    """
    count = LEVELS["num_train_timesteps"]
    betas = torch.linspace(LEVELS["beta_start"], LEVELS["beta_end"], count, dtype=torch.float64)
    bars = torch.cumprod(1 - betas, 0)
    x_0, total = x_0.double(), 0.0
    for t in range(1, count + 1):
        beta, bar, before = betas[t - 1], bars[t - 1], bars[t - 2] if t > 1 else torch.ones((), dtype=torch.float64)
        x_t = bar.sqrt() * x_0 + (1 - bar).sqrt() * noises[t - 1]
        epsilon, share = network_output(x_t.float(), t)
        predicted = (x_t - (1 - bar).sqrt() * epsilon) / bar.sqrt()
        predicted = predicted.clamp(-1, 1) if clip else predicted
        small = (1 - before) / (1 - bar) * beta if t > 1 else (1 - bars[0]) / (1 - bars[1]) * betas[1]
        model = {
            "fixed_small": small,
            "fixed_large": small if t == 1 else beta,
            "learned": None if share is None else (share * beta.log() + (1 - share) * small.log()).exp(),
        }[variance]

        def mean(clean, before=before, beta=beta, bar=bar, x_t=x_t):
            return (before.sqrt() * beta * clean + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - bar)

        if t > 1:
            distance = (mean(x_0) - mean(predicted)).square()
            term = 0.5 * (-1 + model.log() - small.log() + (small + distance) / model)
        elif bins:
            term = -decoder(x_0, mean(predicted), model.sqrt())
        else:
            term = 0.5 * ((2 * math.pi * model).log() + (x_0 - mean(predicted)).square() / model)
        total = total + term.expand_as(x_0).flatten(1).sum(1)
    prior = 0.5 * (bars[-1] * x_0.square() + (1 - bars[-1]) - 1 - (1 - bars[-1]).log())
    return total + prior.flatten(1).sum(1)


def decoder(x, mean, deviation):
    """Returns log p(x|x_1) of Ho et al., equation 13: the integral over the bin of width 2/255 about x."""
    normal = torch.distributions.Normal(mean, deviation)
    below = torch.where(x < -0.999, 0.0, normal.cdf(x - 1 / 255))
    above = torch.where(x > 0.999, 1.0, normal.cdf(x + 1 / 255))
    return (above - below).clamp_min(1e-300).log()


def noises_of(samples, keys, scheduler):
    draws = ImageDraws(samples, seeded(), keys)
    table = 0.5 * torch.log(1 / scheduler_bars() - 1)
    return [next(antithetic_noise(draws, 1, f"{float(log_s):.9f}")) for log_s in table]


def scheduler_bars():
    betas = torch.linspace(
        LEVELS["beta_start"], LEVELS["beta_end"], LEVELS["num_train_timesteps"], dtype=torch.float64
    )
    return torch.cumprod(1 - betas, 0)


# Float32 networks leave 1e-6 bits/dim.
@pytest.mark.parametrize(("bins", "clip"), [(256, True), (None, False)])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned"])
def test_equals_the_loop_of_the_papers(variance, bins, clip):
    pipe = ddpm("learned_range" if variance == "learned" else variance, clip_sample=clip)
    pixels = images()
    out = likelihood_bound(pipe, pixels, variance=variance, bins=bins, generator=seeded())

    def network(x_t, t):
        with torch.no_grad():
            output = pipe.unet(x_t, t - 1).sample.double()
        if variance != "learned":
            return output, None
        epsilon, share = output.chunk(2, dim=1)
        return epsilon, (share + 1) / 2

    keys = [content_key(image) for image in (255 * pixels).round()]
    samples = 2 * pixels - 1
    expected = loop_of_the_papers(network, samples, noises_of(samples, keys, pipe.scheduler), variance, clip, bins)
    assert torch.allclose(out.bits_per_dim, expected / (192 * math.log(2)), rtol=0, atol=1e-5)
    assert out.num_denoiser_calls == 12
    assert (out.variance, out.density, out.space) == (variance, "bins" if bins else "data", "pixel")
    assert bool((out.standard_error > 0).all())


def test_decoder_in_the_far_tails_is_finite():
    """Where the distribution function rounds to 1, the probability of a bin is not 0."""
    from diffusers_fisher.curvature.schedule_chain import bin_log_probability

    error = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    places = torch.full_like(error, 100)
    value = bin_log_probability(places, error, torch.tensor(0.01, dtype=torch.float64), 2 / 255, 256)
    assert torch.isfinite(value).all()
    assert torch.allclose(value, value.flip(1))
    whole = torch.arange(256, dtype=torch.float64)[None]
    centres = whole * 2 / 255 - 1
    total = bin_log_probability(whole, centres - 0.3, torch.tensor(0.5, dtype=torch.float64), 2 / 255, 256)
    assert float(total.exp().sum()) == pytest.approx(1, abs=1e-12)


def test_a_mixture_is_bounded_from_above():
    """With a perfect denoiser the chain's end is a law near the data's own; the bound of the data's density holds."""
    oracle = GaussianMixture(torch.zeros(1, *ORACLE_SHAPE).double(), Covariance.isotropic(0.3, ORACLE_SHAPE))
    denoiser = OracleDenoiser(oracle, diffusers.DDIMScheduler(**LEVELS, clip_sample=False))
    samples = oracle.sample(64, seeded(1))
    exact = -oracle.log_density(samples, NoiseLevel.from_alpha_bar(1 - 1e-12))
    gaps = {
        name: float(
            (
                denoiser_likelihood_bound(
                    denoiser, samples, None, BoundOptions(name, num_draws=6, generator=seeded())
                ).value
                - exact
            ).mean()
        )
        for name in ("fixed_small", "fixed_large")
    }
    optimal = denoiser_likelihood_bound(denoiser, samples, ExactFisher(oracle), BoundOptions(generator=seeded()))
    smoothed = -oracle.log_density(samples, NoiseLevel(torch.ones(()).double(), optimal.noise_to_signal[0]))
    assert all(gap > 0.05 for gap in gaps.values())
    assert float((optimal.value - smoothed).mean()) < min(gaps.values())


def test_latent_models_bring_their_own_variance():
    pipe = tiny.dit(**LEVELS)
    latents = torch.randn(2, 4, 8, 8, generator=seeded())
    out = likelihood_bound(pipe, prompt=[1, 2], latents=latents, variance="learned", generator=seeded())
    keys = [content_key(sample) for sample in latents]

    def network(x_t, t):
        with torch.no_grad():
            times = torch.full((2,), t - 1)
            output = pipe.transformer(x_t, timestep=times, class_labels=torch.tensor([1, 2])).sample.double()
        epsilon, share = output.chunk(2, dim=1)
        return epsilon, (share + 1) / 2

    noises = noises_of(latents, keys, pipe.scheduler)
    expected = loop_of_the_papers(network, latents, noises, "learned", False, None)
    assert torch.allclose(out.bits_per_dim, expected / (out.dims * math.log(2)), rtol=0, atol=1e-5)
    assert (out.density, out.space) == ("data", "latent")
    with pytest.raises(InputError, match="`bins` is 256, but DiTPipeline is in latents"):
        likelihood_bound(pipe, prompt=[1, 2], latents=latents, variance="learned", bins=256)


def test_zero_terminal_signal_is_finite():
    oracle = ORACLES["gaussian"]
    scheduler = diffusers.DDIMScheduler(
        **LEVELS, rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction",
        clip_sample=False,
    )  # fmt: skip
    out = denoiser_likelihood_bound(
        OracleDenoiser(oracle, scheduler), oracle.sample(4, seeded(1)), None, BoundOptions("fixed_large")
    )
    assert torch.isfinite(out.value).all()
    assert torch.equal(out.prior_terms, torch.zeros(4, dtype=torch.float64))  # the chain ends in pure noise


def test_numbers_do_not_depend_on_the_batch():
    pipe, pixels = ddpm(), images(3)
    options = {"variance": "fixed_small", "bins": 256, "num_draws": 2}
    whole = likelihood_bound(pipe, pixels, **options, generator=seeded()).value
    pieces = [likelihood_bound(pipe, pixels[row : row + 1], **options, generator=seeded()).value for row in (2, 0, 1)]
    assert torch.allclose(whole[[2, 0, 1]], torch.cat(pieces), rtol=1e-6)  # a float32 network in other batches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 20}, "`num_steps` belongs to variance 'optimal' or 'diagonal'; 'fixed_small' takes"),
        ({"num_probes": 1}, "`num_probes` belongs to variance 'optimal'"),
        ({"prior_mean": 0.0, "prior_variance": 1.0}, "`prior_mean` belongs to variance 'optimal'"),
        ({"num_draws": 3}, "`num_draws` is 3; allowed"),
        ({"estimator": DirectFisher()}, "The variance is 'fixed_small' and the estimator DirectFisher"),
    ],
)
def test_options_of_the_optimal_variance_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        likelihood_bound(ddpm(), images(), variance="fixed_small", **options)


def test_networks_without_the_variance_are_refused():
    with pytest.raises(
        UnsupportedError, match=r"The variance is 'learned', but the network's outputs are .*\(2, 3, 8"
    ):
        likelihood_bound(ddpm(), images(), variance="learned")
    with pytest.raises(UnsupportedError, match="a learned variance is supported as 'learned_range'"):
        likelihood_bound(ddpm("learned"), images(), variance="learned")
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    denoiser = OracleDenoiser(ORACLES["gaussian"], flow)
    samples = ORACLES["gaussian"].sample(2, seeded())
    with pytest.raises(UnsupportedError, match="needs a variance-preserving schedule; got FlowMatchEulerDiscreteSch"):
        denoiser_likelihood_bound(denoiser, samples, None, BoundOptions("fixed_small"))
    with pytest.raises(InputError, match="The variance is 'optimal' and the estimator None; allowed: an estimator"):
        denoiser_likelihood_bound(denoiser, samples)
    with pytest.raises(InputError, match="beside the 256 values"):
        likelihood_bound(ddpm(), images() * 0.9987, variance="fixed_small", bins=256)
