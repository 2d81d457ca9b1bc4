"""Schemes, error estimates, the adaptive reference, squared errors and bins, against densities in closed form."""

import math
import sys
import warnings

import diffusers
import pytest
import torch
from cases import ORACLE_SHAPE, ORACLES, relative

from diffusers_fisher import (
    AutodiffFisher,
    CoarseGridWarning,
    Covariance,
    ExactFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
    NumericalError,
    UnsupportedError,
)
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.likelihood import (
    DEFAULT_SCHEME,
    SCHEMES,
    Integration,
    dequantised,
    integrate_log_likelihood,
    offset_bits,
    reference_log_likelihood,
    squared_error_log_likelihood,
)
from diffusers_fisher.likelihood.schemes import noise_grid, quadrature_weights, step_weights
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser
from likelihood.test_likelihood import BIT, draws, exact, likelihood, moments, vp, without_prior

ONE = torch.ones((), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Schemes


def test_weights_are_exact_for_polynomials():
    nodes = [-1.3, -0.9, 0.2, 0.7]
    for points in range(1, 5):
        weights = step_weights(nodes[:points], 0.7, 1.5)
        for power in range(points):
            # Integrals of u^n e^u by their recursion.
            antiderivative = {
                0: lambda u: math.exp(u),
                1: lambda u: (u - 1) * math.exp(u),
                2: lambda u: (u**2 - 2 * u + 2) * math.exp(u),
                3: lambda u: (u**3 - 3 * u**2 + 6 * u - 6) * math.exp(u),
            }[power]
            expected = antiderivative(1.5) - antiderivative(0.7)
            integral = sum(weight * node**power for weight, node in zip(weights, nodes, strict=False))
            assert integral == pytest.approx(expected, rel=1e-12)  # float64, extrapolated by two steps at most


@pytest.mark.parametrize("points", [2, 3, 4])
@pytest.mark.parametrize("levels", [2, 3, 4, 7])
def test_quadrature_is_exact_for_polynomials(points, levels):
    grid = torch.linspace(-1, 2, levels, dtype=torch.float64) ** 3  # nodes need not be equally spaced
    weights = quadrature_weights(grid, points)
    for power in range(min(points, levels)):
        expected = float(grid[-1] ** (power + 1) - grid[0] ** (power + 1)) / (power + 1)
        assert float(weights @ grid**power) == pytest.approx(expected, abs=1e-11)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("trapezoid", 2), ("adams3", 3), ("adams4", 4)])
def test_schemes_converge_with_their_order(name, order):
    """The path alone converges: the trace is a smooth function here, and the correction of the end does no harm."""
    oracle = ORACLES["gaussian"]
    errors = []
    for num_steps in (40, 80):
        out = likelihood(oracle, draws(oracle), num_steps=num_steps, scheme=name)
        errors.append(float((without_prior(oracle, out) - exact(oracle, draws(oracle), out)).abs().mean()))
    # 2^order, less a quarter for terms of the next order; correction may add up to an order
    assert 0.75 * 2**order < errors[0] / errors[1] < 3 * 2**order


def test_higher_order_is_better_and_the_default_is_the_best():
    oracle = ORACLES["mixture"]
    errors = {}
    for name in SCHEMES:
        out = likelihood(oracle, draws(oracle), num_steps=39, scheme=name)
        errors[name] = float((without_prior(oracle, out) - exact(oracle, draws(oracle), out)).abs().mean())
        assert out.scheme == name
        assert out.num_denoiser_calls == 40
    assert errors["euler"] > 5 * errors["trapezoid"] > 10 * errors["adams3"]
    assert errors[DEFAULT_SCHEME] == min(errors.values())


# Larger closed forms: 4x8x8, the shape of the embedded checkpoint's latents


SHAPE = (4, 8, 8)
LARGE_BIT = 256 * math.log(2)


def laws():
    generator = seeded(3)
    centres = torch.randn(20, *SHAPE, dtype=torch.float64, generator=generator)
    variances = torch.logspace(-2, -1, 20, dtype=torch.float64).view(20, 1, 1, 1).expand(20, *SHAPE).clone()
    factor = torch.randn(256, 256, dtype=torch.float64, generator=generator) / 16
    spectrum = torch.arange(1, 257, dtype=torch.float64) ** -0.5
    return {
        "isotropic": GaussianMixture(centres[:1], Covariance.isotropic(0.05, SHAPE)),
        "correlated": GaussianMixture(centres[:1], Covariance.full(((factor * spectrum) @ factor.mT)[None], SHAPE)),
        "modes": GaussianMixture(0.5 * centres, Covariance.diagonal(variances)),
    }


