"""Exact distributions: against the dense oracle and automatic differentiation, in every shape and coordinate."""

import pytest
import torch
from cases import ORACLES, relative

from diffusers_fisher import (
    Covariance,
    DenoisingState,
    DiracMixture,
    ExactFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
)
from diffusers_fisher.noise import Prediction
from diffusers_fisher.testing import check_fisher

from .exact_cases import LAWS, LEVELS, OWN_LEVELS, TOLERANCE, D, check_posterior, noisy, normal
from .problems import COORDINATES, PACKED, Problem, apply


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
@pytest.mark.parametrize("law", LAWS)
def test_results_are_those_of_the_dense_oracle(law, level):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, level)
    check_posterior(distribution.posterior(x, level), oracle, x, level)
    for name in ("log_density", "score", "epsilon", "posterior_mean"):
        assert relative(getattr(distribution, name)(x, level), getattr(oracle, name)(x, level)) < TOLERANCE


def log_density(flat, level, means, covariances, weights):
    """Returns log q_t from torch's own distributions, for automatic differentiation."""
    total = level.alpha**2 * covariances + level.sigma**2 * torch.eye(D, dtype=torch.float64)
    modes = torch.distributions.MultivariateNormal(level.alpha * means, total, validate_args=False)
    return torch.logsumexp(modes.log_prob(flat) + weights.log(), 0)


@pytest.mark.parametrize("level", [LEVELS[name] for name in ("low noise", "middle", "pure noise")])
@pytest.mark.parametrize("law", [name for name in LAWS if name.endswith("image")])
def test_fisher_is_minus_the_hessian_of_the_log_density(law, level):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, level, count=2)
    parts = oracle.means, oracle.covariances, oracle.weights
    posterior = distribution.posterior(x, level)
    for index, one in enumerate(x.flatten(1)):
        value = log_density(one, level, *parts)
        hessian = torch.func.hessian(lambda flat: log_density(flat, level, *parts))(one)
        assert float(posterior.log_density[index] - value) == pytest.approx(0, abs=TOLERANCE * 10)
        assert relative(posterior.fisher_matrix()[index], -hessian) < TOLERANCE
        gradient = torch.func.grad(lambda flat: log_density(flat, level, *parts))(one)
        assert relative(posterior.score[index].flatten(), gradient) < TOLERANCE


@pytest.mark.parametrize("law", LAWS)
def test_every_sample_may_have_its_own_level(law):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, OWN_LEVELS)
    v = normal(*x.shape, seed=9)
    batch = distribution.posterior(x, OWN_LEVELS)
    for index in range(4):
        row = slice(index, index + 1)
        single = distribution.posterior(x[row], NoiseLevel(OWN_LEVELS.alpha[index], OWN_LEVELS.sigma[index]))
        assert relative(batch.score[row], single.score) < TOLERANCE
        assert relative(batch.mean[row], single.mean) < TOLERANCE
        assert relative(batch.log_density[row], single.log_density) < TOLERANCE
        size = float(single.fisher_matrix().norm())
        assert float((batch.fisher(v)[row] - single.fisher(v[row])).norm()) < TOLERANCE * size * float(v.norm())
        assert float((batch.covariance(v)[row] - single.covariance(v[row])).norm()) < TOLERANCE * float(v.norm())
        assert relative(batch.fisher_diagonal()[row], single.fisher_diagonal()) < TOLERANCE


@pytest.mark.parametrize("law", LAWS)
def test_many_vectors_give_the_products_of_single_vectors(law):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, LEVELS["middle"])
    posterior, vectors = distribution.posterior(x, LEVELS["middle"]), normal(70, *x.shape, seed=9)
    for product in (posterior.fisher, posterior.covariance):
        products = product(vectors)
        assert products.shape == vectors.shape
        assert relative(products, torch.stack([product(v) for v in vectors])) < TOLERANCE


# The operator at states, in every scheduler's coordinates


