"""The error bounds hold on random distributions, and are reached where their terms line up."""

import math

import pytest
import torch
from cases import relative

from diffusers_fisher import DenoisingState, EndpointFisher, InputError, NoiseLevel
from diffusers_fisher.fisher.bounds import (
    centred_endpoint_error_bound,
    endpoint_error_bound,
    norm_trace_error_bound,
    residual_trace_error_bound,
)
from diffusers_fisher.noise import Prediction
from diffusers_fisher.testing import MixtureOracle

DIMENSIONS, BATCH, SETS = 6, 8, 150
ROUNDING = 1e-9  # for bounds that are reached: differences of traces of size d/sigma^2 in float64, sigma above 0.05


def draw(seed, points):
    """Returns a random distribution, level, samples and noise predictions with a bias, in many sizes."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    count = 1 + seed % 7
    means = math.exp(uniform(-1, 1.5)) * torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64)
    factors = math.exp(uniform(-3, 0)) * torch.randn(count, DIMENSIONS, 3, generator=generator, dtype=torch.float64)
    oracle = MixtureOracle.points(means) if points else MixtureOracle(means, factors @ factors.mT)
    level = NoiseLevel.from_log_noise_to_signal(uniform(-3, 2))
    end = oracle.sample(BATCH, generator)
    x = level.alpha * end + level.sigma * torch.randn(end.shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(end.shape, generator=generator, dtype=torch.float64)
    bias = bias * torch.exp(4 * torch.rand(BATCH, 1, generator=generator, dtype=torch.float64) - 4)
    return oracle, level, x, bias, oracle.sample(BATCH, generator), generator


def problems(points):
    return (draw(seed, points) for seed in range(SETS))


def state_of(oracle, level, x, bias):
    return DenoisingState(x, oracle.epsilon(x, level) + bias, level, Prediction("epsilon"))


def norms(vectors):
    return torch.linalg.vector_norm(vectors, dim=1)


def second_moment(oracle, x, level):
    mean = oracle.posterior_mean(x, level)
    return oracle.posterior_covariance(x, level) + mean[:, :, None] * mean[:, None]


def norm_trace_error(oracle, level, x, bias, target_error):
    moment = second_moment(oracle, x, level).diagonal(dim1=1, dim2=2).sum(1)  # E[|x_0|^2 | x_t]
    prediction_norm = norms(state_of(oracle, level, x, bias).pred_original_sample) ** 2
    bracket = moment + DIMENSIONS * target_error - prediction_norm
    return DIMENSIONS / level.sigma**2 - level.alpha**2 / level.sigma**4 * bracket - oracle.trace(x, level)


def residual_trace_error(oracle, level, x, bias, target_error):
    """E|eps - eps_theta|^2 = tr Cov[eps|x_t] + |bias|^2, and tr Cov[eps|x_t] = d - sigma^2 tr F."""
    exact = oracle.trace(x, level)
    r = (DIMENSIONS - level.sigma**2 * exact + norms(bias) ** 2) / DIMENSIONS + target_error
    return DIMENSIONS * (1 - r) / level.sigma**2 - exact


def endpoint_error(oracle, level, x, bias, endpoint, centred):
    operator = EndpointFisher(centred=centred)(state_of(oracle, level, x, bias), endpoint)
    return torch.linalg.matrix_norm(operator.dense() - oracle.fisher(x, level), ord=2)


def largest_ratio(errors_and_bounds):
    """Checks every bound, and returns the largest ratio of an error to its bound."""
    largest = 0.0
    for error, bound in errors_and_bounds:
        assert error.shape == bound.shape == (BATCH,)
        assert bound.dtype is torch.float64
        assert bool((error.abs() <= bound * (1 + ROUNDING) + ROUNDING).all())
        largest = max(largest, float((error.abs() / bound).max()))
    return largest


KINDS = pytest.mark.parametrize("points", [True, False], ids=["points", "mixtures"])


# Largest ratios of error to bound measured on the random sets, which line up by chance where one term dominates:
# norm 0.998, residual 1.000, endpoint 0.998 (0.999 with the moment's error), centred 1.000.
@KINDS
def test_norm_trace_bound_holds(points):
    def ratios():
        for oracle, level, x, bias, _, generator in problems(points):
            target = torch.randn(BATCH, generator=generator, dtype=torch.float64) * 0.1
            mean = norms(oracle.posterior_mean(x, level))
            bound = norm_trace_error_bound(level, DIMENSIONS, target.abs(), norms(bias), mean)
            yield norm_trace_error(oracle, level, x, bias, target), bound
            prediction_norm = norms(state_of(oracle, level, x, bias).pred_original_sample)
            bound = norm_trace_error_bound(level, DIMENSIONS, target.abs(), norms(bias), prediction_norm)
            yield norm_trace_error(oracle, level, x, bias, target), bound

    assert largest_ratio(ratios()) > 0.95


@KINDS
def test_residual_trace_bound_holds(points):
    def ratios():
        for oracle, level, x, bias, _, generator in problems(points):
            target = torch.randn(BATCH, generator=generator, dtype=torch.float64) * 0.1
            bound = residual_trace_error_bound(level, DIMENSIONS, target.abs(), norms(bias))
            yield residual_trace_error(oracle, level, x, bias, target), bound

    assert largest_ratio(ratios()) > 0.999


@pytest.mark.parametrize("moment", [False, True], ids=["radius alone", "moment error given"])
def test_endpoint_bound_holds(moment):
    def ratios():
        for oracle, level, x, bias, endpoint, _ in problems(points=True):
            radius = float(norms(oracle.means).max())
            gap = None
            if moment:
                difference = endpoint[:, :, None] * endpoint[:, None] - second_moment(oracle, x, level)
                gap = torch.linalg.matrix_norm(difference, ord=2)
            bound = endpoint_error_bound(level, radius, norms(bias), gap)
            yield endpoint_error(oracle, level, x, bias, endpoint, False), bound

    assert largest_ratio(ratios()) > 0.95


@KINDS
def test_centred_endpoint_bound_holds(points):
    def ratios():
        for oracle, level, x, bias, endpoint, _ in problems(points):
            distance = norms(endpoint - state_of(oracle, level, x, bias).pred_original_sample)
            covariance = torch.linalg.matrix_norm(oracle.posterior_covariance(x, level), ord=2)
            bound = centred_endpoint_error_bound(level, distance, covariance)
            yield endpoint_error(oracle, level, x, bias, endpoint, True), bound
            if points:
                ball = float(norms(oracle.means).max()) ** 2
                assert bool((covariance <= ball * (1 + ROUNDING)).all())

    assert largest_ratio(ratios()) > 0.999


LEVEL = NoiseLevel.from_log_noise_to_signal(-0.7)


def one_point(bias_along_mean):
    """Returns data in one point at radius 2, and a noise prediction whose error moves x_0^ outwards."""
    generator = torch.Generator().manual_seed(3)
    point = torch.randn(1, DIMENSIONS, generator=generator, dtype=torch.float64)
    point = 2 * point / point.norm()
    oracle = MixtureOracle.points(point)
    x = LEVEL.alpha * point + LEVEL.sigma * torch.randn(1, DIMENSIONS, generator=generator, dtype=torch.float64)
    return oracle, LEVEL, x, -bias_along_mean * point / 2


def test_norm_trace_bound_is_reached():
    """The bound is reached if the target is too low and x_0^ is too long."""
    problem = one_point(0.3)
    bound = norm_trace_error_bound(LEVEL, DIMENSIONS, 0.05, 0.3, 2.0)
    error = norm_trace_error(*problem, -0.05)
    assert relative(error, bound[None]) < ROUNDING


def test_residual_trace_bound_is_reached():
    """The bound is reached if the target is too high; a bias of the noise only adds to the error."""
    oracle, level, x, bias, *_ = draw(5, points=False)
    bound = residual_trace_error_bound(level, DIMENSIONS, 0.05, norms(bias))
    error = residual_trace_error(oracle, level, x, bias, 0.05)
    assert relative(-error, bound) < ROUNDING


def test_endpoint_bound_is_reached():
    """One point reaches it with the moment's error, and an endpoint at right angles to the data with the radius."""
    oracle, level, x, bias = one_point(0.3)
    endpoint = oracle.means
    bound = endpoint_error_bound(level, 2.0, 0.3, moment_error=0.0)
    assert relative(endpoint_error(oracle, level, x, bias, endpoint, False), bound[None]) < ROUNDING
    direction = torch.linalg.qr(oracle.means.mT, mode="complete")[0][:, 1:2].mT * 2
    bound = endpoint_error_bound(level, 2.0, 0.0)
    assert relative(endpoint_error(oracle, level, x, 0 * bias, direction, False), bound[None]) < ROUNDING


