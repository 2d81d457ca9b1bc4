"""The adjoint of a run against full back-propagation through the same run, for every scheduler."""

import inspect

import pytest
import torch
from cases import (
    CASES,
    CHURNED_CASES,
    ORACLE_SHAPE,
    ORACLES,
    OUTSIDE_CASES,
    STABLE_DIFFUSION,
    FunctionFisher,
    Network,
    SchedulerCase,
    latents,
    model_input,
    relative,
    sampling_run,
)

from diffusers_fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    FisherDDIMScheduler,
    FisherOperator,
    fisher_scheduler,
)
from diffusers_fisher.noise import expand, state_of

ALL_CASES = CASES + CHURNED_CASES + OUTSIDE_CASES
ADJOINT = 1e-10  # float64: the same products in another order, measured up to 1e-14


def back_propagation(case, network, x, weight):
    """Returns the result of the stock scheduler's run and its gradient, by autograd through all steps."""
    leaf = x.clone().requires_grad_()
    result = sampling_run(case.parent(**case.config), network, leaf, **case.step)[-1]
    (gradient,) = torch.autograd.grad((weight * result).sum(), leaf)
    return result.detach(), gradient


def adjoint(case, network, x, weight, estimator):
    """Returns result, gradient and trajectory of a recorded run, whose network runs without a graph."""
    scheduler = fisher_scheduler(case.parent)(**case.config)
    with torch.no_grad(), scheduler.differentiable(estimator) as trajectory:
        result = sampling_run(scheduler, network, x, **case.step)[-1]
    return result, trajectory.gradient((weight * result).sum()), trajectory


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_true_jacobian_gives_back_propagation_in_float64(case):
    network, x, weight = Network(), latents(), latents(seed=5)
    reference, exact = back_propagation(case, network, x, weight)
    result, gradient, trajectory = adjoint(case, network, x, weight, AutodiffFisher(network))
    assert torch.equal(result, reference)
    assert relative(gradient, exact) < ADJOINT
    assert (gradient.shape, gradient.dtype) == (x.shape, torch.float64)
    assert len(trajectory.states) >= 6
    direct = adjoint(case, network, x, weight, DirectFisher())[1]
    assert relative(direct, exact) > 1e-3  # The denoiser's Jacobian changes the gradient.


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_true_jacobian_gives_back_propagation_in_float32(case):
    network, x, weight = Network(dtype=torch.float32), latents(torch.float32), latents(torch.float32, seed=5)
    reference, exact = back_propagation(case, network, x, weight)
    result, gradient, _ = adjoint(case, network, x, weight, AutodiffFisher(network))
    assert torch.equal(result, reference)
    assert relative(gradient, exact) < 1e-5  # float32 products in another order
    assert gradient.dtype is torch.float32


class PosteriorOperator(FisherOperator):
    """Multiplies by the exact posterior covariance of a mixture in closed form."""

    def __init__(self, state):
        super().__init__(state)
        self._matrix = ORACLES["mixture"].posterior_covariance(state.sample, state.level)

    def covariance(self, v):
        return torch.einsum("bde,be->bd", self._matrix, v.flatten(1)).view_as(v)


def ideal_run(scheduler, x, num_steps=6):
    """Returns the result of a run whose denoiser is ideal for the run's own levels."""
    scheduler.set_timesteps(num_steps)
    options = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(3)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        model_input(scheduler, x, t)
        if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
            scheduler._init_step_index(t)
        state = state_of(scheduler, x, x, t, getattr(scheduler, "step_index", None) or 0)
        noise, original, identity = (expand(c, x) for c in state.prediction.output_coefficients(state.level))
        oracle = ORACLES["mixture"]
        output = noise * oracle.epsilon(x, state.level) + original * oracle.posterior_mean(x, state.level)
        x = scheduler.step(output + identity * x, t, x, return_dict=False, **options)[0]
    return x


UNCLIPPED = [case for case in CASES + OUTSIDE_CASES if not {"clip_sample", "thresholding"} & set(case.changes)]