def exact_of(problem):
    oracle, shape = problem.oracle, problem.oracle.shape
    means = oracle.means.view(-1, *shape)
    if not oracle.covariances.any():
        return ExactFisher(DiracMixture(means, oracle.weights))
    return ExactFisher(GaussianMixture(means, Covariance.full(oracle.covariances, shape), oracle.weights))


@pytest.mark.parametrize("shape", [None, PACKED], ids=["image", "packed"])
@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("oracle", ORACLES)
def test_exact_fisher_keeps_the_contract(oracle, coordinates, shape):
    problem = Problem(oracle, coordinates, shape=shape)
    estimator = exact_of(problem)
    operator = estimator(problem.state)
    check_fisher(operator, problem.fisher, estimator=estimator, num_estimates=0)
    for estimate in (operator.trace(), operator.diagonal()):
        assert estimate.num_denoiser_calls == estimate.num_probes == 0
    assert problem.denoiser.num_calls == 1  # The state has taken one call.


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("oracle", ORACLES)
def test_output_jacobian_is_the_ideal_models(oracle, coordinates):
    problem = Problem(oracle, coordinates)
    operator, v = exact_of(problem)(problem.state), problem.vector()
    leaf = problem.sample.clone().requires_grad_()
    (expected,) = torch.autograd.grad(problem.state_at(leaf).model_output, leaf, v)
    # The 1 is for points at low noise, which predict x_0 with a Jacobian near 1e-38.
    assert float((operator.output_jacobian(v) - expected).norm()) < TOLERANCE * (1 + float(expected.norm()))


@pytest.mark.parametrize("oracle", ORACLES)
def test_stochastic_traces_of_the_exact_operator(oracle):
    problem = Problem(oracle, "v_prediction")
    check_fisher(exact_of(problem)(problem.state), problem.fisher)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("law", ["full, image", "points, image"])
def test_pure_noise_has_the_identity_as_its_fisher(law, kind):
    distribution, oracle = LAWS[law]
    x, v = noisy(oracle, LEVELS["pure noise"]), normal(4, 3, 2, 2, seed=9)
    operator = ExactFisher(distribution)(DenoisingState(x, x, LEVELS["pure noise"], Prediction(kind)))
    assert relative(operator.matvec(v), v) < TOLERANCE
    assert bool(torch.isfinite(operator.output_jacobian(v)).all())
    assert relative(operator.covariance(v), distribution.posterior(x, LEVELS["pure noise"]).covariance(v)) < TOLERANCE


@pytest.mark.parametrize("shift", [0.0, 2.5])
def test_one_gaussian_is_solved_in_closed_form(shift):
    distribution, oracle = LAWS["one Gaussian, image"]
    x, v = noisy(oracle, OWN_LEVELS), normal(4, 3, 2, 2, seed=9)
    operator = ExactFisher(distribution)(DenoisingState(x, x, OWN_LEVELS, Prediction("epsilon")))
    shifts = torch.full((4,), shift, dtype=torch.float64)
    damped = operator.dense() + shift * torch.eye(D, dtype=torch.float64)
    solution = operator.inverse_product(v, shifts)
    assert relative(solution, apply(torch.linalg.inv(damped), v)) < TOLERANCE
    assert torch.equal(operator.damped(shift).solve(v), solution)


def test_mixtures_are_solved_by_conjugate_gradients():
    distribution, oracle = LAWS["one for all, image"]
    level = LEVELS["k-diffusion"]
    x = noisy(oracle, level)
    operator = ExactFisher(distribution)(DenoisingState(x, x, level, Prediction("epsilon")))
    v = normal(*x.shape, seed=9)
    assert operator.inverse_product(v, torch.zeros(4)) is None
    assert relative(operator.matvec(operator.solve(v)), v) < 1e-5  # The tolerance of the solver is 1e-6.