@pytest.fixture(scope="module")
def closed_forms():
    """Returns (errors, estimates) in bits/dim of 16 draws from each law, by calls, against fine runs."""
    results = {}
    for name, law in laws().items():
        samples, denoiser = law.sample(16, seeded(1)), OracleDenoiser(law, vp())
        outs = {
            n: integrate_log_likelihood(denoiser, samples, ExactFisher(law), Integration(n - 1, None))
            for n in (20, 40, 301)
        }
        level = NoiseLevel(ONE, outs[301].noise_to_signal[-1])
        density = NoiseLevel(ONE, outs[301].noise_to_signal[0])
        for calls, out in outs.items():
            total = out.trace_log_prob + law.log_density(out.final_latents, level)
            error = (total - law.log_density(samples, density)).abs()
            results[name, calls] = error / LARGE_BIT, out.discretisation_error / LARGE_BIT
    return results


@pytest.mark.parametrize(("calls", "mean", "worst"), [(20, 0.01, 0.02), (40, 0.002, 0.01), (301, 1e-4, 5e-4)])
def test_density_by_few_calls(closed_forms, calls, mean, worst):
    errors = torch.cat([errors for (_, number), (errors, _) in closed_forms.items() if number == calls])
    assert float(errors.mean()) < mean
    assert float(errors.max()) < worst


# The densities to 1e-3 bits/dim at 100 calls, what the prior leaves included: 5e-7 (isotropic) to 2e-4 (modes).
@pytest.mark.parametrize("name", laws())
def test_density_with_the_moment_matched_prior(name):
    law = laws()[name]
    mean = torch.einsum("k,kchw->chw", law.weights, law.means)
    modes = torch.arange(len(law.weights))
    mode_variances = [
        law.covariance.select(modes[k : k + 1]).dense()[0].diagonal().view(SHAPE) for k in range(len(modes))
    ]
    variance = torch.einsum("k,kchw->chw", law.weights, torch.stack(mode_variances) + (law.means - mean).square())
    samples, denoiser = law.sample(16, seeded(1)), OracleDenoiser(law, vp())
    prior = {"prior_mean": mean, "prior_variance": variance}
    out = integrate_log_likelihood(denoiser, samples, ExactFisher(law), Integration(99, None, **prior))
    error = (out.log_prob - law.log_density(samples, NoiseLevel(ONE, out.noise_to_signal[0]))).abs() / LARGE_BIT
    assert (out.num_denoiser_calls, out.prior) == (100, "moment-matched")
    assert float(error.mean()) < 1e-3


@pytest.mark.parametrize("calls", [20, 40])
def test_estimate_covers_the_error_and_is_of_its_size(closed_forms, calls):
    pairs = [pair for (_, number), pair in closed_forms.items() if number == calls]
    errors, estimates = (torch.cat(values) for values in zip(*pairs, strict=True))
    assert float((estimates >= errors).double().mean()) >= 0.95
    assert float(errors.median()) < float(estimates.median()) < 10 * float(errors.median())


# euler and trapezoid: their companions are of higher order, so that the estimate is little more than the error;
# adams3: its companion is of order 2, 3 to 10 times the error on these grids.
@pytest.mark.parametrize("calls", [11, 40])
@pytest.mark.parametrize(("scheme", "size"), [("euler", 2), ("trapezoid", 5), ("adams3", 10)])
def test_estimates_of_the_other_schemes_cover_their_errors(scheme, size, calls):
    errors, estimates = [], []
    for law in laws().values():
        samples, denoiser = law.sample(16, seeded(1)), OracleDenoiser(law, vp())
        reference, out = (
            integrate_log_likelihood(denoiser, samples, ExactFisher(law), Integration(number - 1, None, scheme=name))
            for number, name in ((201, DEFAULT_SCHEME), (calls, scheme))
        )
        errors.append((out.log_prob - reference.log_prob).abs())
        estimates.append(out.discretisation_error)
    all_errors, all_estimates = torch.cat(errors), torch.cat(estimates)
    assert float((all_estimates >= all_errors).double().mean()) >= 0.95
    assert float(all_errors.median()) < float(all_estimates.median()) < size * float(all_errors.median())


