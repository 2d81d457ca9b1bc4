"""Exact distributions: against the dense oracle and automatic differentiation, in every storage, dtype and shape."""

import math

import numpy
import pytest
import torch
from cases import ORACLES, latents, relative
from safetensors.torch import save_file

from diffusers_fisher import (
    CheckpointError,
    Covariance,
    DCTBasis,
    DenoisingState,
    DiracMixture,
    ExactFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
)
from diffusers_fisher.fisher import points as points_module
from diffusers_fisher.noise import Prediction
from diffusers_fisher.testing import MixtureOracle, check_fisher

from .problems import COORDINATES, PACKED, Problem, apply

# Float64, conditioned by inverting C_k (condition number below 1e4) and by exponentials of log densities below 1e3.
TOLERANCE = 1e-10
D = 12
SHAPES = {"image": (3, 2, 2), "packed": (6, 2)}
LEVELS = {
    name: NoiseLevel(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    for name, alpha, sigma in (
        ("low noise", 0.99, 0.15), ("middle", 0.8, 0.6), ("high noise", 0.1, math.sqrt(0.99)),
        ("k-diffusion", 1.0, 3.0), ("flow", 0.4, 0.6), ("pure noise", 0.0, 1.0),
    )
}  # fmt: skip
OWN_LEVELS = NoiseLevel(
    torch.tensor([0.99, 0.8, 0.1, 0.0], dtype=torch.float64), torch.tensor([0.15, 0.6, 2.0, 1.0], dtype=torch.float64)
)


def normal(*shape, seed=0):
    return latents(shape=shape, seed=seed)


def laws(shape):
    """name -> (distribution, its dense oracle)."""
    means, weights = normal(3, *shape, seed=1), torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    variances, factor = normal(3, *shape, seed=2).exp() * 0.1, normal(3, *shape, 2, seed=3) * 0.3
    root = normal(3, D, D, seed=4) * 0.2
    covariances = {
        "isotropic": Covariance.isotropic(torch.tensor([0.1, 0.3, 0.02], dtype=torch.float64), shape),
        "one for all": Covariance.isotropic(0.1, shape),
        "diagonal": Covariance.diagonal(variances),
        "DCT": Covariance.diagonal(variances, DCTBasis(shape)),
        "low rank": Covariance.low_rank(variances, factor),
        "full": Covariance.full(root @ root.mT + 0.02 * torch.eye(D, dtype=torch.float64), shape),
    }
    table = {}
    for name, covariance in covariances.items():
        dense = covariance.dense().expand(3, -1, -1)
        table[name] = (GaussianMixture(means, covariance, weights), MixtureOracle(means, dense, weights))
    single = covariances["low rank"].select(torch.tensor([1]))
    table["one Gaussian"] = (GaussianMixture(means[:1], single), MixtureOracle(means[:1], single.dense()))
    points, shares = normal(7, *shape, seed=5), normal(7, seed=6).softmax(0)
    table["points"] = (DiracMixture(points, shares), MixtureOracle.points(points, shares))
    table["equal points"] = (DiracMixture(points), MixtureOracle.points(points))
    return table


LAWS = {f"{name}, {kind}": pair for kind, shape in SHAPES.items() for name, pair in laws(shape).items()}


def noisy(oracle, level, count=4, seed=2):
    generator = torch.Generator().manual_seed(seed)
    clean = oracle.sample(count, generator)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    alpha, sigma = (value.reshape(-1, *[1] * (clean.ndim - 1)) for value in (level.alpha, level.sigma))
    return alpha * clean + sigma * noise


def check_posterior(posterior, oracle, x, level, tolerance=TOLERANCE):
    """Everything a posterior gives, products relative to the size of F's and C's own terms."""
    v = normal(*x.shape, seed=9)
    assert float((posterior.log_density - oracle.log_density(x, level)).abs().max()) < tolerance * 100
    assert relative(posterior.score, oracle.score(x, level)) < tolerance
    assert relative(posterior.epsilon, oracle.epsilon(x, level)) < tolerance
    assert relative(posterior.mean, oracle.posterior_mean(x, level)) < tolerance
    fisher, covariance = oracle.fisher(x, level), oracle.posterior_covariance(x, level)
    size, spread = float(fisher.norm()), float(oracle.means.square().sum(1).max())
    assert float((posterior.fisher_matrix() - fisher).norm()) < tolerance * size
    assert float((posterior.fisher(v) - apply(fisher, v)).norm()) < tolerance * size * float(v.norm())
    assert float((posterior.covariance(v) - apply(covariance, v)).norm()) < tolerance * spread * float(v.norm())
    for value, matrix, unit in (
        (posterior.fisher_diagonal(), fisher, size),
        (posterior.covariance_diagonal(), covariance, spread),
    ):
        assert float((value.flatten(1) - matrix.diagonal(dim1=1, dim2=2)).norm()) < tolerance * unit
    traces = covariance.diagonal(dim1=1, dim2=2).sum(1)
    assert float((posterior.covariance_trace() - traces).abs().max()) < tolerance * spread * D
    assert float((posterior.fisher_trace() - oracle.trace(x, level)).abs().max()) < tolerance * size * D


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
@pytest.mark.parametrize("law", LAWS)
def test_everything_is_the_dense_oracles(law, level):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, level)
    check_posterior(distribution.posterior(x, level), oracle, x, level)
    for name in ("log_density", "score", "epsilon", "posterior_mean"):
        assert relative(getattr(distribution, name)(x, level), getattr(oracle, name)(x, level)) < TOLERANCE