@pytest.mark.parametrize("law", ["low rank, image", "points, image"])
def test_results_have_the_samples_dtype_and_no_graph(law):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, LEVELS["middle"]).float().requires_grad_()
    posterior = distribution.posterior(x, LEVELS["middle"])
    for value in (posterior.mean, posterior.score, posterior.covariance(x), posterior.fisher_matrix()):
        assert value.dtype is torch.float32
        assert not value.requires_grad
    for value in (posterior.log_density, posterior.fisher_trace(), posterior.fisher_diagonal()):
        assert value.dtype is torch.float64
    assert relative(posterior.score, oracle.score(x.double(), LEVELS["middle"])) < 1e-6


def test_modes_that_do_not_fit_are_taken_in_pieces():
    for law in ("isotropic, image", "low rank, image", "full, image"):
        distribution, oracle = LAWS[law]
        small = GaussianMixture(distribution.means, distribution.covariance, distribution.weights, memory=1)
        x = noisy(oracle, LEVELS["flow"])
        check_posterior(small.posterior(x, LEVELS["flow"]), oracle, x, LEVELS["flow"])


# Draws


@pytest.mark.parametrize("law", LAWS)
def test_draws_have_the_laws_mean_and_covariance(law):
    distribution, oracle = LAWS[law]
    count = 20000
    draws = distribution.sample(count, torch.Generator().manual_seed(0)).flatten(1)
    mean = oracle.weights @ oracle.means
    centred = oracle.means - mean
    covariance = torch.einsum("k,kd,ke->de", oracle.weights, centred, centred)
    covariance = covariance + torch.einsum("k,kde->de", oracle.weights, oracle.covariances)
    error = (covariance.diagonal() / count).sqrt()
    assert 0 < float(((draws.mean(0) - mean) / error).abs().max()) < 5
    assert 0 < float((torch.cov(draws.T) - covariance).abs().max()) < 0.1 * float(covariance.diagonal().max())
    repeat = distribution.sample(5, torch.Generator().manual_seed(0))
    assert repeat.shape == (5, *distribution.shape)
    assert torch.equal(repeat, distribution.sample(5, torch.Generator().manual_seed(0)))
    assert not torch.equal(repeat, distribution.sample(5, torch.Generator().manual_seed(1)))


# Errors

X = normal(2, 3, 2, 2)
MEANS = normal(3, 3, 2, 2, seed=1)
ISOTROPIC = Covariance.isotropic(0.1, (3, 2, 2))


@pytest.mark.parametrize("law", ["isotropic, image", "points, image"])
@pytest.mark.parametrize(
    ("x", "level", "message"),
    [
        (X.half(), LEVELS["middle"], r"dtype torch.float16; allowed: float32, float64. Pass x.float\(\)"),
        (X.bfloat16(), LEVELS["middle"], "dtype torch.bfloat16"),
        (X.int(), LEVELS["middle"], "dtype torch.int32"),
        (X[0], LEVELS["middle"], r"shape \(3, 2, 2\); allowed: \(B, 3, 2, 2\)"),
        (X.flatten(1), LEVELS["middle"], r"shape \(2, 12\); allowed: \(B, 3, 2, 2\)"),
        (X[:0], LEVELS["middle"], r"shape \(0, 3, 2, 2\); allowed"),
        (X / 0, LEVELS["middle"], "NaN or infinity"),
        (X, NoiseLevel(torch.ones(()), torch.zeros(())), "sigma above 0. Points without noise have no density"),
        (X, NoiseLevel(torch.ones(2), torch.tensor([0.1, 0.0])), "sigma above 0"),
        (X, NoiseLevel(-torch.ones(()), torch.ones(())), "alpha of 0 or more"),
        (X, OWN_LEVELS, r"level has shape \(4,\) for 2 samples"),
    ],
)  # fmt: skip
def test_bad_samples_and_levels_are_refused(law, x, level, message):
    with pytest.raises(InputError, match=message):
        LAWS[law][0].posterior(x, level)