@pytest.mark.parametrize("case", UNCLIPPED, ids=str)
def test_exact_posterior_covariance_gives_back_propagation_through_an_ideal_denoiser(case):
    """The covariance C takes the place of the Jacobian for every prediction type, over a whole run."""
    x, weight = latents(shape=(2, *ORACLE_SHAPE)), latents(shape=(2, *ORACLE_SHAPE), seed=5)
    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad((weight * ideal_run(case.parent(**case.config), leaf)).sum(), leaf)
    scheduler = fisher_scheduler(case.parent)(**case.config)
    estimator = FunctionFisher(lambda state, endpoint: PosteriorOperator(state))
    with torch.no_grad(), scheduler.differentiable(estimator) as trajectory:
        result = ideal_run(scheduler, x)
    error = float((trajectory.gradient((weight * result).sum()) - exact).norm())
    # Runs that add noise at every step, or start from pure noise, lose x: their gradients are 1e-9 or less.
    assert error < ADJOINT * float(exact.norm()) + 1e-15 * float(weight.norm())


@pytest.mark.parametrize("central", [True, False], ids=["central", "forward"])
def test_finite_differences_approach_back_propagation_for_a_symmetric_jacobian(central):
    case, x, weight = SchedulerCase("DPMSolverMultistepScheduler", {}), latents(), latents(seed=5)
    matrix = Network().weight
    symmetric = (matrix + matrix.mT) / 2

    def network(x, t):  # The output is the gradient of a potential, like a true score.
        return (torch.tanh(x.flatten(1) @ symmetric) @ symmetric).view_as(x)

    exact = back_propagation(case, network, x, weight)[1]
    errors = []
    for step in (2e-3, 1e-3):
        estimator = FiniteDifferenceFisher(network, relative_step=step, central=central)
        errors.append(relative(adjoint(case, network, x, weight, estimator)[1], exact))
    assert errors[0] / errors[1] == pytest.approx(4 if central else 2, rel=0.05)  # h^2 and h, up to the next term


def test_estimator_gets_every_state_and_the_runs_result_as_its_endpoint():
    case, network, x = SchedulerCase("DPMSolverMultistepScheduler", {}), Network(), latents()
    calls = []

    def estimator(state, endpoint):
        calls.append((state, endpoint))
        return EndpointFisher(centred=True)(state, endpoint)

    result, gradient, trajectory = adjoint(case, network, x, latents(seed=5), FunctionFisher(estimator))
    assert [state for state, _ in calls] == trajectory.states[::-1]  # once per step, backwards
    assert all(torch.equal(endpoint, result) and not endpoint.requires_grad for _, endpoint in calls)
    assert relative(gradient, adjoint(case, network, x, latents(seed=5), DirectFisher())[1]) > 1e-3


def test_operators_along_the_run_are_at_its_states():
    case, network, x = SchedulerCase("EulerDiscreteScheduler", {}), Network(), latents()
    _, _, trajectory = adjoint(case, network, x, latents(seed=5), AutodiffFisher(network))
    scheduler = case.parent(**case.config)
    samples = sampling_run(scheduler, network, x)
    starts = [x * scheduler.init_noise_sigma, *samples[:-1]]
    for index, (state, sample) in enumerate(zip(trajectory.states, starts, strict=True)):
        assert torch.equal(state.sample, sample)
        assert float(state.level.sigma) == float(scheduler.sigmas[index])
        assert trajectory.operator(index).state is state
        assert not state.sample.requires_grad
    assert torch.equal(trajectory.initial_sample, starts[0])
    assert torch.equal(trajectory.final_sample, samples[-1])


def test_gradient_may_be_taken_twice_with_retain_graph():
    scheduler, network = FisherDDIMScheduler(**STABLE_DIFFUSION), Network()
    with torch.no_grad(), scheduler.differentiable(AutodiffFisher(network)) as trajectory:
        result = sampling_run(scheduler, network, latents())[-1]
    first = trajectory.gradient(result.sum(), retain_graph=True)
    assert relative(trajectory.gradient(3 * result.sum()), 3 * first) < 1e-14  # one rounding per product
