"""Structured covariances against dense matrices, their draws against their moments, and their errors."""

import math

import numpy
import pytest
import scipy.fft
import torch
from cases import latents, relative

from diffusers_fisher import Covariance, DCTBasis, InputError, NoiseLevel

SHAPE, D = (2, 3, 4), 24
# Float64: the matrices' condition number is at most |S|/sigma^2 = 1e4 at the lowest noise.
TOLERANCE = 1e-11


def normal(*shape, seed=0):
    return latents(shape=shape, seed=seed)


def dct_matrix():
    """Returns Q, whose columns are the basis vectors, from scipy's transform of every unit vector."""
    units = numpy.eye(D).reshape(D, *SHAPE)
    return torch.from_numpy(scipy.fft.dctn(units, axes=(-2, -1), norm="ortho").reshape(D, D))


def structures():
    """Returns covariances of three modes in every structure, each with its dense matrices."""
    variances, factor = normal(3, *SHAPE, seed=1).exp() * 0.1, normal(3, *SHAPE, 2, seed=2) * 0.4
    root = normal(3, D, D, seed=3) * 0.2
    full = root @ root.mT + 0.02 * torch.eye(D, dtype=torch.float64)
    full_matrices = torch.diag_embed(variances.flatten(1))
    low = full_matrices + factor.flatten(1, 3) @ factor.flatten(1, 3).mT
    q, basis = dct_matrix(), DCTBasis(SHAPE)
    sizes = torch.tensor([0.1, 0.5, 0.02], dtype=torch.float64)
    return {
        "isotropic": (Covariance.isotropic(sizes, SHAPE), sizes[:, None, None] * torch.eye(D, dtype=torch.float64)),
        "diagonal": (Covariance.diagonal(variances), full_matrices),
        "DCT": (Covariance.diagonal(variances, basis), q @ full_matrices @ q.mT),
        "low rank": (Covariance.low_rank(variances, factor), low),
        "low rank in DCT": (Covariance.low_rank(variances, factor, basis), q @ low @ q.mT),
        "full": (Covariance.full(full, SHAPE), full),
    }


STRUCTURES = structures()
LEVELS = {
    name: NoiseLevel(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))
    for name, alpha, sigma in (
        ("low noise", 0.999, 0.03), ("middle", 0.8, 0.6), ("k-diffusion", 1.0, 80.0), ("pure noise", 0.0, 1.0),
        ("one per sample", (0.9, 0.0), (0.3, 2.0)),
    )
}  # fmt: skip


def products(matrices, v):
    return torch.einsum("bkde,bke->bkd", matrices, v.expand(-1, matrices.shape[1], -1))