def test_states_and_vectors_of_another_shape_are_refused():
    distribution = LAWS["points, image"][0]
    level = LEVELS["middle"]
    with pytest.raises(InputError, match=r"shape \(2, 12\); allowed: \(B, 3, 2, 2\)"):
        ExactFisher(distribution)(DenoisingState(X.flatten(1), X.flatten(1), level, Prediction("epsilon")))
    operator = ExactFisher(distribution)(DenoisingState(X, X, level, Prediction("epsilon")))
    for product in (operator.matvec, operator.covariance):
        with pytest.raises(InputError, match=r"vector has shape \(1, 3, 2, 2\); allowed: \(2, 3, 2"):
            product(X[:1])
    with pytest.raises(InputError, match=r"Vectors have shape \(5, 3, 2, 2\); allowed: \(..., 2, 3, 2, 2\)"):
        operator.posterior.covariance(torch.ones(5, 3, 2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianMixture(MEANS.half(), ISOTROPIC),
            r"`means` has dtype torch.float16; allowed: float32, float64. Pass means.float\(\)",
        ),
        (lambda: GaussianMixture(MEANS / 0, ISOTROPIC), "`means` holds NaN or infinity"),
        (lambda: GaussianMixture(MEANS[0, 0, 0], ISOTROPIC), r"allowed: \(K, \*shape\). Pass mean\[None\] for one"),
        (lambda: GaussianMixture(MEANS[:0], ISOTROPIC), r"Means have shape \(0, 3, 2, 2\)"),
        (lambda: GaussianMixture(MEANS.flatten(1), ISOTROPIC), r"covariance has 1 modes of shape \(3, 2, 2\)"),
        (lambda: GaussianMixture(MEANS, Covariance.isotropic(torch.ones(2), (3, 2, 2))), "covariance has 2 modes"),
        (lambda: GaussianMixture(MEANS, ISOTROPIC, torch.tensor([0.5, 0.6, 0.2])), "the sum 1.3"),
        (lambda: GaussianMixture(MEANS, ISOTROPIC, torch.tensor([1.5, -0.6, 0.1])), "the smallest is -0.6"),
        (lambda: GaussianMixture(MEANS, ISOTROPIC, torch.tensor([0.5, 0.5])), r"allowed: \(3,\) of floats"),
        (lambda: GaussianMixture(MEANS, ISOTROPIC).sample(0, torch.Generator()), "`count` is 0; allowed: 1 or more"),
        (lambda: DiracMixture(MEANS[:0]), "holds 0 points"),
        (lambda: DiracMixture(torch.zeros(3)), r"shape \(\); allowed: \(N, \*shape\)"),
        (lambda: DiracMixture(torch.zeros(3, 0)), r"points of shape \(0,\)"),
        (lambda: DiracMixture(MEANS / 0), "Points 0 to 2 hold NaN or infinity"),
        (lambda: DiracMixture(MEANS.int()), "Points have dtype torch.int32; allowed: torch.float16"),
        (lambda: DiracMixture(MEANS, torch.ones(3)), "must be positive and sum to one; the smallest is 1, the sum 3"),
        (lambda: DiracMixture(MEANS, torch.tensor([0.5, 0.5, 0.0])), "the smallest is 0"),
        (lambda: DiracMixture(MEANS, torch.tensor([1, 0, 0])), "dtype torch.int64"),
        (lambda: DiracMixture(MEANS, torch.full((3,), torch.nan)), "the smallest is nan"),
        (lambda: DiracMixture(MEANS, memory=100), r"`memory` is 100 bytes; allowed: \d+ or more, for one row of 12"),
        (lambda: DiracMixture(MEANS, chunk_rows=0), "`chunk_rows` is 0; allowed: 1 or more, or None"),
        (lambda: DiracMixture([]), "bank has no file"),
    ],
)
def test_bad_distributions_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
