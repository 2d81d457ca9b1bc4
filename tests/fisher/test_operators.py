"""Every estimator's operator: against the oracles' exact Fisher, and the properties that all of them share."""

import math

import diffusers
import pytest
import torch
from cases import ORACLES, STABLE_DIFFUSION, ZERO_SNR, Network, SchedulerCase, latents, relative

from diffusers_fisher import (
    AutodiffFisher,
    DenoisingState,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    FisherOperator,
    noise_level,
)
from diffusers_fisher.noise import expand, input_scale, prediction_of, state_of
from diffusers_fisher.testing import OracleDenoiser

from .problems import COORDINATES, Problem, apply

# Float64: conversions between output, epsilon and x_0 multiply by powers of sigma/alpha (0.18 to 2.3), and terms of
# size 1/sigma^2 cancel. Measured up to 1e-15 of what the assertions divide by; the rest is for other BLAS.
EXACT = 1e-12


class ExactOperator(FisherOperator):
    """The base class with the oracle's posterior covariance."""

    def __init__(self, state, oracle):
        super().__init__(state)
        self._matrix = oracle.posterior_covariance(state.sample, state.level)

    def covariance(self, v):
        return apply(self._matrix, v)


def jacobian(function, sample):
    """Returns d function / d sample, (B, d, d), by one backward pass per output."""
    leaf = sample.clone().requires_grad_()
    output = function(leaf).flatten(1)
    rows = [torch.autograd.grad(output[:, i].sum(), leaf, retain_graph=True)[0].flatten(1) for i in range(6)]
    return torch.stack(rows, dim=1)


ON_ORACLES = [
    pytest.mark.parametrize("coordinates", COORDINATES),
    pytest.mark.parametrize("oracle", ORACLES),
]


def on_oracles(test):
    for mark in ON_ORACLES:
        test = mark(test)
    return test


@on_oracles
def test_autodiff_is_the_exact_fisher(oracle, coordinates):
    problem = Problem(oracle, coordinates)
    operator, v = AutodiffFisher(problem.denoiser)(problem.state), problem.vector()
    size = float(problem.fisher.norm())
    assert float((operator.matvec(v) - apply(problem.fisher, v)).norm()) < EXACT * size * float(v.norm())
    assert float((operator.dense() - problem.fisher).norm()) < EXACT * size
    trace = operator.trace()
    exact = problem.oracle.trace(problem.sample, problem.level)
    assert float((trace.value - exact).abs().max()) < EXACT * size
    assert trace.value.dtype is torch.float64
    assert torch.equal(trace.standard_error, torch.zeros(2, dtype=torch.float64))
    assert trace.num_probes == 0


@on_oracles
def test_base_class_turns_the_posterior_covariance_into_every_jacobian(oracle, coordinates):
    """`output_jacobian`, `epsilon_jacobian` and `original_jacobian` against automatic differentiation."""
    problem = Problem(oracle, coordinates)
    v = problem.vector()
    for operator in (ExactOperator(problem.state, problem.oracle), AutodiffFisher(problem.denoiser)(problem.state)):
        assert float((operator.dense() - problem.fisher).norm()) < EXACT * float(problem.fisher.norm())
        for product, name in (
            (operator.output_jacobian, "model_output"),
            (operator.epsilon_jacobian, "epsilon"),
            (operator.original_jacobian, "pred_original_sample"),
        ):
            matrix = jacobian(lambda x, name=name: getattr(problem.state_at(x), name), problem.sample)
            size = float((1 + matrix.norm()) * v.norm())  # points at low noise have a Jacobian of x_0 near 1e-38
            assert float((product(v) - apply(matrix.mT, v)).norm()) < EXACT * size
        covariance = apply(problem.oracle.posterior_covariance(problem.sample, problem.level), v)
        assert float((operator.covariance(v) - covariance).norm()) < EXACT * float(v.norm())


