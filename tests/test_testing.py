"""The oracles against automatic differentiation, closed forms written out here, and moments of their draws."""

import math

import diffusers
import pytest
import torch
from cases import ORACLE_SHAPE, ORACLES, relative
from torch.distributions import MultivariateNormal

from diffusers_fisher import DenoisingState, InputError, NoiseLevel
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

# Float64, conditioned by inverting C_k (condition number below 1e3) and by exponentials of log densities below 1e3.
TOLERANCE = 1e-10
LEVELS = {
    name: NoiseLevel(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    for name, alpha, sigma in (
        ("low noise", 0.99, 0.15), ("middle", 0.8, 0.6), ("high noise", 0.1, math.sqrt(0.99)),
        ("k-diffusion", 1.0, 3.0), ("flow", 0.4, 0.6), ("pure noise", 0.0, 1.0),
    )
}  # fmt: skip


def noisy(oracle, level, count=4):
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(count, *ORACLE_SHAPE, generator=generator, dtype=torch.float64)
    return level.alpha * oracle.sample(count, generator) + level.sigma * noise


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
@pytest.mark.parametrize("oracle", ORACLES.values(), ids=list(ORACLES))
class TestEveryOracleAtEveryLevel:
    def test_score_is_the_gradient_of_the_log_density(self, oracle, level):
        x = noisy(oracle, level).requires_grad_()
        (gradient,) = torch.autograd.grad(oracle.log_density(x, level).sum(), x)
        assert relative(oracle.score(x, level), gradient) < TOLERANCE
        assert relative(oracle.epsilon(x, level), -level.sigma * gradient) < TOLERANCE

    def test_fisher_is_minus_the_hessian_of_the_log_density(self, oracle, level):
        x = noisy(oracle, level)
        for point, fisher in zip(x, oracle.fisher(x, level), strict=True):
            hessian = torch.func.hessian(lambda flat: oracle.log_density(flat.view(1, *ORACLE_SHAPE), level)[0])
            assert relative(fisher, -hessian(point.flatten())) < TOLERANCE

    def test_fisher_is_symmetric_and_trace_is_its_diagonals_sum(self, oracle, level):
        x = noisy(oracle, level)
        fisher = oracle.fisher(x, level)
        assert relative(fisher, fisher.mT) < TOLERANCE
        assert relative(oracle.trace(x, level), fisher.diagonal(dim1=1, dim2=2).sum(1)) < TOLERANCE

    def test_posterior_mean_obeys_tweedie(self, oracle, level):
        x = noisy(oracle, level)
        rebuilt = level.alpha * oracle.posterior_mean(x, level) + level.sigma * oracle.epsilon(x, level)
        assert relative(rebuilt, x) < TOLERANCE

    def test_fisher_is_the_posterior_covariances(self, oracle, level):
        x = noisy(oracle, level)
        alpha, sigma = level.alpha, level.sigma
        covariance = oracle.posterior_covariance(x, level)
        identity = torch.eye(6, dtype=torch.float64).expand_as(covariance)
        from_covariance = identity / sigma**2 - alpha**2 / sigma**4 * covariance
        # The difference cancels where the posterior is wide, so the error is relative to its terms.
        error = (oracle.fisher(x, level) - from_covariance).norm() / (identity / sigma**2).norm()
        assert float(error) < TOLERANCE

    def test_batch_invariance(self, oracle, level):
        x = noisy(oracle, level)
        for name in ("log_density", "score", "posterior_mean", "fisher", "posterior_covariance"):
            function = getattr(oracle, name)
            assert relative(function(x, level)[2:3], function(x[2:3], level)) < TOLERANCE


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
def test_gaussian_in_closed_form(level):
    oracle = ORACLES["gaussian"]
    mean, covariance = oracle.means[0], oracle.covariances[0]
    x, alpha, sigma = noisy(oracle, level), level.alpha, level.sigma
    total = alpha**2 * covariance + sigma**2 * torch.eye(6, dtype=torch.float64)
    centred = x.flatten(1) - alpha * mean
    solved = torch.linalg.solve(total, centred.mT).mT
    assert relative(oracle.log_density(x, level), MultivariateNormal(alpha * mean, total).log_prob(x.flatten(1))) < (
        TOLERANCE
    )
    assert relative(oracle.score(x, level).flatten(1), -solved) < TOLERANCE
    assert relative(oracle.fisher(x, level), total.inverse().expand(4, 6, 6)) < TOLERANCE
    gain = alpha * covariance @ total.inverse()
    assert relative(oracle.posterior_mean(x, level).flatten(1), mean + centred @ gain.mT) < TOLERANCE
    posterior_covariance = covariance - alpha * gain @ covariance
    assert relative(oracle.posterior_covariance(x, level), posterior_covariance.expand(4, 6, 6)) < TOLERANCE


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
def test_points_in_closed_form(level):
    """The reference is the outer-product form, computed for one sample and one point at a time."""
    oracle = ORACLES["points"]
    x, alpha, sigma = noisy(oracle, level), level.alpha, level.sigma
    for index, point in enumerate(x.flatten(1)):
        exponents = [-float((point - alpha * y).square().sum()) / (2 * float(sigma) ** 2) for y in oracle.means]
        weights = torch.softmax(oracle.weights.log() + torch.tensor(exponents, dtype=torch.float64), 0)
        mean = sum(w * y for w, y in zip(weights, oracle.means, strict=True))
        spread = sum(w * torch.outer(y - mean, y - mean) for w, y in zip(weights, oracle.means, strict=True))
        assert relative(oracle.posterior_mean(x, level)[index].flatten(), mean) < TOLERANCE
        error = (oracle.posterior_covariance(x, level)[index] - spread).norm()
        assert float(error) < TOLERANCE  # absolute, because the spread is zero near one point
        fisher = torch.eye(6, dtype=torch.float64) / sigma**2 - alpha**2 / sigma**4 * spread
        assert relative(oracle.fisher(x, level)[index], fisher) < TOLERANCE


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
def test_mixture_density_is_the_weighted_sum_of_its_modes(level):
    oracle = ORACLES["mixture"]
    x, alpha, sigma = noisy(oracle, level), level.alpha, level.sigma
    density = 0
    for weight, mean, covariance in zip(oracle.weights, oracle.means, oracle.covariances, strict=True):
        total = alpha**2 * covariance + sigma**2 * torch.eye(6, dtype=torch.float64)
        density = density + weight * MultivariateNormal(alpha * mean, total).log_prob(x.flatten(1)).exp()
    assert relative(oracle.log_density(x, level), density.log()) < TOLERANCE


# Statistics of 20,000 seeded draws against the quantiles 0.001 and 0.999 of their chi-square law, on both sides:
# a wrong moment makes them huge, a statistic that measures nothing makes them tiny.
COUNT = 20_000
CHI_SQUARE = {4: (0.091, 18.5), 6: (0.381, 22.5), 21: (6.45, 46.8)}


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=list(ORACLES))
def test_draws_have_the_distributions_mean(oracle):
    draws = oracle.sample(COUNT, torch.Generator().manual_seed(0)).flatten(1)
    assert draws.shape == (COUNT, 6)
    mean = oracle.weights @ oracle.means
    centred = oracle.means - mean
    covariance = torch.einsum("k,kde->de", oracle.weights, oracle.covariances + centred[:, :, None] * centred[:, None])
    difference = draws.mean(0) - mean
    degrees = int(torch.linalg.matrix_rank(covariance))
    low, high = CHI_SQUARE[degrees]
    assert low < COUNT * float(difference @ torch.linalg.pinv(covariance, hermitian=True) @ difference) < high