def test_centred_endpoint_bound_is_reached():
    """The bound is reached for every error of the model if the posterior is one point."""
    oracle, level, x, bias = one_point(0.3)
    distance = norms(oracle.means - state_of(oracle, level, x, bias).pred_original_sample)
    bound = centred_endpoint_error_bound(level, distance, 0.0)
    assert relative(endpoint_error(oracle, level, x, bias, oracle.means, True), bound) < ROUNDING
    # It is also reached if the endpoint is x_0^: then the error is C itself.
    bound = centred_endpoint_error_bound(level, 0.0, 0.49)
    assert relative(bound, level.alpha**2 / level.sigma**4 * 0.49) < 1e-14


BOUNDS = {
    "norm": lambda level, value=1.0, other=0.5: norm_trace_error_bound(level, 6, value, other, 1.0),
    "residual": lambda level, value=1.0, other=0.5: residual_trace_error_bound(level, 6, value, other),
    "endpoint": lambda level, value=1.0, other=0.5: endpoint_error_bound(level, value, other),
    "centred": lambda level, value=1.0, other=0.5: centred_endpoint_error_bound(level, value, other),
}


@pytest.mark.parametrize("name", BOUNDS)
class TestEveryBound:
    def test_takes_numbers_and_tensors_a_sample(self, name):
        bound, values = BOUNDS[name], torch.tensor([0.3, 0.7, 1.1])
        levels = NoiseLevel.from_log_noise_to_signal(torch.tensor([-1.0, 0.0, 1.0]))
        assert bound(LEVEL).shape == ()
        assert bound(LEVEL).dtype is torch.float64
        assert bound(LEVEL, values).shape == bound(levels).shape == bound(levels, values, values).shape == (3,)
        for index, (alpha, sigma) in enumerate(zip(levels.alpha, levels.sigma, strict=True)):
            single_bound = bound(NoiseLevel(alpha, sigma), float(values[index]))
            assert relative(bound(levels, values)[index], single_bound) < 1e-6  # float32 values

    def test_exists_at_pure_noise(self, name):
        one = torch.ones((), dtype=torch.float64)
        assert bool(torch.isfinite(BOUNDS[name](NoiseLevel(0 * one, one))))

    def test_without_noise_is_refused(self, name):
        one = torch.ones((), dtype=torch.float64)
        with pytest.raises(InputError, match="noise level has sigma = 0, where the diffusion Fisher is infinite"):
            BOUNDS[name](NoiseLevel(one, 0 * one))

    @pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, torch.tensor([1.0, -1.0])])
    def test_constants_that_are_none_are_refused(self, name, value):
        for position in (0, 1):
            arguments = [0.5, 0.5]
            arguments[position] = value
            with pytest.raises(InputError, match=r"`[a-z_]+` is .*; allowed: finite, at least 0"):
                BOUNDS[name](LEVEL, *arguments)

    def test_shapes_that_do_not_fit_are_refused(self, name):
        levels = NoiseLevel.from_log_noise_to_signal(torch.tensor([-1.0, 0.0, 1.0]))
        for level, value, other in ((levels, torch.ones(2), 0.5), (LEVEL, torch.ones(2), torch.ones(3))):
            with pytest.raises(InputError, match=r"has shape \(.*\), the level \(.*\); allowed: a number, or one"):
                BOUNDS[name](level, value, other)
        with pytest.raises(InputError, match=r"has shape \(2, 1\), the level \(\); allowed"):
            BOUNDS[name](LEVEL, torch.ones(2, 1))


@pytest.mark.parametrize("bound", [norm_trace_error_bound, residual_trace_error_bound])
def test_no_dimensions_are_refused(bound):
    with pytest.raises(InputError, match="`dimensions` is 0; allowed: at least 1"):
        bound(LEVEL, 0, *[0.1] * (3 if bound is norm_trace_error_bound else 2))