def test_warning_for_coarse_grids_names_the_error():
    oracle = ORACLES["mixture"]
    with pytest.warns(CoarseGridWarning, match=r"grid of 4 steps is coarse: its error .* up to \d\.\d{3} bits/dim"):
        likelihood(oracle, draws(oracle), num_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoarseGridWarning)
        likelihood(oracle, draws(oracle), num_steps=60)


def test_steps_do_not_lose_the_digits_of_a_float32_network():
    """At the smallest noise of flow matching, x_0 in float32 would give the step a relative error of 3e-5."""
    oracle = ORACLES["gaussian"]

    class Single(Denoiser):
        def model_output(self, x, timestep):
            self.num_calls += 1
            return OracleDenoiser(oracle, self.scheduler).model_output(x.double(), timestep).to(x.dtype)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    single, double = Single(scheduler), OracleDenoiser(oracle, scheduler)
    samples = draws(oracle).float()
    law = GaussianMixture(oracle.means.view(1, *ORACLE_SHAPE), Covariance.full(oracle.covariances, ORACLE_SHAPE))
    pairs = ((single, samples), (double, samples.double()))
    runs = [integrate_log_likelihood(denoiser, x, ExactFisher(law), Integration(20, None)) for denoiser, x in pairs]
    # Rounding of inputs and outputs of float32, 6e-8 each, over 21 evaluations
    assert relative(runs[0].final_latents, runs[1].final_latents) < 3e-6


def test_text_of_the_output():
    oracle = ORACLES["mixture"]
    samples = (draws(oracle) * 20).round().clamp(-127, 127) / 127.5 + 1 / 255
    out = likelihood(oracle, samples, num_probes=2, space="pixel", generator=seeded(), bins=256)
    text = str(out)
    bits = out.bits_per_dim
    assert "Log-likelihood of 4 pixel samples of 6 dimensions" in text
    assert f"{float(bits.mean()):.4f} on average, {float(bits.min()):.4f} to {float(bits.max()):.4f}" in text
    assert "6.9944 of them for the bins" in text
    assert "AutodiffFisher, 2 probes" in text
    assert "prior standard" in text
    assert "21 denoiser calls" in text


@pytest.mark.parametrize(("low", "high"), [(-3.5, 2.7), (-6.9, 6.9)])
def test_grid_is_dense_where_modes_merge_and_thin_at_the_ends(low, high):
    grid = noise_grid(low, high, 40)
    assert grid.shape == (41,) and grid.dtype is torch.float64
    assert (float(grid[0]), float(grid[-1])) == (low, high)
    steps, middles = grid.diff(), (grid[1:] + grid[:-1]) / 2
    assert bool((steps > 0).all())
    assert abs(float(middles[steps.argmin()]) - 0.5) < 0.3  # a step's width
    torch.testing.assert_close(noise_grid(low, high, 20), grid[::2], rtol=0, atol=1e-9)  # halving keeps nodes
    thinnest = float(steps.max() / steps.min())
    assert thinnest < 2.1 if high < 3 else 4 < thinnest < 30


# The reference


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_reference_is_exact_to_its_tolerance(name):
    oracle = ORACLES[name]
    denoiser, samples = OracleDenoiser(oracle, vp()), draws(oracle)
    before = samples.clone()
    out = reference_log_likelihood(denoiser, samples, tolerance=1e-6, **moments(oracle))
    error = (without_prior(oracle, out) - exact(oracle, samples, out)).abs()
    assert float(error.max()) < 1e-3  # nats: 6 dimensions of states that grow to 15, a relative 1e-6 per step
    assert float(out.discretisation_error.max()) < 1e-2
    assert out.num_denoiser_calls == denoiser.num_calls
    assert (out.prior, out.scheme) == ("moment-matched", "dopri5, tolerance 1e-06")
    fine_out = likelihood(oracle, samples, num_steps=200)
    assert (
        relative(
            out.unexplained_noise_fraction,
            likelihood(oracle, samples, num_steps=8 * 25).unexplained_noise_fraction[::25],
        )
        < 1e-3
    )  # both paths' errors
    assert relative(out.final_latents, fine_out.final_latents) < 1e-4
    assert torch.equal(samples, before)