def test_draws_of_a_gaussian_have_its_covariance():
    oracle = ORACLES["gaussian"]
    draws = oracle.sample(COUNT, torch.Generator().manual_seed(0)).flatten(1)
    root = torch.linalg.cholesky(oracle.covariances[0])
    whitened = torch.linalg.solve_triangular(root, torch.cov(draws.mT), upper=False)
    whitened = torch.linalg.solve_triangular(root, whitened.mT, upper=False)
    low, high = CHI_SQUARE[21]
    assert low < COUNT / 2 * float((whitened - torch.eye(6)).square().sum()) < high


def test_draws_of_points_are_the_points_at_their_weights():
    oracle = ORACLES["points"]
    draws = oracle.sample(COUNT, torch.Generator().manual_seed(0)).flatten(1)
    matches = (draws[:, None] == oracle.means).all(-1)
    assert bool((matches.sum(1) == 1).all())
    expected = COUNT * oracle.weights
    low, high = CHI_SQUARE[4]
    assert low < float(((matches.sum(0) - expected).square() / expected).sum()) < high


def test_draws_depend_on_the_generator_alone():
    oracle = ORACLES["mixture"]
    first, repeat, other = (oracle.sample(5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, repeat)
    assert not torch.equal(first, other)


DENOISED = [
    ("DDIMScheduler", "epsilon", 300), ("DDIMScheduler", "v_prediction", 300), ("DDIMScheduler", "sample", 300),
    ("EulerDiscreteScheduler", "v_prediction", 300), ("EDMEulerScheduler", "epsilon", -0.2),
    ("EDMEulerScheduler", "v_prediction", -0.2), ("FlowMatchEulerDiscreteScheduler", None, 300.0),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kind", "t"), DENOISED)
def test_oracle_denoiser_has_the_schedulers_prediction_type(name, kind, t):
    oracle, cls = ORACLES["mixture"], getattr(diffusers, name)
    scheduler = cls() if kind is None else cls(prediction_type=kind)
    denoiser = OracleDenoiser(oracle, scheduler)
    level = denoiser.level(t)
    x = noisy(oracle, level)
    state = DenoisingState(x, denoiser.model_output(x, t), level, denoiser.prediction)
    assert relative(state.epsilon, oracle.epsilon(x, level)) < TOLERANCE
    assert relative(state.pred_original_sample, oracle.posterior_mean(x, level)) < TOLERANCE
    assert relative(denoiser(x, t), oracle.epsilon(x, level)) < TOLERANCE
    assert denoiser.num_calls == 2


MEANS, COVARIANCES = torch.zeros(2, 1, 3), torch.eye(3).expand(2, 3, 3)


@pytest.mark.parametrize(
    ("covariances", "weights", "message"),
    [
        (COVARIANCES[:1], None, r"2 means of 3 dimensions, covariances \(1, 3, 3\).*allowed: \(2, 3, 3\)"),
        (COVARIANCES, torch.ones(3) / 3, r"weights \(3,\); allowed: \(2, 3, 3\) and \(2,\)"),
        (COVARIANCES, torch.ones(2), "positive and sum to one, got a sum of 2.0"),
        (COVARIANCES, torch.tensor([1.5, -0.5]), "positive and sum to one"),
    ],
)
def test_bad_mixtures_are_refused(covariances, weights, message):
    with pytest.raises(InputError, match=message):
        MixtureOracle(MEANS, covariances, weights)


def test_levels_per_sample_are_refused():
    level = NoiseLevel(torch.full((2,), 0.8, dtype=torch.float64), torch.full((2,), 0.6, dtype=torch.float64))
    with pytest.raises(InputError, match=r"one noise level per call, got levels of shape \(2,\)"):
        ORACLES["mixture"].score(torch.zeros(2, *ORACLE_SHAPE, dtype=torch.float64), level)