def log_density(flat, level, means, covariances, weights):
    """log q_t written out with torch's own distributions, for automatic differentiation."""
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
    together = distribution.posterior(x, OWN_LEVELS)
    for index in range(4):
        one = slice(index, index + 1)
        alone = distribution.posterior(x[one], NoiseLevel(OWN_LEVELS.alpha[index], OWN_LEVELS.sigma[index]))
        assert relative(together.score[one], alone.score) < TOLERANCE
        assert relative(together.mean[one], alone.mean) < TOLERANCE
        assert relative(together.log_density[one], alone.log_density) < TOLERANCE
        size = float(alone.fisher_matrix().norm())
        assert float((together.fisher(v)[one] - alone.fisher(v[one])).norm()) < TOLERANCE * size * float(v.norm())
        assert float((together.covariance(v)[one] - alone.covariance(v[one])).norm()) < TOLERANCE * float(v.norm())
        assert relative(together.fisher_diagonal()[one], alone.fisher_diagonal()) < TOLERANCE


@pytest.mark.parametrize("law", LAWS)
def test_many_vectors_are_one_after_the_other(law):
    distribution, oracle = LAWS[law]
    x = noisy(oracle, LEVELS["middle"])
    posterior, vectors = distribution.posterior(x, LEVELS["middle"]), normal(70, *x.shape, seed=9)
    for product in (posterior.fisher, posterior.covariance):
        together = product(vectors)
        assert together.shape == vectors.shape
        assert relative(together, torch.stack([product(v) for v in vectors])) < TOLERANCE


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
    assert problem.denoiser.num_calls == 1  # the state's own


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("oracle", ORACLES)
def test_output_jacobian_is_the_ideal_models(oracle, coordinates):
    problem = Problem(oracle, coordinates)
    operator, v = exact_of(problem)(problem.state), problem.vector()
    leaf = problem.sample.clone().requires_grad_()
    (expected,) = torch.autograd.grad(problem.state_at(leaf).model_output, leaf, v)
    # Points at low noise predict x_0 with a Jacobian near 1e-38, hence the one.
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
    closed = operator.inverse_product(v, shifts)
    assert relative(closed, apply(torch.linalg.inv(damped), v)) < TOLERANCE
    assert torch.equal(operator.damped(shift).solve(v), closed)


def test_mixtures_are_solved_by_conjugate_gradients():
    distribution, oracle = LAWS["one for all, image"]
    level = LEVELS["k-diffusion"]
    x = noisy(oracle, level)
    operator = ExactFisher(distribution)(DenoisingState(x, x, level, Prediction("epsilon")))
    v = normal(*x.shape, seed=9)
    assert operator.inverse_product(v, torch.zeros(4)) is None
    assert relative(operator.matvec(operator.solve(v)), v) < 1e-5  # the solver's own tolerance is 1e-6