# At low noise the mixture is one of its Gaussians, whose score is linear: there is no truncation error to see.
@pytest.mark.parametrize("coordinates", [name for name in COORDINATES if name != "epsilon at low noise"])
@pytest.mark.parametrize(("central", "order"), [(True, 2), (False, 1)], ids=["central", "forward"])
def test_finite_differences_converge_at_their_order(coordinates, central, order):
    problem = Problem("mixture", coordinates)
    errors = []
    for step in (4e-3, 2e-3, 1e-3):
        operator = FiniteDifferenceFisher(problem.denoiser, relative_step=step, central=central)(problem.state)
        errors.append(relative(operator.matvec(problem.vector()), apply(problem.fisher, problem.vector())))
    # The next term of the expansion is a factor h or h^2 smaller, here at most some per cent.
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)
    assert math.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("central", [True, False], ids=["central", "forward"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_finite_differences_are_exact_where_the_score_is_linear(coordinates, central):
    problem = Problem("gaussian", coordinates)
    operator = FiniteDifferenceFisher(problem.denoiser, central=central)(problem.state)
    # No truncation error; a rounding of 1e-16 is divided by the relative step 1e-2 and cancels up to two digits.
    assert relative(operator.matvec(problem.vector()), apply(problem.fisher, problem.vector())) < 1e-11


@on_oracles
def test_endpoint_forms_are_their_dense_formulas(oracle, coordinates):
    problem = Problem(oracle, coordinates)
    alpha, sigma, end = problem.level.alpha, problem.level.sigma, problem.endpoint.flatten(1)
    mean = problem.oracle.posterior_mean(problem.sample, problem.level).flatten(1)
    identity = torch.eye(6, dtype=torch.float64)
    paper_form = identity / sigma**2 - alpha**2 / sigma**4 * (outer(end, end) - outer(mean, mean))
    centred_form = identity / sigma**2 - alpha**2 / sigma**4 * outer(end - mean, end - mean)
    for form, dense in ((False, paper_form), (True, centred_form)):
        operator = EndpointFisher(centred=form)(problem.state, endpoint=problem.endpoint)
        assert relative(operator.dense(), dense) < EXACT
        assert relative(operator.matvec(problem.vector()), apply(dense, problem.vector())) < EXACT
        assert relative(operator.trace().value, dense.diagonal(dim1=1, dim2=2).sum(1)) < EXACT


def outer(left, right):
    return torch.einsum("bd,be->bde", left, right)


@pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("coordinates", COORDINATES)
def test_endpoint_forms_are_exact_on_average_over_the_posterior(coordinates, centred):
    """The mean of the estimate over x_0 ~ q(x_0|x_t) is F. Here it is a weighted sum over the points."""
    problem = Problem("points", coordinates)
    alpha, sigma, points = problem.level.alpha, problem.level.sigma, problem.oracle.means
    distances = (problem.sample.flatten(1)[:, None] - alpha * points).square().sum(-1)
    weights = (problem.oracle.weights.log() - distances / (2 * sigma**2)).softmax(1)
    average = torch.zeros_like(problem.fisher)
    for index, point in enumerate(points):
        endpoint = point.view(1, *problem.oracle.shape).expand_as(problem.sample)
        operator = EndpointFisher(centred=centred)(problem.state, endpoint=endpoint)
        average += weights[:, index, None, None] * operator.dense()
    # The plain form's terms are larger than their average by |x_0|^2 over the posterior's spread: one digit more.
    size = float((1 / sigma**2 + alpha**2 / sigma**4 * points.square().sum(1).max()) * 6)
    assert float((average - problem.fisher).norm()) < EXACT * size


def test_direct_is_a_zero_fisher_for_epsilon_prediction():
    for coordinates in ("epsilon", "k-diffusion epsilon"):
        problem = Problem("mixture", coordinates)
        operator = DirectFisher()(problem.state)
        assert torch.count_nonzero(operator.matvec(problem.vector())) == 0
        assert torch.count_nonzero(operator.output_jacobian(problem.vector())) == 0
        expected = problem.level.noise_to_signal**2 * problem.vector()  # C = s^2 I, never zero
        assert relative(operator.covariance(problem.vector()), expected) < EXACT


@pytest.mark.parametrize("coordinates", COORDINATES)
def test_direct_never_has_a_zero_covariance(coordinates):
    """With C = 0 the gradient would vanish at the last step of most schedulers, whose next sigma is 0."""
    problem = Problem("mixture", coordinates)
    operator, v = DirectFisher()(problem.state), problem.vector()
    factor = operator.original_jacobian(v) / v
    assert float(factor.std()) < EXACT  # a multiple of the identity
    assert float(factor.mean()) > 0.01
    expected = problem.level.alpha * operator.original_jacobian(v) + problem.level.sigma * operator.epsilon_jacobian(v)
    assert relative(expected, v) < EXACT  # x = alpha x_0 + sigma epsilon, differentiated


def velocity_factor(level, next_level):
    """Returns d x_next / d x of a deterministic variance-preserving step with a constant velocity."""
    return level.alpha * next_level.alpha + level.sigma * next_level.sigma


def epsilon_factor(level, next_level):
    """Returns d x_next / d x of the same step with a constant epsilon."""
    return next_level.alpha / level.alpha


@pytest.mark.parametrize(
    ("kind", "factor"),
    [("epsilon", epsilon_factor), ("v_prediction", velocity_factor), ("sample", velocity_factor)],
)
def test_direct_gradient_passes_straight_to_the_noise_where_the_last_sigma_is_zero(kind, factor):
    from diffusers_fisher import FisherDDIMScheduler

    scheduler = FisherDDIMScheduler(**STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=True, prediction_type=kind)
    scheduler.set_timesteps(5)
    x, weight, network = latents(), latents(seed=9), Network()
    with torch.no_grad(), scheduler.differentiable(DirectFisher()) as trajectory:
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
    levels = [noise_level(scheduler, t) for t in scheduler.timesteps]
    clean = type(levels[0])(torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    product = math.prod(float(factor(*pair)) for pair in zip(levels, [*levels[1:], clean], strict=True))
    assert product > 0.3
    # The scheduler steps with its float32 table, the levels here are float64.
    assert relative(trajectory.gradient((weight * x).sum()), product * weight) < 1e-5


ESTIMATORS = {
    "autodiff": lambda problem: AutodiffFisher(problem.denoiser)(problem.state),
    "finite differences": lambda problem: FiniteDifferenceFisher(problem.denoiser, 1e-4, central=True)(problem.state),
    "direct": lambda problem: DirectFisher()(problem.state),
    "endpoint": lambda problem: EndpointFisher()(problem.state, problem.endpoint),
    "centred endpoint": lambda problem: EndpointFisher(centred=True)(problem.state, problem.endpoint),
}
TRUNCATION = 1e-6  # of central differences with step 1e-4: its square times third derivatives of order ten


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("name", ESTIMATORS)
class TestEveryEstimator:
    def tolerance(self, name, problem):
        scale = 1 / float(problem.level.sigma) ** 2 + float(problem.fisher.norm())
        return (TRUNCATION if name == "finite differences" else EXACT) * 10 * scale

    def test_symmetry(self, name, coordinates):
        problem = Problem("mixture", coordinates)
        dense = ESTIMATORS[name](problem).dense()
        assert float((dense - dense.mT).norm()) < self.tolerance(name, problem)

    def test_linearity(self, name, coordinates):
        problem = Problem("mixture", coordinates)
        operator, v, w = ESTIMATORS[name](problem), problem.vector(), problem.vector(seed=9)
        difference = operator.matvec(2 * v - 3 * w) - (2 * operator.matvec(v) - 3 * operator.matvec(w))
        assert float(difference.norm()) < self.tolerance(name, problem) * float(v.norm() + w.norm())

    def test_matvec_is_a_product_with_the_dense_matrix(self, name, coordinates):
        problem = Problem("mixture", coordinates)
        operator, v = ESTIMATORS[name](problem), problem.vector()
        difference = operator.matvec(v) - apply(operator.dense(), v)
        assert float(difference.norm()) < self.tolerance(name, problem) * float(v.norm())

    def test_trace_is_the_diagonals_sum_and_counts_its_calls(self, name, coordinates):
        problem = Problem("mixture", coordinates)
        operator, before = ESTIMATORS[name](problem), problem.denoiser.num_calls
        trace = operator.trace()
        assert trace.num_denoiser_calls == problem.denoiser.num_calls - before
        diagonal = operator.dense().diagonal(dim1=1, dim2=2)
        assert float((trace.value - diagonal.sum(1)).abs().max()) < self.tolerance(name, problem)

    def test_a_sample_does_not_depend_on_its_batch(self, name, coordinates):
        two, v = Problem("mixture", coordinates), None
        v = two.vector()
        single_problem = Problem("mixture", coordinates)
        single_problem.sample, single_problem.endpoint = two.sample[1:], two.endpoint[1:]
        single_problem.state = single_problem.state_at(single_problem.sample)
        difference = ESTIMATORS[name](two).matvec(v)[1:] - ESTIMATORS[name](single_problem).matvec(v[1:])
        assert float(difference.norm()) < self.tolerance(name, two) * float(v.norm())

    def test_zero_vector_gives_zero(self, name, coordinates):
        problem = Problem("mixture", coordinates)
        assert torch.count_nonzero(ESTIMATORS[name](problem).matvec(torch.zeros_like(problem.sample))) == 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_sample_may_have_its_own_level(name, kind):
    case = SchedulerCase(name, {"prediction_type": kind})
    scheduler, network, x, v = case.parent(**case.config), Network(), latents(), latents(seed=2)

    def operators(sample, t, endpoint):
        level = noise_level(scheduler, t)
        scale = input_scale(scheduler, level)
        output = network(expand(scale, sample) * sample, t)
        state = DenoisingState(sample, output, level, prediction_of(scheduler), t, scale)
        yield AutodiffFisher(network)(state)
        yield FiniteDifferenceFisher(network)(state)
        yield DirectFisher()(state)
        yield EndpointFisher(centred=True)(state, endpoint)

    timesteps, endpoint = torch.tensor([200, 800]), latents(seed=3)
    batch = [operator.matvec(v) for operator in operators(x, timesteps, endpoint)]
    for index, t in enumerate(timesteps):
        row = slice(index, index + 1)
        for product, operator in zip(batch, operators(x[row], t, endpoint[row]), strict=True):
            assert float((product[row] - operator.matvec(v[row])).norm()) < EXACT * float(product.norm() + v.norm())


@pytest.mark.parametrize(
    ("scheduler", "t"),
    [(diffusers.DDIMScheduler(**{**STABLE_DIFFUSION, **ZERO_SNR}), 999),
     (diffusers.FlowMatchEulerDiscreteScheduler(), 1000.0)],
    ids=["zero terminal SNR", "flow"],
)  # fmt: skip
def test_pure_noise_has_the_identity_as_its_fisher(scheduler, t):
    oracle, denoiser = ORACLES["mixture"], OracleDenoiser(ORACLES["mixture"], scheduler)
    x, v = latents(shape=(2, *oracle.shape)), latents(shape=(2, *oracle.shape), seed=2)
    state = state_of(scheduler, x, denoiser.model_output(x, t), t)
    for operator in (
        AutodiffFisher(denoiser)(state),
        FiniteDifferenceFisher(denoiser)(state),
        EndpointFisher(centred=True)(state, latents(shape=(2, *oracle.shape), seed=3)),
        ExactOperator(state, oracle),
    ):
        assert relative(operator.matvec(v), v) < EXACT
        assert bool(torch.isfinite(operator.output_jacobian(v)).all())