@pytest.mark.parametrize("name", STRUCTURES)
def test_dense_matrices_and_products(name):
    covariance, dense = STRUCTURES[name]
    v = normal(2, 3, D, seed=5)
    assert (len(covariance), covariance.dimensions) == (3, D)
    assert relative(covariance.dense(), dense) < TOLERANCE
    assert relative(covariance.product(v), products(dense[None].expand(2, -1, -1, -1), v)) < TOLERANCE


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
@pytest.mark.parametrize("name", STRUCTURES)
class TestAtALevel:
    def total(self, name, level):
        """Returns T as (2, 3, d, d)."""
        scale, shift = (value.expand(2)[:, None, None, None] ** 2 for value in (level.alpha, level.sigma))
        return scale * STRUCTURES[name][1] + shift * torch.eye(D, dtype=torch.float64)

    @pytest.mark.parametrize("modes", [3, 1], ids=["one vector per mode", "one vector"])
    def test_products(self, name, level, modes):
        covariance, dense = STRUCTURES[name]
        noised, total, v = covariance.at(level), self.total(name, level), normal(2, modes, D, seed=5)
        inverse = torch.linalg.inv(total)
        assert relative(noised.product(v), products(total, v)) < TOLERANCE
        assert relative(noised.solve(v), products(inverse, v)) < TOLERANCE
        assert relative(noised.shrink(v), products(dense @ inverse, v)) < TOLERANCE

    def test_many_vectors_at_once(self, name, level):
        noised, v = STRUCTURES[name][0].at(level), normal(4, 2, 1, D, seed=5)
        products = noised.solve(v)
        assert products.shape == (4, 2, 3, D)
        for product, row in zip(products, v, strict=True):
            assert relative(product, noised.solve(row)) < TOLERANCE

    def test_determinant_trace_and_diagonals(self, name, level):
        covariance, dense = STRUCTURES[name]
        noised, total = covariance.at(level), self.total(name, level)
        inverse = torch.linalg.inv(total)
        expected = inverse.diagonal(dim1=-2, dim2=-1)
        diagonal = (dense @ inverse).diagonal(dim1=-2, dim2=-1)
        difference = noised.log_determinant - torch.logdet(total)
        assert float(difference.abs().max()) < TOLERANCE * D * 10  # nats, each of d terms below ten
        assert relative(noised.inverse_trace.expand(2, 3), expected.sum(-1)) < TOLERANCE
        assert relative(noised.inverse_diagonal.expand(2, 3, D), expected) < TOLERANCE
        assert relative(noised.shrink_diagonal.expand(2, 3, D), diagonal) < TOLERANCE

    @pytest.mark.parametrize("shift", [0.0, 3.0, (0.5, 20.0)])
    def test_inverse_of_a_shifted_inverse(self, name, level, shift):
        noised, total, v = STRUCTURES[name][0].at(level), self.total(name, level), normal(2, 1, D, seed=5)
        shift = torch.tensor(shift, dtype=torch.float64)
        damped = torch.linalg.inv(total) + shift.expand(2)[:, None, None, None] * torch.eye(D, dtype=torch.float64)
        assert relative(noised.solve_inverse(v, shift), products(torch.linalg.inv(damped), v)) < TOLERANCE

    def test_select_returns_the_covariances_of_the_modes(self, name, level):
        covariance, v = STRUCTURES[name][0], normal(2, 1, D, seed=5)
        indices = torch.tensor([2, 0])
        part = covariance.select(indices).at(level).solve(v)
        assert relative(part, covariance.at(level).solve(v)[:, indices]) < TOLERANCE


def test_one_mode_serves_any_number_of_means():
    covariance = Covariance.diagonal(normal(1, *SHAPE).exp())
    level, v = LEVELS["middle"], normal(2, 5, D)
    assert covariance.select(torch.tensor([4, 1])) is covariance
    assert relative(covariance.at(level).solve(v), v / covariance.at(level).product(torch.ones_like(v))) < TOLERANCE


def test_dct_basis_is_scipys_orthonormal_transform():
    basis, v = DCTBasis(SHAPE), normal(5, D)
    expected = scipy.fft.dctn(v.view(5, *SHAPE).numpy(), axes=(-2, -1), norm="ortho").reshape(5, D)
    assert relative(basis.analyse(v), torch.from_numpy(expected)) < TOLERANCE
    assert relative(basis.synthesise(basis.analyse(v)), v) < TOLERANCE
    p, q = v[0].exp(), dct_matrix()
    assert relative(basis.diagonal(p), (q @ torch.diag(p) @ q.mT).diagonal()) < TOLERANCE


@pytest.mark.parametrize("name", STRUCTURES)
def test_draws_have_the_covariance(name):
    covariance, dense = STRUCTURES[name]
    count = 20000
    modes = torch.arange(2).repeat_interleave(count)
    draws = covariance.draw(modes, torch.Generator().manual_seed(0))
    for mode in range(2):
        part, exact = draws[modes == mode], dense[mode]
        variances = exact.diagonal()
        # standard error of the mean of Gaussian products
        error = (torch.outer(variances, variances) + exact.square()).div(count).sqrt()
        scatter = (part.T @ part / count - exact) / error
        assert 0.5 < float(scatter.square().mean()) < 2  # about 1: far below 1 would be as suspicious as far above
        assert float(scatter.abs().max()) < 6
        assert float((part.mean(0) / (variances / count).sqrt()).abs().max()) < 6