# Points in chunks, however their covariances are kept

BANK = 403


def bank(dtype=torch.float64, count=BANK):
    """Points with near neighbours, so that posteriors rest on several of them at low noise."""
    centres = normal(31, 3, 2, 2, seed=7).repeat(count // 31, 1, 1, 1)
    return (centres + 0.05 * normal(len(centres), 3, 2, 2, seed=8)).to(dtype)


REPRESENTATIONS = {  # what `PointPosterior` says of itself: pairs, kept weights or neither
    "pairs": ({}, {}),
    "kept": ({}, {"MIN_PAIRS": 0, "PAIRS_SHARE": 10**9}),
    "computed again": ({"memory": 20000}, {}),
}


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("rows", [None, 1, 57, 403, 1000])
def test_chunks_and_representations_change_nothing(representation, rows, level, monkeypatch):
    arguments, constants = REPRESENTATIONS[representation]
    for name, value in constants.items():
        monkeypatch.setattr(points_module, name, value)
    weights = normal(BANK, seed=6).softmax(0)
    oracle = MixtureOracle.points(bank(), weights)
    posterior = DiracMixture(bank(), weights, chunk_rows=rows, **arguments)
    x = noisy(oracle, level)
    posterior = posterior.posterior(x, level)
    check_posterior(posterior, oracle, x, level)
    assert (posterior._pairs is not None) == (representation == "pairs")
    assert (posterior._kept is not None) == (representation == "kept")


def write_npy(folder, data):
    numpy.save(folder / "bank.npy", data.numpy())
    return {"points": folder / "bank.npy"}


def write_memmap(folder, data):
    numpy.save(folder / "bank.npy", data.numpy())
    return {"points": numpy.load(folder / "bank.npy", mmap_mode="r")}


def write_safetensors(folder, data):
    save_file({"latents": data}, folder / "bank.safetensors")
    return {"points": str(folder / "bank.safetensors")}


def write_named(folder, data):
    save_file({"latents": data, "labels": torch.zeros(3)}, folder / "bank.safetensors")
    return {"points": folder / "bank.safetensors", "name": "latents"}


def write_several(folder, data):
    numpy.save(folder / "a.npy", data[:100].numpy())
    save_file({"x": data[100:101].contiguous()}, folder / "b.safetensors")
    numpy.save(folder / "c.npy", data[101:].numpy())
    return {"points": [folder / "a.npy", folder / "b.safetensors", folder / "c.npy"]}


def array(folder, data):
    return {"points": data.numpy()}


STORAGES = [write_npy, write_memmap, write_safetensors, write_named, write_several, array]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("storage", STORAGES)
def test_banks_in_files_give_what_they_give_in_memory(storage, dtype, tmp_path):
    data, level = bank(dtype), LEVELS["middle"]
    x = noisy(MixtureOracle.points(bank()), level).to(dtype)
    v = normal(*x.shape, seed=9).to(dtype)
    reference = DiracMixture(data).posterior(x, level)
    weights = torch.full((BANK,), 1 / BANK, dtype=torch.float64)
    for arguments in ({}, {"chunk_rows": 57}, {"memory": 20000}, {"weights": weights}):
        distribution = DiracMixture(**storage(tmp_path, data), **arguments)
        posterior = distribution.posterior(x, level)
        assert (distribution.count, distribution.shape) == (BANK, (3, 2, 2))
        for name in ("mean", "score", "log_density"):
            assert relative(getattr(posterior, name), getattr(reference, name)) < 1e-6
        assert relative(posterior.covariance(v), reference.covariance(v)) < 1e-6
        assert relative(posterior.fisher_trace(), reference.fisher_trace()) < 1e-6
    draws = distribution.sample(20, torch.Generator().manual_seed(0))
    assert draws.dtype is dtype
    assert all(any(torch.equal(draw, point) for point in data) for draw in draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [lambda folder, data: {"points": data}, write_safetensors])
def test_banks_in_half_precision_are_widened(storage, dtype, tmp_path):
    data, level = bank(dtype), LEVELS["middle"]
    x = noisy(MixtureOracle.points(bank()), level).float()
    distribution = DiracMixture(**storage(tmp_path, data), chunk_rows=57)
    reference = MixtureOracle.points(data.double())
    assert relative(distribution.score(x, level), reference.score(x.double(), level)) < 1e-5  # float32
    assert distribution.sample(2, torch.Generator().manual_seed(0)).dtype is torch.float32


def test_a_bank_is_never_read_whole(tmp_path, monkeypatch):
    """Ten times the memory: every slice that is read, with what stands beside it, is within the memory given."""
    data = normal(4030, 3, 2, 2, seed=7)
    memory, reads = data.numel() * 8 // 10, []
    distribution = DiracMixture(**write_npy(tmp_path, data), memory=memory)
    read = distribution.bank.read
    monkeypatch.setattr(distribution.bank, "read", lambda *rows: reads.append(rows[1] - rows[0]) or read(*rows))
    x = noisy(MixtureOracle.points(data[:10]), LEVELS["middle"])
    posterior = distribution.posterior(x, LEVELS["middle"])
    posterior.covariance(x)
    posterior.fisher_trace()
    assert 3 * 4030 <= sum(reads) < 4 * 4030  # once a posterior, once a product, and a look for few points
    assert max(reads) * 12 * 8 < memory // 4


# Precision


def clustered(count=6000, dimensions=64):
    """Far clusters of 20 points nearer to each other than the smallest sigma, which all carry weight."""
    centres = 1.5 * normal(count // 20, dimensions, seed=3).repeat_interleave(20, 0)
    return (centres + 0.01 * normal(count, dimensions, seed=4)).float()


def stable_diffusion_level(timestep):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)[timestep]
    return NoiseLevel(kept.sqrt(), (1 - kept).sqrt())


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("timestep", [0, 10, 50, 150, 400, 700, 999])
def test_float32_is_as_good_as_float64_at_every_level(timestep, offset):
    level, data = stable_diffusion_level(timestep), clustered() + offset
    chosen = data[::401].double()
    x = (level.alpha * chosen + level.sigma * normal(*chosen.shape, seed=5)).float()
    v = normal(*x.shape, seed=9).float()
    narrow, wide = DiracMixture(data).posterior(x, level), DiracMixture(data.double()).posterior(x.double(), level)
    # Rounding of the centred rows, 6e-8 times their norm of 12, is measured against sigma sqrt(d) = 0.2 in the score.
    tolerance = 1e-5
    assert narrow.mean.dtype is narrow.covariance(v).dtype is torch.float32
    assert narrow.log_density.dtype is torch.float64
    assert relative(narrow.mean, wide.mean) < 1e-6
    assert relative(narrow.score, wide.score) < tolerance
    assert float((narrow.log_density - wide.log_density).abs().max()) < 1e-4
    unit = float(level.noise_to_signal) ** 2
    difference = narrow.covariance(v).double() - wide.covariance(v.double())
    assert float(difference.norm()) < tolerance * unit * float(v.norm())
    assert relative(narrow.fisher_trace(), wide.fisher_trace()) < tolerance


def test_logits_of_near_points_are_computed_again(monkeypatch):
    """What the test above measures is there to be lost: without the second look at near points it is."""
    level, data = stable_diffusion_level(0), clustered()
    chosen = data[::401].double()
    x = (level.alpha * chosen + level.sigma * normal(*chosen.shape, seed=5)).float()
    exact = DiracMixture(data.double()).score(x.double(), level)
    monkeypatch.setattr(points_module, "LOGIT_ERROR", torch.inf)
    assert relative(DiracMixture(data).score(x, level), exact) > 1e-4


def test_reduced_precision_products_and_autocast_are_kept_out():
    level, data = stable_diffusion_level(400), clustered()
    x = (level.alpha * data[::401].double() + level.sigma * normal(15, 64, seed=5)).float()
    law = GaussianMixture(data[:3], Covariance.isotropic(0.1, (64,)))
    before = [DiracMixture(data).posterior(x, level), law.posterior(x, level)]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = [DiracMixture(data).posterior(x, level), law.posterior(x, level)]
            for one, other in zip(before, after, strict=True):
                assert relative(other.score, one.score) < 1e-6
                assert relative(other.covariance(x), one.covariance(x)) < 1e-5
    finally:
        torch.set_float32_matmul_precision(precision)


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
    again = distribution.sample(5, torch.Generator().manual_seed(0))
    assert again.shape == (5, *distribution.shape)
    assert torch.equal(again, distribution.sample(5, torch.Generator().manual_seed(0)))
    assert not torch.equal(again, distribution.sample(5, torch.Generator().manual_seed(1)))


# What is refused

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
        (X / 0, LEVELS["middle"], "NaN or infinity"),
        (X, NoiseLevel(torch.ones(()), torch.zeros(())), "sigma above 0. Without noise points have no density"),
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
        with pytest.raises(InputError, match=r"vector has shape \(1, 3, 2, 2\); the operator's state has \(2, 3, 2"):
            product(X[:1])
    with pytest.raises(InputError, match=r"Vectors have shape \(5, 3, 2, 2\); allowed: \(..., 2, 3, 2, 2\)"):
        operator.posterior.covariance(torch.ones(5, 3, 2, 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GaussianMixture(MEANS.half(), ISOTROPIC),
            "Means have dtype torch.float16; allowed: float32, float64",
        ),
        (lambda: GaussianMixture(MEANS / 0, ISOTROPIC), "Means hold NaN or infinity"),
        (lambda: GaussianMixture(MEANS[0, 0, 0], ISOTROPIC), r"allowed: \(K, \*shape\), one Gaussian as mean\[None\]"),
        (lambda: GaussianMixture(MEANS[:0], ISOTROPIC), r"Means have shape \(0, 3, 2, 2\)"),
        (lambda: GaussianMixture(MEANS.flatten(1), ISOTROPIC), r"covariance is of 1 modes of shape \(3, 2, 2\)"),
        (lambda: GaussianMixture(MEANS, Covariance.isotropic(torch.ones(2), (3, 2, 2))), "is of 2 modes"),
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


def test_bad_files_are_refused(tmp_path):
    data = bank()
    (tmp_path / "words.txt").write_text("no bank")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01")
    numpy.save(tmp_path / "short.npy", data.numpy())
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-100])
    numpy.save(tmp_path / "integers.npy", numpy.zeros((3, 2), dtype=numpy.int64))
    numpy.save(tmp_path / "swapped.npy", numpy.zeros((3, 2), dtype=">f4"))
    numpy.save(tmp_path / "good.npy", data.numpy())
    numpy.save(tmp_path / "flat.npy", data.flatten(1).numpy())
    write_named(tmp_path, data)
    save_file({"x": torch.zeros(3, 2, dtype=torch.int32)}, tmp_path / "integers.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    for name in ("missing.npy", "broken.npy", "short.npy"):
        with pytest.raises(CheckpointError, match=r"can't be mapped as .npy.* missing or truncated"):
            DiracMixture(tmp_path / name)
    for name in ("missing.safetensors", "broken.safetensors"):
        with pytest.raises(CheckpointError, match="can't be read as safetensors"):
            DiracMixture(tmp_path / name)
    for paths, message in (
        ("words.txt", "is no bank of points; supported: .npy and .safetensors files"),
        ("integers.npy", "has dtype int64; allowed: float16, float32, float64"),
        ("swapped.npy", "in native byte order"),
        ("integers.safetensors", "holds points of dtype I32; allowed: F16, BF16, F32, F64"),
        ("bank.safetensors", "`name` is None; '.*' holds labels, latents. Pass one of them"),
        (["good.npy", "flat.npy"], "files of one bank must agree"),
    ):
        with pytest.raises(InputError, match=message):
            DiracMixture([tmp_path / path for path in ([paths] if isinstance(paths, str) else paths)])


@pytest.mark.parametrize("storage", [write_npy, write_safetensors])
def test_a_nan_anywhere_in_a_bank_is_found(storage, tmp_path):
    data = bank()
    data[400, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="Points 399 to 402 hold NaN or infinity"):
        DiracMixture(**storage(tmp_path, data), chunk_rows=57)
