"""Every estimator keeps the contract in all coordinates, and the contract catches operators that break it."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ORACLES, FunctionFisher, Network, latents

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DenoisingState,
    DiracMixture,
    DirectFisher,
    EndpointFisher,
    ExactFisher,
    FiniteDifferenceFisher,
    FisherError,
    FisherOperator,
    GaussianFisher,
    GaussianMixture,
    InputError,
    NoiseLevel,
    TraceCorrectedFisher,
)
from diffusers_fisher.noise import Prediction
from diffusers_fisher.testing import ContractError, check_fisher

from .problems import COORDINATES, PACKED, Problem, apply


def endpoint_matrix(problem, centred):
    """Returns the matrix of the estimate by its formula."""
    alpha, sigma, end = problem.level.alpha, problem.level.sigma, problem.endpoint.flatten(1)
    mean = problem.oracle.posterior_mean(problem.sample, problem.level).flatten(1)
    spread = outer(end - mean) if centred else outer(end) - outer(mean)
    return torch.eye(6, dtype=torch.float64) / sigma**2 - alpha**2 / sigma**4 * spread


def outer(vectors):
    return vectors[:, :, None] * vectors[:, None]


def direct_matrix(problem):
    """Returns F = (d epsilon/dx)/sigma, where epsilon is computed from a constant output (or velocity)."""
    kind, (alpha, sigma) = problem.state.prediction.kind, (problem.level.alpha, problem.level.sigma)
    slope = {
        "epsilon": 0.0,
        "v_prediction": 1 / (alpha**2 + sigma**2),
        "sample": 1 / (alpha**2 + sigma**2),
        "flow_prediction": 1 / (sigma * (alpha + sigma)),
        "edm": 1 / (sigma**2 + 0.5**2),  # c_skip = 0.25/(sigma^2 + 0.25)
    }[kind]
    return (slope * torch.eye(6, dtype=torch.float64)).expand(len(problem.sample), -1, -1)


def exact_law(problem):
    """Returns the problem's oracle as one of the package's distributions."""
    oracle = problem.oracle
    means = oracle.means.view(-1, *oracle.shape)
    if not bool(oracle.covariances.any()):
        return ExactFisher(DiracMixture(means, oracle.weights))
    return ExactFisher(GaussianMixture(means, Covariance.full(oracle.covariances, oracle.shape), oracle.weights))


def data_covariance(problem):
    oracle = problem.oracle
    centred = oracle.means - oracle.weights @ oracle.means
    return torch.einsum("k,kde->de", oracle.weights, oracle.covariances + outer(centred))


def prior(problem):
    return GaussianFisher(Covariance.full(data_covariance(problem)[None], problem.oracle.shape))


def prior_matrix(problem, corrected=False):
    """Returns (alpha^2 S + sigma^2 I)^-1; with `corrected`, M = I - sigma^2 F is scaled to the exact trace."""
    identity, variance = torch.eye(6, dtype=torch.float64), problem.level.sigma**2
    matrix = (problem.level.alpha**2 * data_covariance(problem) + variance * identity).inverse()
    matrix = matrix.expand(len(problem.sample), -1, -1)
    if not corrected:
        return matrix
    exact_noise, prior_noise = (
        6 - variance * each.diagonal(dim1=1, dim2=2).sum(1) for each in (problem.fisher, matrix)
    )
    return (identity - (exact_noise / prior_noise)[:, None, None] * (identity - variance * matrix)) / variance


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds an estimator, its expected matrix, and the tolerances of the matrix and of the properties."""

    make: Callable[[Problem], Any]
    exact: Callable[[Problem], torch.Tensor] = lambda problem: problem.fisher
    tolerance: float = 1e-10

    def check(self, problem, num_estimates):
        estimator = self.make(problem)
        operator = estimator(problem.state, problem.endpoint)
        check_fisher(
            operator, self.exact(problem), self.tolerance, rounding=self.tolerance, estimator=estimator,
            endpoint=problem.endpoint, num_estimates=num_estimates,
        )  # fmt: skip


CASES = {
    "autodiff": Case(lambda problem: AutodiffFisher(problem.denoiser)),
    "autodiff, forward mode": Case(lambda problem: AutodiffFisher(problem.denoiser, forward_mode=True)),
    "autodiff, in chunks": Case(lambda problem: AutodiffFisher(problem.denoiser, chunk_size=4)),
    # Truncation, measured on these problems: 2e-5 and 3e-8, by third derivatives where two points compete.
    "forward differences": Case(lambda problem: FiniteDifferenceFisher(problem.denoiser, 1e-5), tolerance=1e-4),
    "central differences": Case(
        lambda problem: FiniteDifferenceFisher(problem.denoiser, 1e-4, central=True), tolerance=1e-7
    ),
    "endpoint": Case(lambda problem: EndpointFisher(), lambda problem: endpoint_matrix(problem, False)),
    "endpoint, centred": Case(
        lambda problem: EndpointFisher(centred=True), lambda problem: endpoint_matrix(problem, True)
    ),
    "direct": Case(lambda problem: DirectFisher(), direct_matrix),
    "exact": Case(exact_law),
    "Gaussian prior": Case(prior, prior_matrix),
    "Gaussian prior, trace corrected": Case(
        lambda problem: TraceCorrectedFisher(prior(problem), exact_law(problem)),
        lambda problem: prior_matrix(problem, corrected=True),
    ),
}


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize("name", CASES)
def test_estimator_keeps_the_contract(name, oracle, coordinates):
    CASES[name].check(Problem(oracle, coordinates), num_estimates=0)


