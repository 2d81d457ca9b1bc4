"""The likelihood bound of a denoiser against densities in closed form."""

import dataclasses
import math

import diffusers
import pytest
import torch
from cases import ORACLES, STABLE_DIFFUSION, FunctionFisher

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    ExactFisher,
    FiniteDifferenceFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
    NumericalError,
)
from diffusers_fisher.curvature import BoundOptions, denoiser_likelihood_bound, fit_level_fisher
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.fisher import FisherOperator, LevelFisher
from diffusers_fisher.testing import OracleDenoiser

SHAPE = (1, 8, 8)
BIT = 64 * math.log(2)
ONE = torch.ones((), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def modes():
    """Returns 8 modes of variances 0.01 to 0.1 in 64 dimensions."""
    centres = torch.randn(8, *SHAPE, dtype=torch.float64, generator=seeded(3))
    variances = torch.logspace(-2, -1, 8, dtype=torch.float64).view(8, 1, 1, 1).expand(8, *SHAPE).clone()
    return GaussianMixture(0.5 * centres, Covariance.diagonal(variances))


LAW = modes()
VP = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler()


class NoisyFisher(ExactFisher):
    """Replaces the unexplained noise fraction by uniform random numbers."""

    def __call__(self, state, endpoint=None):
        generator = seeded(int(state.sample.sum().abs() * 1e6))
        fraction = torch.rand(len(state.sample), dtype=torch.float64, generator=generator)
        level = LevelFisher(ONE[None], ONE[None])(state)
        level._fraction = fraction
        return level


def constant(fraction):
    return LevelFisher(ONE[None], torch.tensor([fraction], dtype=torch.float64))


def bound(samples, estimator=None, law=LAW, scheduler=VP, **options):
    denoiser = OracleDenoiser(law, scheduler)
    options = BoundOptions(**{"generator": seeded(), **options})
    return denoiser_likelihood_bound(denoiser, samples, estimator or ExactFisher(law), options)


def exact(samples, out, law=LAW):
    """Returns -log p of the law, smoothed with the output's lowest noise."""
    return -law.log_density(samples, NoiseLevel(ONE, out.noise_to_signal[0]))


@pytest.fixture(scope="module")
def samples():
    return LAW.sample(6, seeded(1))


@pytest.mark.parametrize(("scheduler", "steps", "largest"), [(VP, 20, 0.04), (VP, 50, 0.015), (FLOW, 20, 0.04)])
def test_gap_above_the_exact_density(samples, scheduler, steps, largest):
    out = bound(samples, scheduler=scheduler, num_steps=steps)
    gap = (out.value - exact(samples, out)) / BIT
    error = float(out.standard_error.square().sum().sqrt()) / BIT / len(samples)
    assert bool((gap > -3 * out.standard_error / BIT).all())
    assert -3 * error < float(gap.mean()) < largest
    assert out.num_denoiser_calls == steps * 8
    assert (out.density, out.space, out.dims) == ("smoothed", "latent", 64)
    assert torch.equal(out.clamped, torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("scheduler", [VP, FLOW])
@pytest.mark.parametrize(
    "estimator", [constant(0.01), constant(1.0), constant(0.5), NoisyFisher(LAW)], ids=["0.01", "1", "0.5", "noise"]
)
def test_a_wrong_trace_loosens_the_bound_and_never_breaks_it(samples, estimator, scheduler):
    out = bound(samples, estimator, scheduler=scheduler, num_steps=10)
    assert bool((out.value > exact(samples, out) - 3 * out.standard_error).all())
    assert float((out.value - exact(samples, out)).mean()) > 0.05 * BIT  # measured with the exact trace: 0.02


def test_fractions_beyond_their_range_are_clamped_and_reported(samples):
    for fraction, nearest in ((1.7, 1.0), (-0.4, 0.0)):
        out, clamped = bound(samples, constant(fraction), num_steps=3), bound(samples, constant(nearest), num_steps=3)
        assert torch.allclose(out.value, clamped.value, rtol=1e-12)  # 1 - (1 - r) rounds
        assert torch.equal(out.clamped, torch.ones(6, dtype=torch.float64))
        assert "100.0% of the trace's values lay outside of 0 to 1" in str(out)
        assert "clamped" not in str(clamped)


@pytest.mark.parametrize("estimator", [FiniteDifferenceFisher(), AutodiffFisher()])
def test_traces_by_probes(estimator):
    """Probes make v random; the bound stays within its errors of that with the exact trace."""
    oracle = ORACLES["mixture"]
    samples = oracle.sample(4, seeded(5))
    out = bound(samples, estimator, oracle, num_probes=1, num_steps=10)
    right = bound(samples, AutodiffFisher(), oracle, num_steps=10)
    gaps = [
        each.value + oracle.log_density(samples, NoiseLevel(ONE, each.noise_to_signal[0])) for each in (right, out)
    ]
    for gap, each in zip(gaps, (right, out), strict=True):
        assert bool((gap > -3 * each.standard_error).all())
    assert float((out.value - right.value).mean()) > 0
    assert "probes per state: 1" in out.variance


def test_the_diagonal_is_tighter_where_elements_differ():
    variance = torch.logspace(-4, 1, 64, dtype=torch.float64).view(1, *SHAPE)
    law = GaussianMixture(torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.diagonal(variance))
    samples = law.sample(3, seeded(1))
    prior = {"prior_mean": 0.0, "prior_variance": variance[0]}
    isotropic, diagonal = (bound(samples, law=law, variance=name, **prior) for name in ("optimal", "diagonal"))
    gaps = [float((out.value - exact(samples, out, law)).mean()) / BIT for out in (isotropic, diagonal)]
    # The diagonal's steps are the exact posterior of this law, so that its gap is the Monte Carlo error alone.
    assert abs(gaps[1]) < 3 * float(diagonal.standard_error.square().mean().sqrt()) / BIT
    assert gaps[0] > 0.1
    assert diagonal.variance.startswith("diagonal, ExactFisher")


def test_numbers_do_not_depend_on_batch_or_order(samples):
    whole = bound(samples, num_steps=4)
    order = torch.tensor([4, 0, 3, 5, 1, 2])
    pieces = [bound(samples[rows], num_steps=4) for rows in order.split(2)]
    assert torch.allclose(torch.cat([piece.value for piece in pieces]), whole.value[order], rtol=1e-12)
    assert torch.equal(whole.value, bound(samples, num_steps=4).value)
    assert not torch.equal(whole.value, bound(samples, generator=seeded(1), num_steps=4).value)
    keys = [bound(samples[:1], keys=[key], num_steps=4).value for key in ("a", "b", "a")]
    assert torch.equal(keys[0], keys[2])
    assert not torch.equal(keys[0], keys[1])


def test_terms_and_maps_add_up(samples):
    out = bound(samples, maps=True, variance="diagonal", num_steps=4)
    assert out.maps.shape == samples.shape
    assert torch.allclose(out.maps.flatten(1).sum(1), out.value)
    assert torch.allclose(out.terms.mean(1).sum(0) + out.prior_terms, out.value)
    assert out.terms.shape == (4, 8, 6)
    assert bound(samples[:1], num_steps=1).maps is None
    assert torch.allclose(out.bits_per_dim, out.value / BIT)


# The error's estimate exceeds the scatter by up to a quarter; 60 draws know the scatter to a tenth.
def test_standard_error_is_the_scatter_of_repeated_bounds(samples):
    count = 60
    out = bound(samples[:1].expand(count, *SHAPE), keys=[str(key) for key in range(count)], num_steps=5)
    scatter, error = float(out.value.std()), float(out.standard_error.square().mean().sqrt())
    assert 0.8 * scatter < error < 1.5 * scatter
    independent = bound(samples[:1].expand(8, *SHAPE), keys=[str(key) for key in range(8)], num_steps=5, num_draws=1)
    assert scatter < 0.4 * float(
        independent.value.std()
    )  # independent draws would leave 1/sqrt(8) = 0.35 without pairs


def test_mean_over_few_draws_is_that_of_many(samples):
    """Strata and pairs have no bias."""
    keys = [str(key) for key in range(40)]
    few, many = (bound(samples[:1].expand(40, *SHAPE), keys=keys, num_steps=4, num_draws=number) for number in (2, 16))
    error = math.hypot(float(few.value.std()), float(many.value.std())) / math.sqrt(40)
    assert abs(float(few.value.mean() - many.value.mean())) < 3 * error


def test_a_bound_says_what_it_is(samples):
    out = bound(samples, num_steps=3)
    text = str(out)
    assert "Upper bound on -log p of 6 latent samples of 64 dimensions" in text
    assert "optimal, ExactFisher, no probes" in text
    assert "3 steps, 8 draws each; 24 denoiser calls" in text
    with pytest.raises(dataclasses.FrozenInstanceError):
        out.value = None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "`num_steps` is 0; allowed: at least 1"),
        ({"num_draws": 4}, "`num_draws` is 4; allowed: 1, 2, or an even number from 6 on"),
        ({"num_draws": 20_000}, "`num_draws` is 20000"),
        ({"num_draws": 7}, "`num_draws` is 7; allowed: 1, 2, or an even"),
        ({"num_probes": 0}, "`num_probes` is 0; allowed: at least 1, or None"),
        ({"keys": ["a"]}, "1 image keys were given for 6 images"),
        ({"prior_mean": 0.0}, "Give both `prior_mean` and `prior_variance`"),
        ({"variance": "large"}, "`variance` is 'large'"),
    ],
)
def test_wrong_options_are_refused(samples, options, message):
    with pytest.raises(InputError, match=message):
        bound(samples, **options)


