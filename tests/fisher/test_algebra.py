"""Combinations of operators, their inverses and their extreme eigenpairs."""

import math

import pytest
import torch
from cases import Network, latents, relative

from diffusers_fisher import (
    AutodiffFisher,
    DenoisingState,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    InputError,
    NoiseLevel,
    NumericalError,
    UnsupportedError,
)
from diffusers_fisher.fisher.numerics import conjugate_gradients
from diffusers_fisher.noise import Prediction
from diffusers_fisher.testing import check_fisher

from .problems import COORDINATES, MatrixOperator, Problem, apply, state_of_network

IDENTITY = torch.eye(12, dtype=torch.float64)
SCALES = torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None]


def symmetric(seed, dimensions=12, dtype=torch.float64):
    matrix = torch.randn(2, dimensions, dimensions, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((matrix + matrix.mT) / 2).to(dtype)


def positive(seed):
    matrix = symmetric(seed)
    return matrix @ matrix + 0.1 * IDENTITY


# Combinations


@pytest.mark.parametrize(
    ("combine", "expected"),
    [
        (lambda a, b: a + b, lambda a, b: a + b),
        (lambda a, b: 3 * a, lambda a, b: 3 * a),
        (lambda a, b: a * SCALES.flatten(), lambda a, b: SCALES * a),
        (lambda a, b: SCALES.flatten() * a, lambda a, b: SCALES * a),
        (lambda a, b: a.damped(0.7), lambda a, b: a + 0.7 * IDENTITY),
        (lambda a, b: a.damped(SCALES.flatten()), lambda a, b: a + SCALES * IDENTITY),
        (lambda a, b: -0.5 * (a + 2.0 * b).damped(0.3), lambda a, b: -0.5 * (a + 2 * b + 0.3 * IDENTITY)),
        (lambda a, b: 0.0 * a + b, lambda a, b: b),
    ],
    ids=["sum", "multiple", "one factor a sample", "tensor first", "damped", "damping a sample", "nested", "zero"],
)
def test_combination_is_that_of_the_matrices(combine, expected):
    state, left, right = state_of_network(), symmetric(1), symmetric(2)
    operator = combine(MatrixOperator(state, left), MatrixOperator(state, right))
    check_fisher(operator, expected(left, right), num_estimates=0)


def test_traces_of_combinations_are_those_of_their_closed_forms():
    problem = Problem("mixture", "v_prediction")
    direct, endpoint = DirectFisher()(problem.state), EndpointFisher()(problem.state, problem.endpoint)
    operator = (direct + 2.0 * endpoint).damped(0.3)
    expected = direct.trace().value + 2 * endpoint.trace().value + 0.3 * 6
    assert relative(operator.trace().value, expected) < 1e-14
    assert operator.trace().num_denoiser_calls == 0


def test_symmetrised_is_the_mean_of_both_sides():
    operator = AutodiffFisher(Network())(state_of_network())
    symmetrised_operator = operator.symmetrised()
    matrix = operator.dense()
    assert float((matrix - matrix.mT).norm() / matrix.norm()) > 0.5
    assert symmetrised_operator.symmetric
    assert relative(symmetrised_operator.dense(), (matrix + matrix.mT) / 2) < 1e-14
    assert symmetrised_operator.symmetrised() is symmetrised_operator
    assert symmetrised_operator.transposed() is symmetrised_operator
    transposed_sum = (operator + 2.0 * operator).transposed()
    assert relative(transposed_sum.dense(), 3 * matrix.mT) < 1e-14


def test_operator_of_one_side_has_no_transposed():
    state = state_of_network()
    with pytest.raises(UnsupportedError, match=r"FiniteDifferenceOperator knows products with one side .* Autodiff"):
        FiniteDifferenceFisher(Network())(state).symmetrised()
    x = latents().requires_grad_()
    with_graph = DenoisingState(x, Network()(x, 300), state.level, state.prediction, 300)
    with pytest.raises(UnsupportedError, match=r"state brought its own graph, .* from a state without a graph"):
        AutodiffFisher()(with_graph).transposed()


def test_combinations_that_do_not_fit_are_refused():
    operator = MatrixOperator(state_of_network())
    other = Problem("mixture", "epsilon")
    with pytest.raises(
        InputError, match=r"Operators at samples of shapes \[\(2, 1, 2, 3\), \(2, 3, 2, 2\)\] can't be"
    ):
        operator + DirectFisher()(other.state)
    for factors in (torch.ones(3), torch.ones(2, 1)):
        with pytest.raises(InputError, match=r"factors of shape \([23],.*\); allowed: a number, or \(2,\)"):
            operator.damped(factors)


# Inverses


def test_conjugate_gradients_solve_each_samples_system():
    matrix = positive(1)
    operator, v = MatrixOperator(state_of_network(), matrix), latents(seed=2)
    expected = torch.linalg.solve(matrix, v.flatten(1)[..., None]).view_as(v)
    assert relative(operator.solve(v, tolerance=1e-12), expected) < 1e-9  # condition numbers of some hundreds
    rough = operator.solve(v, tolerance=1e-2)
    residual = (operator.matvec(rough) - v).flatten(1).norm(dim=1) / v.flatten(1).norm(dim=1)
    assert bool((residual <= 1.01e-2).all())
    assert bool((residual > 1e-6).any())


def test_conjugate_gradients_leave_finished_samples_alone():
    matrix = positive(1)
    matrix[0] = IDENTITY  # This sample is solved after one product.
    operator, v = MatrixOperator(state_of_network(), matrix), latents(seed=2)
    v[1, 0] = 0
    assert relative(operator.solve(v)[:1], v[:1]) < 1e-14
    assert torch.count_nonzero(operator.solve(torch.zeros_like(v))) == 0
    v[0] = 0
    assert relative(operator.matvec(operator.solve(v, 1e-12)), v) < 1e-11


def test_conjugate_gradients_take_no_more_products_than_dimensions():
    matrix, products = positive(1), []

    def matvec(v):
        products.append(v)
        return apply(matrix, v)

    conjugate_gradients(matvec, latents(seed=2), 1e-8)
    assert 2 < len(products) <= 13  # The solution is exact after 12 products, except for rounding.


def test_indefinite_operator_is_refused_with_the_advice():
    operator, v = MatrixOperator(state_of_network()), latents(seed=2)
    assert float(torch.linalg.eigvalsh(operator.matrix).min()) < 0
    with pytest.raises(NumericalError, match=r"not positive definite .* add damping: operator.damped\(value\)"):
        operator.solve(v)
    damped = operator.damped(20.0)
    assert relative(damped.matvec(damped.solve(v, 1e-12)), v) < 1e-11


@pytest.mark.parametrize("limit", [0, 2])
def test_unfinished_solution_is_refused_with_the_advice(limit):
    operator, v = MatrixOperator(state_of_network(), positive(1)), latents(seed=2)
    v[0] = 0  # a finished sample must not spoil the message
    message = rf"left a relative residual of [0-9.e-]+ after {limit} products; allowed: 1e-06. Raise `max_iterations`"
    with pytest.raises(NumericalError, match=message):
        operator.solve(v, max_iterations=limit)


def test_operator_with_nan_is_refused():
    operator = MatrixOperator(state_of_network(), positive(1) * math.nan)
    operator.symmetric = True
    with pytest.raises(NumericalError, match="not positive definite"):
        operator.solve(latents(seed=2))


def test_inverse_of_an_operator_that_is_not_symmetric_is_refused():
    operator = AutodiffFisher(Network())(state_of_network())
    with pytest.raises(UnsupportedError, match=r"`solve` needs a symmetric operator, .*symmetrised\(\).solve\(...\)"):
        operator.solve(latents(seed=2))
    with pytest.raises(UnsupportedError, match=r"`eigenpairs` needs a symmetric operator, .*symmetrised\(\).eigenpa"):
        operator.eigenpairs(1)
    operator_sum = operator.symmetrised().damped(3.0)
    v = latents(seed=2)
    assert relative(operator_sum.matvec(operator_sum.solve(v, 1e-12)), v) < 1e-11


CLOSED = {
    "endpoint": lambda problem: EndpointFisher()(problem.state, problem.endpoint),
    "endpoint, centred": lambda problem: EndpointFisher(centred=True)(problem.state, problem.endpoint),
    "direct": lambda problem: DirectFisher()(problem.state),
}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_inverses_are_those_of_the_dense_matrix(name, coordinates):
    """The formula is Woodbury's. It also holds for the endpoint forms, some of which are indefinite."""
    problem = Problem("mixture", coordinates)
    factor = torch.tensor([2.0, -3.0], dtype=torch.float64)
    operator = (factor * CLOSED[name](problem).damped(0.3)).damped(SCALES.flatten())
    v, matrix = problem.vector(), operator.dense()
    assert operator.inverse_product(v, torch.zeros(2, dtype=torch.float64)) is not None
    expected = torch.linalg.solve(matrix, v.flatten(1)[..., None]).view_as(v)
    assert relative(operator.solve(v), expected) < 1e-12 * float(torch.linalg.cond(matrix).max())


def test_closed_inverse_of_an_indefinite_endpoint_form():
    problem = Problem("mixture", "epsilon at low noise")
    operator = EndpointFisher()(problem.state, problem.endpoint)
    assert float(torch.linalg.eigvalsh(operator.dense()).min()) < 0
    v = problem.vector()
    assert relative(operator.matvec(operator.solve(v)), v) < 1e-11


def test_closed_inverse_takes_one_level_per_sample():
    level = NoiseLevel(torch.tensor([0.8, 0.6], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64))
    state = DenoisingState(latents(), Network()(latents(), 300), level, Prediction("v_prediction"), 300)
    v = latents(seed=2)
    for operator in (EndpointFisher(centred=True)(state, latents(seed=3)), DirectFisher()(state)):
        assert relative(operator.matvec(operator.solve(v)), v) < 1e-12


def test_singular_closed_forms_are_refused_with_the_advice():
    problem = Problem("mixture", "epsilon")
    v, mean = problem.vector(), problem.state.pred_original_sample
    direction = v / v.flatten(1).norm(dim=1).view(2, 1, 1, 1)
    singular = EndpointFisher(centred=True)(problem.state, mean + problem.level.noise_to_signal * direction)
    for operator in (DirectFisher()(problem.state), singular, 0.0 * singular):
        with pytest.raises(NumericalError, match=r"(is singular, or nearly|not positive definite).* operator.damped"):
            operator.solve(v)
        damped = operator.damped(0.5)
        assert relative(damped.matvec(damped.solve(v, 1e-12)), v) < 1e-11


@pytest.mark.parametrize("kind", ["v_prediction", "flow_prediction", "sample"])
def test_closed_forms_at_pure_noise(kind):
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    state = DenoisingState(latents(), Network()(latents(), 999), NoiseLevel(zero, one), Prediction(kind), 999)
    v = latents(seed=2)
    for operator in (EndpointFisher()(state, latents(seed=3)), EndpointFisher(centred=True)(state, latents(seed=3))):
        assert relative(operator.solve(v), v) < 1e-14
        assert relative(operator.trace().value, torch.tensor([12.0, 12.0])) < 1e-14
    assert relative(DirectFisher()(state).trace().value, torch.tensor([12.0, 12.0])) < 1e-14


def test_direct_trace_exists_at_pure_noise_under_epsilon_prediction():
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    state = DenoisingState(latents(), latents(), NoiseLevel(zero, one), Prediction("epsilon"), 999)
    assert torch.count_nonzero(DirectFisher()(state).trace().value) == 0


def test_states_without_noise_are_refused():
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    state = DenoisingState(latents(), latents(), NoiseLevel(one, zero), Prediction("epsilon"), 0)
    v = latents(seed=2)
    for operator in (
        DirectFisher()(state),
        AutodiffFisher(Network())(state),
        EndpointFisher()(state, latents(seed=3)),
    ):
        for ask in (
            lambda o: o.matvec(v), lambda o: o.matmat(v[None]), lambda o: o.trace(), lambda o: o.diagonal(),
            lambda o: o.dense(), lambda o: o.solve(v), lambda o: o.trace(v[None]),
        ):  # fmt: skip
            with pytest.raises(InputError, match="noise level has sigma = 0, where the diffusion Fisher is infinite"):
                ask(operator)
    assert bool(torch.isfinite(DirectFisher()(state).original_jacobian(v)).all())


def test_finite_differences_at_a_sample_of_zeros():
    network = Network()
    state = state_of_network(network, x=torch.zeros_like(latents()))
    v = latents(seed=2)
    exact = AutodiffFisher(network, forward_mode=True)(state).matvec(v)
    assert relative(FiniteDifferenceFisher(network, 1e-4, central=True)(state).matvec(v), exact) < 1e-6


# Eigenpairs


@pytest.mark.parametrize("count", [1, 3, 11])
@pytest.mark.parametrize("largest", [True, False], ids=["largest", "smallest"])
def test_eigenpairs_are_those_of_the_dense_matrix(largest, count):
    operator = MatrixOperator(state_of_network())
    values, vectors = operator.eigenpairs(count, largest)
    expected = torch.linalg.eigvalsh(operator.matrix).mT
    expected = expected.flip(0)[:count] if largest else expected[:count]
    assert values.shape == (count, 2)
    assert values.dtype is torch.float64
    assert vectors.shape == (count, 2, 3, 2, 2)
    assert relative(values, expected) < 1e-11
    for value, vector in zip(values, vectors, strict=True):
        assert relative(operator.matvec(vector), value.view(2, 1, 1, 1) * vector) < 1e-10
    flat = vectors.flatten(2).permute(1, 0, 2)
    assert relative(flat @ flat.mT, torch.eye(count).expand(2, -1, -1)) < 1e-10


def test_eigenpairs_of_the_exact_fisher():
    problem = Problem("mixture", "v_prediction")
    operator = AutodiffFisher(problem.denoiser)(problem.state).symmetrised()
    values, vectors = torch.linalg.eigh(problem.fisher)
    largest, top = operator.eigenpairs(1)
    smallest, bottom = operator.eigenpairs(1, largest=False)
    assert relative(largest[0], values[:, -1]) < 1e-11
    assert relative(smallest[0], values[:, 0]) < 1e-11
    for eigenpair, expected in ((top, vectors[:, :, -1]), (bottom, vectors[:, :, 0])):
        cosine = (eigenpair[0].flatten(1) * expected).sum(1).abs()
        assert bool((cosine > 1 - 1e-10).all())


def test_eigenpairs_in_single_precision():
    matrix = positive(3)
    network = Network(dtype=torch.float32)
    operator = MatrixOperator(state_of_network(network, torch.float32), matrix.float())
    values, vectors = operator.eigenpairs(2)
    assert vectors.dtype is torch.float32
    assert relative(values, torch.linalg.eigvalsh(matrix).mT.flip(0)[:2]) < 1e-4


@pytest.mark.parametrize("coordinates", ["epsilon", "v_prediction"])
def test_eigenpairs_of_multiples_of_the_identity(coordinates):
    """The operators are zero (epsilon prediction) and one, for which Lanczos alone finds no second direction."""
    operator = DirectFisher()(Problem("mixture", coordinates).state)
    values, vectors = operator.eigenpairs(3)
    assert float((values - (0.0 if coordinates == "epsilon" else 1.0)).abs().max()) < 1e-12
    flat = vectors.flatten(2).permute(1, 0, 2)
    assert relative(flat @ flat.mT, torch.eye(3).expand(2, -1, -1)) < 1e-10


@pytest.mark.parametrize("count", [0, 12])
def test_impossible_numbers_of_eigenpairs_are_refused(count):
    with pytest.raises(InputError, match=rf"`count` is {count}; allowed: 1 to 11, one less than the dimension"):
        MatrixOperator(state_of_network()).eigenpairs(count)


def test_eigenpairs_that_do_not_converge_are_refused(monkeypatch):
    import scipy.sparse.linalg

    def fail_to_converge(*arguments, **keywords):
        raise scipy.sparse.linalg.ArpackNoConvergence("no convergence (30 iterations)", [], [])

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", fail_to_converge)
    with pytest.raises(
        NumericalError, match=r"Eigenpairs of sample 0 did not converge: .*30 iter.* Raise `tolerance`"
    ):
        MatrixOperator(state_of_network()).eigenpairs(2)


def test_eigenpairs_of_products_that_are_not_finite_are_refused():
    operator = MatrixOperator(state_of_network(), torch.stack([positive(1)[0], positive(1)[0] * math.nan]))
    operator.symmetric = True
    with pytest.raises(NumericalError, match="A product of sample 1 is not finite, so it has no eigenpairs"):
        operator.eigenpairs(2)


# Many vectors


@pytest.mark.parametrize(
    "make",
    [MatrixOperator, lambda state: AutodiffFisher(Network())(state), lambda state: 2.0 * MatrixOperator(state)],
    ids=["base", "model", "combination"],
)
@pytest.mark.parametrize("shape", [(0, 2, 3, 2, 2), (2, 3, 2, 2), (4, 1, 3, 2, 2)])
def test_many_vectors_of_another_shape_are_refused(make, shape):
    with pytest.raises(InputError, match=r"Vectors have shape .*; allowed: \(k, 2, 3, 2, 2\) with k >= 1"):
        make(state_of_network()).matmat(torch.ones(shape, dtype=torch.float64))