@pytest.mark.parametrize("coordinates", ["epsilon", "flow matching"])
@pytest.mark.parametrize("name", CASES)
def test_estimator_keeps_the_contract_on_packed_samples(name, coordinates):
    CASES[name].check(Problem("mixture", coordinates, batch=3, shape=PACKED), num_estimates=0)


# Stochastic traces do not depend on coordinates.
@pytest.mark.parametrize("oracle", ORACLES)
# The forward mode takes 6 s per case.
@pytest.mark.parametrize("name", [name for name in CASES if name != "autodiff, forward mode"])
def test_stochastic_traces_keep_the_contract(name, oracle):
    CASES[name].check(Problem(oracle, "epsilon"), num_estimates=100)


@pytest.mark.parametrize("exact", [False, True], ids=["properties only", "compared"])
def test_approximations_keep_the_properties_and_are_not_exact(exact):
    problem = Problem("mixture", "epsilon")
    operator = EndpointFisher(centred=True)(problem.state, problem.endpoint)
    check_fisher(operator, num_estimates=0)
    check_fisher(operator, problem.fisher, tolerance=None, num_estimates=0)
    if exact:
        with pytest.raises(ContractError, match="EndpointOperator breaks 'exact matrix': got a difference of"):
            check_fisher(operator, problem.fisher, num_estimates=0)


def test_exact_may_be_an_operator():
    problem = Problem("mixture", "sample")
    exact, other = AutodiffFisher(problem.denoiser)(problem.state), DirectFisher()(problem.state)
    check_fisher(Right(problem), exact, num_estimates=0)
    with pytest.raises(ContractError, match="exact matrix"):
        check_fisher(other, exact, num_estimates=0)


def test_learned_jacobians_keep_the_contract_in_both_modes():
    """The Jacobian is not symmetric: one mode multiplies by the transposed matrix, the other by the matrix."""
    network, x = Network(), latents()
    level = NoiseLevel(torch.tensor([0.8, 0.6], dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64))
    state = DenoisingState(x, network(x, 300), level, Prediction("epsilon"), 300)
    rows = []
    for index in range(12):
        leaf = x.clone().requires_grad_()
        rows.append(torch.autograd.grad(network(leaf, 300).flatten(1)[:, index].sum(), leaf)[0].flatten(1))
    fisher = torch.stack(rows, 1) / level.sigma[:, None, None]
    reverse, forward = AutodiffFisher(network), AutodiffFisher(network, forward_mode=True)
    check_fisher(reverse(state), fisher.mT, estimator=reverse)
    check_fisher(forward(state), fisher, estimator=forward, num_estimates=0)
    check_fisher(reverse(state).symmetrised(), (fisher + fisher.mT) / 2, num_estimates=0)


def test_tolerances_follow_the_dtype():
    problem = Problem("mixture", "epsilon")
    state = DenoisingState(
        problem.sample.float(), problem.state.model_output.float(), problem.level, problem.state.prediction
    )
    check_fisher(EndpointFisher(centred=True)(state, problem.endpoint.float()), endpoint_matrix(problem, True))