def test_nan_never_leaves(samples):
    class Broken(FisherOperator):
        def covariance(self, v):
            return v

        def exact_diagonal(self):
            return torch.full(self.state.sample.shape, torch.nan, dtype=torch.float64), 0

    with pytest.raises(NumericalError, match=r"Unexplained noise fractions at noise-to-signal .* are not finite"):
        bound(samples, FunctionFisher(lambda state, endpoint: Broken(state)))

    class BrokenDenoiser(Denoiser):
        def model_output(self, x, timestep):
            return torch.full_like(x, torch.inf)

    with pytest.raises(NumericalError, match="Bounds are not finite"):
        denoiser_likelihood_bound(BrokenDenoiser(VP), samples, constant(0.5), BoundOptions())


# The table by noise level


def test_table_of_squared_errors_is_the_fraction_of_a_gaussian():
    law = GaussianMixture(torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.isotropic(0.3, SHAPE))
    data = law.sample(64, seeded(1))
    table = fit_level_fisher(OracleDenoiser(law, VP), data, 12, generator=seeded())
    expected = 0.3 / (0.3 + table.noise_to_signal.square())
    # relative error sqrt(2/n) with n = 64 * 64 * 2 independent numbers: 0.016
    assert bool(((table.unexplained_noise_fraction / expected - 1).abs() < 0.06).all())
    out, right = (bound(data[:4], estimator, law) for estimator in (table, ExactFisher(law)))
    assert abs(float((out.value - right.value).mean())) / BIT < 0.005