class InRangeDenoiser(OracleDenoiser):
    """A network that is not made for samples far larger than those of the level."""

    def model_output(self, x, timestep):
        assert float(x.detach().abs().max()) < 10
        return super().model_output(x, timestep)


def test_the_reference_never_goes_beyond_the_last_level():
    oracle = MixtureOracle.gaussian(torch.zeros(4, dtype=torch.float64), 0.5 * torch.eye(4, dtype=torch.float64))
    denoiser = InRangeDenoiser(oracle, diffusers.FlowMatchEulerDiscreteScheduler())
    out = reference_log_likelihood(denoiser, torch.randn(2, 4, dtype=torch.float64), tolerance=1e-3)
    assert torch.isfinite(out.log_prob).all()


def test_reference_refuses_bad_arguments(monkeypatch):
    oracle = ORACLES["gaussian"]
    denoiser, samples = OracleDenoiser(oracle, vp()), draws(oracle)
    with pytest.raises(InputError, match=r"`tolerance` is 0\.5, `num_levels` 9; allowed: between 0 and 0\.1"):
        reference_log_likelihood(denoiser, samples, tolerance=0.5)
    with pytest.raises(InputError, match="Give both `prior_mean`"):
        reference_log_likelihood(denoiser, samples, prior_mean=0.0)
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(UnsupportedError, match=r"needs torchdiffeq, which is not installed: pip install"):
        reference_log_likelihood(denoiser, samples)
    assert denoiser.num_calls == 0


# Squared errors


def noised_mean(oracle, samples, s, count=4000):
    """Returns the mean and the standard error, over the noise, of the noised log density."""
    level = NoiseLevel(ONE, torch.tensor(s, dtype=torch.float64))
    noise = torch.randn(count, *samples.shape, generator=seeded(1), dtype=torch.float64)
    values = torch.stack([oracle.log_density(samples + s * each, level) for each in noise])
    return values.mean(0), values.std(0) / count**0.5


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_squared_errors_give_the_noised_density(name):
    oracle = ORACLES[name]
    samples, denoiser = draws(oracle), OracleDenoiser(oracle, vp())
    out = squared_error_log_likelihood(denoiser, samples, 2000, generator=seeded(), **moments(oracle))
    expected, error = noised_mean(oracle, samples, out.smoothing)
    # The prior's floor is up to 0.02 nats here (see test_likelihood.py); beyond it, four standard errors of both.
    deviations = ((out.log_prob - expected).abs() - 0.02) / (out.standard_error.square() + error.square()).sqrt()
    assert float(deviations.max()) < 4
    assert float(out.standard_error.max()) < 0.5
    assert (out.density, out.prior, out.num_denoiser_calls) == ("noised, mean", "moment-matched", 2000)
    assert relative(out.bits_per_dim, -out.log_prob / BIT) < 1e-15


def test_squared_errors_standard_error_is_that_of_repetitions():
    oracle = ORACLES["gaussian"]
    denoiser = OracleDenoiser(oracle, vp())
    outs = [squared_error_log_likelihood(denoiser, draws(oracle), 16, generator=seeded(seed)) for seed in range(100)]
    spread = torch.stack([out.log_prob for out in outs]).std(0)
    standard_error = torch.stack([out.standard_error.square() for out in outs]).mean(0).sqrt()
    # A hundred repetitions scatter by 7%; neighbouring strata's means differ, so the claim errs upwards.
    assert bool((standard_error > 0.75 * spread).all())
    assert bool((standard_error < 3 * spread).all())


def test_squared_errors_are_paired_over_samples_and_calls():
    oracle = ORACLES["mixture"]
    denoiser, samples = OracleDenoiser(oracle, vp()), draws(oracle)
    batch = squared_error_log_likelihood(denoiser, samples, 8, generator=seeded())
    for index in range(4):
        single = squared_error_log_likelihood(denoiser, samples[index : index + 1], 8, generator=seeded())
        assert relative(batch.contributions[:, index], single.contributions[:, 0]) < 1e-12  # another batch's rounding
    neighbour = squared_error_log_likelihood(denoiser, samples + 1e-4, 8, generator=seeded())
    other = squared_error_log_likelihood(denoiser, samples, 8, generator=seeded(1))
    assert float((neighbour.log_prob - batch.log_prob).abs().max()) < 0.1
    assert float((other.log_prob - batch.log_prob).abs().max()) > 0.1


