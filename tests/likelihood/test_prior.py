"""The Gaussian at the noise end, its error, and the total error, against laws in closed form."""

import itertools
import math

import pytest
import torch
from cases import ORACLE_SHAPE, ORACLES, STABLE_DIFFUSION, relative
from diffusers import DDIMScheduler

from diffusers_fisher import AutodiffFisher, DCTBasis, InputError
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood, squared_error_log_likelihood
from diffusers_fisher.likelihood.prior import PriorGaussian, check_prior
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

S = 14.614641229333612  # sigma/alpha of Stable Diffusion's last timestep
DIMENSIONS = 256
BIT = DIMENSIONS * math.log(2)
SAMPLES = torch.zeros(1, DIMENSIONS)
MODES, SCALES, MEANS = (1, 2, 5, 50), (0.1, 1, 3, 10), (0, 1, 3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class NoiseEnd:
    """Data of modes at the noise end: points, their exact log density, eps and 1 - r.

    One mode has the variances `scale`^2; several have their means at distances of about `scale` and the variance 0.1.
    `skewed` lets the variances fall as 1/i over the dimensions.
    """

    def __init__(self, modes, scale, mean, skewed, count=16, seed=0):
        generator = seeded(seed)
        means = mean + (scale if modes > 1 else 0) * normal(modes, DIMENSIONS, generator=generator)
        variance = torch.full((DIMENSIONS,), 0.1 if modes > 1 else float(scale) ** 2, dtype=torch.float64)
        if skewed:
            course = 1 / torch.arange(1, DIMENSIONS + 1, dtype=torch.float64)
            variance = variance * course / course.mean()
        total = variance + S**2
        mode = torch.randint(0, modes, (count,), generator=generator)
        self.x = means[mode] + total.sqrt() * normal(count, DIMENSIONS, generator=generator)
        slopes = (means - self.x[:, None]) / total
        logs = -0.5 * (slopes.square() * total + (2 * math.pi * total).log()).sum(2) - math.log(modes)
        self.log_density = logs.logsumexp(1)
        weights = logs.softmax(1)
        score = (weights[..., None] * slopes).sum(1)
        self.epsilon = -S * score
        spread = (weights * slopes.square().sum(2)).sum(1) - score.square().sum(1)
        self.rest = S**2 / DIMENSIONS * ((1 / total).sum() - spread)
        signs = 2.0 * torch.randint(0, 2, self.x.shape, generator=generator) - 1
        products = (slopes * signs[:, None]).sum(2)
        spread = (weights * products.square()).sum(1) - (score * signs).sum(1).square()
        self.rest_by_probe = S**2 / DIMENSIONS * ((1 / total).sum() - spread)  # v . F v for one vector of signs
        self.moments = means.mean(0), variance + means.var(0, correction=0)

    def errors(self, mean=None, variance=None, by_probe=False):
        """Returns the prior's true error and the stated one, (count,) bits/dim each."""
        prior = check_prior(SAMPLES.shape[1:], mean, variance)
        stated = prior.error(self.x, S, self.epsilon, self.rest_by_probe if by_probe else self.rest)
        return (self.log_density - prior.log_density(self.x, S)).abs() / BIT, stated / BIT


def all_errors(seed, matched, by_probe):
    laws = itertools.product(MODES, SCALES, MEANS, (False, True))
    ends = [NoiseEnd(*law, seed=seed) for law in laws]
    pairs = [end.errors(*(end.moments if matched else (None, None)), by_probe) for end in ends]
    return tuple(torch.stack(each) for each in zip(*pairs, strict=True))


# The factors were set with seeds 0 to 3.
@pytest.mark.parametrize("seed", [4, 5])
@pytest.mark.parametrize("matched", [False, True])
@pytest.mark.parametrize("by_probe", [False, True])
def test_stated_error_of_the_prior_covers_the_true_one_and_is_not_far_above(seed, matched, by_probe):
    true, stated = all_errors(seed, matched, by_probe)
    assert true.shape == (96, 16)
    covered = (stated >= true - 1e-9).double()
    assert float(covered.mean()) > 0.96
    # The worst of 96 laws by 16 points each: a law of true coverage 0.9 has 10 of 16 or fewer once in 300 draws.
    assert float(covered.mean(1).min()) > 0.6
    large = true > 0.001
    assert float(covered[large].mean()) > 0.95
    ratio = stated[large] / true[large]
    # One probe per level leaves noise in 1 - r, which is stated as if it were the prior's error.
    assert float((ratio < 10).double().mean()) > (0.9 if by_probe else 0.95)
    assert float(ratio.median()) < 4


@pytest.mark.parametrize(("scale", "mean"), [(10, 0), (0.1, 3), (3, 1)])
def test_errors_of_single_gaussians_are_seen_where_the_standard_prior_is_wrong(scale, mean):
    true, stated = NoiseEnd(1, scale, mean, False, count=64).errors()
    if scale == 10:
        assert 0.04 < float(true.median()) < 0.08  # what was never said before
    assert bool((stated >= true).all())
    assert float(stated.median()) < 5 * float(true.median())


def test_gaussians_that_are_the_prior_have_no_error():
    end = NoiseEnd(1, 3, 1, True)
    true, stated = end.errors(*end.moments)
    # Sums of 256 terms of size one in float64.
    assert float(true.max()) < 1e-12 and float(stated.max()) < 1e-12


def test_traces_beyond_their_range_give_finite_errors():
    end = NoiseEnd(5, 10, 0, False)
    prior = check_prior(SAMPLES.shape[1:], None, None)
    for rest in (-1.0, 0.0, 2.0):
        error = prior.error(end.x, S, end.epsilon, torch.full_like(end.rest, rest))
        assert bool(error.isfinite().all()) and bool((error >= 0).all())


# The spectral prior

SHAPE = (1, 3, 4)


def spectral_data():
    """Returns a mean, a spectrum, and the whole covariance of such data."""
    mean = normal(*SHAPE, generator=seeded())
    spectrum = 5 * torch.rand(SHAPE, generator=seeded(1), dtype=torch.float64) + 0.1
    basis = DCTBasis(SHAPE)
    matrix = basis.synthesise(torch.eye(12, dtype=torch.float64))  # rows are the basis vectors
    return mean, spectrum, matrix.T @ spectrum.flatten().diag() @ matrix


def test_spectral_prior_is_the_gaussian_with_that_covariance():
    mean, spectrum, covariance = spectral_data()
    x = 3 * normal(5, *SHAPE, generator=seeded(2))
    prior = check_prior(x.shape[1:], mean, spectrum, "dct")
    identity = torch.eye(12, dtype=torch.float64)
    exact = torch.distributions.MultivariateNormal(mean.flatten(), covariance + 4 * identity)
    assert relative(prior.log_density(x, 2.0), exact.log_prob(x.flatten(1))) < 1e-12
    noises = normal(20000, *SHAPE, generator=seeded(3))
    mean_log_density = prior.log_density(x[:1] + 2 * noises, 2.0).mean()
    # 20,000 draws with a standard deviation of at most sqrt(24)
    assert abs(float(prior.mean_log_density(x[:1], 2.0)[0] - mean_log_density)) < 4 * (24 / 20000) ** 0.5


def test_likelihood_with_the_spectrum_is_exact_for_such_data():
    mean, spectrum, covariance = spectral_data()
    oracle = MixtureOracle.gaussian(mean, covariance)
    denoiser = OracleDenoiser(oracle, DDIMScheduler(**STABLE_DIFFUSION))
    samples = oracle.sample(3, seeded(4))
    options = {"num_steps": 30, "num_probes": None, "prior_mean": mean}
    matrix = covariance.diagonal().view(SHAPE)
    spectral, elements = (
        integrate_log_likelihood(denoiser, samples, AutodiffFisher(denoiser), Integration(**options, **prior))
        for prior in ({"prior_variance": spectrum, "prior_basis": "dct"}, {"prior_variance": matrix})
    )
    assert (spectral.prior, elements.prior) == ("spectral", "moment-matched")
    level = float(spectral.noise_to_signal[0])
    exact = torch.distributions.MultivariateNormal(
        mean.flatten(), covariance + level**2 * torch.eye(12, dtype=torch.float64)
    ).log_prob(samples.flatten(1))
    errors = [float((out.log_prob - exact).abs().max()) for out in (spectral, elements)]
    assert errors[0] < 0.2 * errors[1]  # what remains is that of 30 steps
    assert float(spectral.prior_error.max()) < 1e-3 * float(elements.prior_error.max() + errors[1])
    squares = squared_error_log_likelihood(denoiser, samples, 8, mean, spectrum, seeded(), prior_basis="dct")
    assert squares.prior == "spectral"


def test_a_spectrum_equal_everywhere_is_the_variance():
    x = normal(2, *SHAPE, generator=seeded())
    flat = [check_prior(x.shape[1:], 0.5, 2.0, basis).log_density(x, 3.0) for basis in ("pixel", "dct")]
    assert relative(*flat) < 1e-12


def test_unknown_basis_is_refused():
    with pytest.raises(InputError, match="`prior_basis` is 'fourier'; allowed: pixel, dct"):
        check_prior(SAMPLES.shape[1:], 0.0, 1.0, "fourier")
    assert isinstance(check_prior(SAMPLES.shape[1:], 0.0, 1.0), PriorGaussian)


# Outputs


def mixture_likelihood(**options):
    denoiser = OracleDenoiser(ORACLES["mixture"], DDIMScheduler(**STABLE_DIFFUSION))
    samples = ORACLES["mixture"].sample(3, seeded(5))
    return integrate_log_likelihood(
        denoiser, samples, AutodiffFisher(denoiser), Integration(12, generator=seeded(), **options)
    )


def test_total_error_is_the_half_width_of_95_percent():
    out = mixture_likelihood()
    assert torch.equal(out.trace_error, torch.zeros(3, dtype=torch.float64))
    assert bool((out.prior_error > 0).all())
    expected = 1.96 * out.standard_error + out.discretisation_error + out.prior_error
    assert relative(out.total_error, expected) < 1e-12
    assert relative(out.total_error_bits, expected / math.prod(ORACLE_SHAPE) / math.log(2)) < 1e-12
    out.trace_error = 2 * 1.96 * out.standard_error  # a half-width, as the total
    assert relative(out.total_error - expected, (5**0.5 - 1) * 1.96 * out.standard_error) < 1e-9


def test_text_has_every_part_of_the_error_and_names_the_standard_prior():
    out = mixture_likelihood()
    text, means = str(out), [float(out.to_bits(each).mean()) for each in (out.prior_error, out.total_error)]
    assert f"{means[0]:.4f} by the prior; within {means[1]:.4f} with 95%, on average" in text
    assert "prior standard, N(0, 1)" in text and "by the trace model" not in text
    assert "prior moment-matched" in str(mixture_likelihood(prior_mean=0.0, prior_variance=1.0))
    out.trace_error = torch.ones(3, dtype=torch.float64)
    assert "by the trace model" in str(out)