def test_table_is_linear_between_its_levels():
    table = LevelFisher(torch.tensor([0.1, 1.0, 10.0]), torch.tensor([0.9, 0.5, 0.1]))
    denoiser = OracleDenoiser(LAW, VP)
    for log_s, fraction in ((-1.1513, 0.7), (0.0, 0.5), (1.1513, 0.3), (-3.4, 0.9), (2.6, 0.1)):
        timestep = diffusers_timestep(log_s)
        state = denoiser.state(torch.zeros(2, *SHAPE, dtype=torch.float64), timestep)
        operator = table(state)
        trace = operator.trace().value * state.level.sigma**2 / 64
        assert torch.allclose(1 - trace, torch.full((2,), fraction, dtype=torch.float64), atol=1e-4)
        v = torch.ones(2, *SHAPE, dtype=torch.float64)
        assert torch.allclose(operator.matvec(v), operator.diagonal().value * v)


def diffusers_timestep(log_s):
    from diffusers_fisher.noise import timestep_at

    return timestep_at(VP, torch.tensor(log_s, dtype=torch.float64))


@pytest.mark.parametrize(
    ("levels", "fractions"), [([1.0, 0.5], [0.1, 0.2]), ([0.5, 1.0], [0.1]), ([0.5, 1.0], [0.1, math.nan]), ([], [])]
)
def test_wrong_tables_are_refused(levels, fractions):
    with pytest.raises(InputError, match=r"allowed: \(n,\) positive increasing levels, and as many finite fractions"):
        LevelFisher(torch.tensor(levels), torch.tensor(fractions))


def test_wrong_fits_of_tables_are_refused(samples):
    denoiser = OracleDenoiser(LAW, VP)
    with pytest.raises(InputError, match="`num_levels` is 1, `num_pairs` 1; allowed: at least 2, at least 1"):
        fit_level_fisher(denoiser, samples, 1)
    with pytest.raises(InputError, match="must be finite floating-point"):
        fit_level_fisher(denoiser, samples * math.nan)