def test_one_sample_of_one_dimension_has_a_contract_too():
    level = NoiseLevel(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    x = latents(shape=(1, 1))
    state = DenoisingState(x, torch.tanh(x), level, Prediction("epsilon"))
    estimator = AutodiffFisher(lambda x, t: torch.tanh(x))
    check_fisher(estimator(state), (1 - torch.tanh(x) ** 2)[..., None] / 0.6, estimator=estimator)


@pytest.mark.parametrize("argument", ["exact", "endpoint"])
def test_arguments_of_another_shape_are_refused(argument):
    problem = Problem("mixture", "epsilon")
    estimator = EndpointFisher()
    operator = estimator(problem.state, problem.endpoint)
    arguments = {"exact": problem.fisher, "tolerance": None, "estimator": estimator, "endpoint": problem.endpoint}
    arguments |= {"tolerance": 1e9, argument: arguments[argument][:1]}
    with pytest.raises(InputError, match=rf"`{argument}` has shape \(1, .*; allowed: \(2, "):
        check_fisher(operator, num_estimates=0, **arguments)


# Operators that break it


class Right(FisherOperator):
    """The exact Fisher of an oracle. Its products do not call each other, so a test can break a single one."""

    def __init__(self, problem):
        super().__init__(problem.state)
        self._matrix = problem.oracle.posterior_covariance(problem.sample, problem.level)

    def product(self, v):
        return apply(self._matrix, v)

    def covariance(self, v):
        return self.product(v)

    def matvec(self, v):
        alpha, sigma = self.state.level.alpha, self.state.level.sigma
        return v / sigma**2 - alpha**2 / sigma**4 * self.product(v)

    def epsilon_jacobian(self, v):
        return self.state.level.sigma * self.matvec(v)

    def original_jacobian(self, v):
        return self.state.level.alpha / self.state.level.sigma**2 * self.product(v)


class Mirrored(Right):
    """An operator that says it is not symmetric, and returns itself as its transposed."""

    symmetric = False

    def product(self, v):
        return super().product(v) + 1e-3 * v.flatten(1).cumsum(1).view_as(v)

    def transposed(self):
        return self


def break_method(method, change, base=Right):
    """Returns `base` with a `method` that returns `change(result, operator, *arguments)`."""

    def changed_method(self, *arguments, **keywords):
        return change(getattr(base, method)(self, *arguments, **keywords), self, *arguments)

    return type(f"Broken{base.__name__}", (base,), {method: changed_method})


def estimate(with_sketch, **changes):
    """Returns a trace that changes its estimates, with or without a sketch."""

    def change(result, operator, probes=None, sketch=None):
        if probes is None or (sketch is not None) is not with_sketch:
            return result
        return dataclasses.replace(
            result, **{name: make_value(getattr(result, name)) for name, make_value in changes.items()}
        )

    return break_method("trace", change)


def double(value):
    return 2 * value


BROKEN = {
    "exact matrix": break_method("product", lambda r, *_: -r),
    "zero": break_method("matvec", lambda r, *_: r + 1e-3),
    "linearity": break_method("matvec", lambda r, o, v: r + 1e-3 * v**3),
    "independence": break_method("product", lambda r, o, v: r + 1e-3 * v.flip(0)),
    "matmat": break_method("matmat", lambda r, *_: r * 1.001),
    "dense": break_method("dense", lambda r, *_: r * 1.001),
    "symmetry": break_method("product", lambda r, o, v: r + 1e-3 * v.flatten(1).cumsum(1).view_as(v)),
    "transpose": Mirrored,
    "diagonal": break_method("exact_diagonal", lambda r, *_: (r[0] * 1.001, r[1])),
    "diagonal standard error": break_method(
        "diagonal", lambda r, *_: dataclasses.replace(r, standard_error=r.standard_error + 1e-9)
    ),
    "trace": break_method("exact_trace", lambda r, *_: (r[0] * 1.001, r[1])),
    "trace standard error": break_method(
        "trace", lambda r, *_: dataclasses.replace(r, standard_error=r.standard_error + 1e-9)
    ),
    "epsilon jacobian": break_method("epsilon_jacobian", lambda r, *_: -r),
    "covariance": break_method("covariance", lambda r, *_: r * 1.001),
    "original jacobian": break_method("original_jacobian", lambda r, *_: r * 1.001),
    "output jacobian": break_method("output_jacobian", lambda r, *_: r * 1.001),
    "solve": break_method("solve", lambda r, *_: r * 1.001),
    "Hutchinson mean": estimate(False, value=double),
    "Hutchinson standard error": estimate(False, standard_error=double),
    "Hutchinson probes": estimate(False, num_probes=double),
    "Hutch++ mean": estimate(True, value=double),
    "Hutch++ standard error": estimate(True, standard_error=double),
    "Hutch++ probes": estimate(True, num_probes=double),
    "shape of matvec": break_method("matvec", lambda r, *_: r.flatten(1)),
    "shape of matmat": break_method("matmat", lambda r, *_: r.flatten(2)),
    "shape of dense": break_method("dense", lambda r, *_: r[0]),
    "shape of trace": break_method("exact_trace", lambda r, *_: (r[0].sum(), r[1])),
    "dtype of dense": break_method("dense", lambda r, *_: r.float()),
    "dtype of matvec": break_method(
        "matvec", lambda r, *_: r.float(), base=break_method("matmat", lambda r, *_: r.double())
    ),
    "dtype of diagonal": break_method("exact_diagonal", lambda r, *_: (r[0].float(), r[1])),
    "finite dense": break_method("dense", lambda r, *_: r / 0),
}


def test_the_operator_that_is_broken_below_keeps_the_contract():
    problem = Problem("gaussian", "v_prediction")
    check_fisher(Right(problem), problem.fisher)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_operator_is_caught_by_name(name):
    problem = Problem("gaussian", "v_prediction")
    operator = BROKEN[name](problem)
    message = rf"^{type(operator).__name__} breaks '{re.escape(name)}': got .+; allowed: .+\.$"
    with pytest.raises(ContractError, match=message) as error:
        check_fisher(operator, problem.fisher, num_estimates=100 if name.startswith("Hutch") else 0)
    assert isinstance(error.value, FisherError)
    assert isinstance(error.value, AssertionError)


def test_dependence_on_the_batch_is_caught():
    problem = Problem("gaussian", "v_prediction")

    def operator(state, endpoint):
        return len(state.sample) * AutodiffFisher(problem.denoiser)(state)

    estimator = FunctionFisher(operator)
    check_fisher(estimator(problem.state), num_estimates=0)
    with pytest.raises(ContractError, match="CombinedOperator breaks 'batch invariance'"):
        check_fisher(estimator(problem.state), estimator=estimator, num_estimates=0)