def test_draws_come_from_the_generator_alone():
    covariance, modes = STRUCTURES["low rank"][0], torch.tensor([0, 2, 1])
    first, repeat, other = (covariance.draw(modes, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, repeat)
    assert not torch.equal(first, other)


def test_float32_input_is_widened():
    covariance = Covariance.diagonal(normal(1, *SHAPE).exp().float())
    assert covariance.variances.dtype is torch.float64
    assert covariance.at(LEVELS["middle"]).solve(normal(1, 1, D)).dtype is torch.float64


def test_zero_isotropic_variance_makes_points():
    level = LEVELS["low noise"]
    noised = Covariance.isotropic(0.0, SHAPE).at(level)
    assert float(noised.inverse_trace) == pytest.approx(D / 0.03**2, rel=1e-12)
    assert float(noised.log_determinant) == pytest.approx(2 * D * math.log(0.03), rel=1e-12)
    assert torch.count_nonzero(noised.shrink(normal(1, 1, D))) == 0


ONES = torch.ones(2, *SHAPE, dtype=torch.float64)
BROKEN = ONES.clone()
BROKEN[1, 0, 0, 0] = float("nan")
NEGATIVE = ONES.clone()
NEGATIVE[0, 1, 2, 3] = -0.5
EYE = torch.eye(D, dtype=torch.float64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Covariance.isotropic(-1.0, SHAPE), "must not be negative; the smallest is -1"),
        (lambda: Covariance.isotropic(float("nan"), SHAPE), "`variances` holds NaN or infinity"),
        (lambda: Covariance.isotropic(torch.ones(2, 3), SHAPE), r"shape \(2, 3\).*allowed: a number or \(K,\)"),
        (lambda: Covariance.isotropic(1.0, (0, 3)), "samples of one dimension or more"),
        (lambda: Covariance.isotropic(torch.ones(2).half(), SHAPE), "dtype torch.float16; allowed: float32, float64"),
        (lambda: Covariance.diagonal(NEGATIVE), "must be positive; the smallest is -0.5. Add a small multiple"),
        (lambda: Covariance.diagonal(0 * ONES), "must be positive; the smallest is 0"),
        (lambda: Covariance.diagonal(BROKEN), "holds NaN or infinity"),
        (lambda: Covariance.diagonal(ONES.bfloat16()), "dtype torch.bfloat16; allowed: float32, float64"),
        (lambda: Covariance.diagonal(ONES.int()), "dtype torch.int32; allowed: float32, float64"),
        (lambda: Covariance.diagonal(ONES[0, 0, 0]), r"allowed: \(K, \*shape\). Pass variances\[None\] for one"),
        (lambda: Covariance.diagonal(ONES, DCTBasis((2, 4, 3))), r"samples of shape \(2, 4, 3\), the covariance"),
        (lambda: Covariance.low_rank(ONES, ONES), r"factor has shape \(2, 2, 3, 4\), the variances"),
        (lambda: Covariance.low_rank(ONES, torch.ones(2, *SHAPE, 0)), "with a rank r of one or more"),
        (lambda: Covariance.low_rank(NEGATIVE, torch.ones(2, *SHAPE, 3)), "must be positive"),
        (lambda: Covariance.full(EYE, SHAPE), r"allowed: \(K, 24, 24\). Pass matrix\[None\] for one mode"),
        (lambda: Covariance.full(EYE[None] + torch.triu(torch.ones(D, D), 1), SHAPE), "must be symmetric"),
        (lambda: Covariance.full(-EYE[None], SHAPE), "Eigenvalues of full covariances must be positive"),
        (lambda: DCTBasis((4,)), r"needs samples with two axes or more, got shape \(4,\)"),
    ],
)
def test_bad_covariances_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()