@pytest.mark.parametrize("number", [2, 7])
def test_squared_errors_refuse_bad_arguments(number):
    denoiser = OracleDenoiser(ORACLES["gaussian"], vp())
    with pytest.raises(InputError, match=rf"`num_levels` is {number}; allowed: even, at least 4"):
        squared_error_log_likelihood(denoiser, draws(ORACLES["gaussian"]), number)
    assert denoiser.num_calls == 0


def test_squared_errors_that_are_not_finite_are_refused():
    class Broken(Denoiser):
        def model_output(self, x, timestep):
            return x * math.nan

    with pytest.raises(NumericalError, match="Squared errors are not finite"):
        squared_error_log_likelihood(Broken(vp()), draws(ORACLES["gaussian"]), 4)


# Bins


def test_offset_is_that_of_the_bins_width():
    assert offset_bits(256) == pytest.approx(math.log2(127.5), rel=1e-15)
    assert offset_bits(256, (0.0, 255.0)) == 0.0
    assert offset_bits(None) == 0.0


def test_dequantised_samples_fill_their_bins():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    samples = levels.repeat(40, 1)
    offsets = (dequantised(samples, 256, seeded()) - samples) * 127.5
    assert bool((offsets.abs() <= 0.5).all())
    assert abs(float(offsets.mean())) < 4 * (1 / 12 / offsets.numel()) ** 0.5
    assert float(offsets.var()) == pytest.approx(1 / 12, rel=0.05)  # 10,240 draws scatter by 0.9%
    assert torch.equal(dequantised(samples, 256, seeded()), dequantised(samples, 256, seeded()))
    assert not torch.equal(dequantised(samples, 256, seeded()), dequantised(samples, 256, seeded(1)))


def test_bits_per_dim_with_bins_give_a_probability():
    """A density that is flat over many bins: the discrete probability is the density times the bin's width."""
    variance, bins = 0.05, 256
    law = GaussianMixture(
        torch.zeros(1, *ORACLE_SHAPE, dtype=torch.float64), Covariance.isotropic(variance, ORACLE_SHAPE)
    )
    samples = (law.sample(64, seeded()) * 127.5 - 0.5).round().clamp(-128, 127) / 127.5 + 0.5 / 127.5
    denoiser = OracleDenoiser(law, vp())
    options = {"prior_mean": 0.0, "prior_variance": variance, "bins": bins, "generator": seeded(2)}
    out = integrate_log_likelihood(denoiser, samples, ExactFisher(law), Integration(60, None, **options))
    total_variance = variance + float(out.noise_to_signal[0]) ** 2
    edges = torch.distributions.Normal(0.0, total_variance**0.5)
    probability = edges.cdf(samples + 0.5 / 127.5) - edges.cdf(samples - 0.5 / 127.5)
    expected = -probability.log2().flatten(1).mean(1)
    # A place in the bin changes log p by x u/variance, |u| < 1/255: 0.01 bits/dim at two deviations, less on average.
    assert float((out.bits_per_dim - expected).abs().max()) < 0.03
    assert abs(float((out.bits_per_dim - expected).mean())) < 0.003
    assert out.offset_bits == offset_bits(bins)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, r"lie up to 0\.\d\d bins beside the 256 values of -1\.0 to 1\.0"),
        (1.1, r"reach from 1\.1 to 1\.1; the declared range is -1\.0 to 1\.0"),
    ],
)
def test_samples_off_their_bins_are_refused_before_any_evaluation(value, message):
    denoiser = OracleDenoiser(ORACLES["gaussian"], vp())
    samples = torch.full((2, *ORACLE_SHAPE), value, dtype=torch.float64)
    with pytest.raises(InputError, match=message):
        integrate_log_likelihood(denoiser, samples, AutodiffFisher(denoiser), Integration(4, None, bins=256))
    with pytest.raises(InputError, match=message):
        squared_error_log_likelihood(denoiser, samples, 4, bins=256)
    assert denoiser.num_calls == 0
