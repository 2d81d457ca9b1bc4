"""What operators offer beside products: a shape, `@`, and estimates by a number of probes."""

import pytest
import torch
from cases import relative

from diffusers_fisher import (
    Covariance,
    DenoisingState,
    ExactFisher,
    FiniteDifferenceFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
    rademacher,
)
from diffusers_fisher.noise import Prediction


def seed(number):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def operator():
    means = torch.randn(5, 1, 4, 4, dtype=torch.float64, generator=seed(0))
    mixture = GaussianMixture(means, Covariance.isotropic(0.3, (1, 4, 4)))
    level = NoiseLevel.from_log_noise_to_signal(torch.tensor(0.1))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=seed(1))
    return ExactFisher(mixture)(DenoisingState(x, mixture.epsilon(x, level), level, Prediction("epsilon")))


def test_shape_is_that_of_the_dense_matrix(operator):
    assert operator.shape == tuple(operator.dense().shape) == (2, 16, 16)
    assert (2.0 * operator + operator).shape == (2, 16, 16)


def test_matmul_is_the_product_with_the_dense_matrix(operator):
    v = torch.randn(2, 1, 4, 4, dtype=torch.float64, generator=seed(2))
    by_hand = (operator.dense() @ v.flatten(1)[..., None]).view_as(v)
    assert relative(operator @ v, by_hand) < 1e-12  # float64


def test_a_number_of_probes_draws_random_signs(operator):
    probes = rademacher(16, operator.state.sample, generator=seed(3))
    assert torch.equal(operator.trace(16, generator=seed(3)).value, operator.trace(probes).value)
    assert torch.equal(operator.diagonal(16, generator=seed(3)).value, operator.diagonal(probes).value)
    estimate, exact = operator.trace(64, generator=seed(4)), operator.trace()
    assert ((estimate.value - exact.value).abs() < 4 * estimate.standard_error).all()  # once in 16,000
    sketched = operator.trace(8, sketch=4, generator=seed(5))
    assert sketched.num_probes == 12
    assert ((sketched.value - exact.value).abs() < 6 * sketched.standard_error).all()  # 8 values: a wide law


@pytest.mark.parametrize("number", [0, -1])
def test_too_few_probes_are_refused(operator, number):
    with pytest.raises(InputError, match=f"number of probes is {number}; allowed: at least 1"):
        operator.trace(number)


def test_representation_names_the_shape_and_the_cost(operator):
    assert repr(operator) == ("<ExactOperator: shape (2, 16, 16), samples (2, 1, 4, 4), 0 calls per product>")
    differences = FiniteDifferenceFisher(lambda x, t: x)(operator.state)
    assert "1 calls per product" in repr(differences)
