"""Hutchinson's trace estimate and its error, random probes, and what estimators refuse."""

import pytest
import torch
from cases import Network, latents, relative

from diffusers_fisher import (
    AutodiffFisher,
    DenoisingState,
    EndpointFisher,
    FiniteDifferenceFisher,
    InputError,
    NoiseLevel,
)
from diffusers_fisher.fisher import rademacher
from diffusers_fisher.noise import Prediction

from .problems import MatrixOperator, state_of_network


@pytest.mark.parametrize("count", [50, 2000])
def test_hutchinson_is_unbiased_with_the_right_standard_error(count):
    operator = MatrixOperator(state_of_network())
    probes = rademacher(count, operator.state.sample, torch.Generator().manual_seed(0))
    estimate = operator.trace(probes)
    off_diagonal = operator.matrix.square().sum((1, 2)) - operator.matrix.diagonal(dim1=1, dim2=2).square().sum(1)
    true_error = (2 * off_diagonal / count).sqrt()  # exact for random signs and a symmetric matrix
    exact = operator.matrix.diagonal(dim1=1, dim2=2).sum(1)
    assert bool(((estimate.value - exact).abs() < 4 * true_error).all())
    assert bool(((estimate.value - exact).abs() > 0).all())
    # The sample's own standard deviation scatters by 1/sqrt(2 count): five of these, at most 50%.
    scatter = 5 / (2 * count) ** 0.5
    assert bool(((estimate.standard_error / true_error - 1).abs() < scatter).all())
    assert estimate.num_probes == count


def test_hutchinson_error_falls_with_the_root_of_the_probes():
    operator = MatrixOperator(state_of_network())
    probes = rademacher(2000, operator.state.sample, torch.Generator().manual_seed(0))
    few, many = operator.trace(probes.vectors[:500]), operator.trace(probes)
    assert relative(many.standard_error * 2, few.standard_error) < 0.2  # Each error scatters by some per cent.


def test_per_probe_values_average_to_the_estimate():
    operator = MatrixOperator(state_of_network())
    estimate = operator.trace(rademacher(7, operator.state.sample, torch.Generator().manual_seed(0)))
    assert estimate.values.shape == (7, 2)
    assert relative(estimate.values.mean(0), estimate.value) < 1e-14  # one float64 sum
    assert operator.trace().values.shape == (0, 2)


def test_single_probe_has_no_finite_standard_error():
    operator = MatrixOperator(state_of_network())
    estimate = operator.trace(rademacher(1, operator.state.sample, torch.Generator().manual_seed(0)))
    assert bool(torch.isinf(estimate.standard_error).all())


@pytest.mark.parametrize(
    ("estimator", "calls"), [(AutodiffFisher, 1), (FiniteDifferenceFisher, 5)], ids=["autodiff", "finite differences"]
)
def test_probes_cost_the_calls_that_are_reported(estimator, calls):
    network, timesteps = Network(), []

    def counting(x, t):
        timesteps.append(t)
        return network(x, t)

    operator = estimator(counting)(state_of_network(network))
    estimate = operator.trace(rademacher(5, operator.state.sample, torch.Generator().manual_seed(0)))
    assert estimate.num_denoiser_calls == len(timesteps) == calls


def test_autodiff_uses_the_graph_of_the_state():
    network, x = Network(), latents().requires_grad_()
    state = state_of_network(network)
    with_graph = DenoisingState(x, network(x, 300), state.level, state.prediction, 300)
    v = latents(seed=2)
    operator = AutodiffFisher()(with_graph)  # The estimator needs no denoiser.
    assert torch.equal(operator.matvec(v), AutodiffFisher(network)(state).matvec(v))
    assert operator.trace().num_denoiser_calls == 0


@pytest.mark.parametrize("central", [True, False], ids=["central", "forward"])
def test_finite_differences_evaluate_the_denoiser_without_a_graph(central):
    network, modes = Network(), []
    state = state_of_network(network)

    def record_mode(x, t):
        modes.append(torch.is_grad_enabled())
        return network(x, t)

    FiniteDifferenceFisher(record_mode, central=central)(state).matvec(latents(seed=2))
    assert modes == [False] * (2 if central else 1)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        # bfloat16 has eight bits, and differences lose four of them.
        (AutodiffFisher, 0.01),
        (lambda network: FiniteDifferenceFisher(network, relative_step=0.05, central=True), 0.1),
    ],
    ids=["autodiff", "finite differences"],
)
def test_half_precision_networks_give_products_in_the_samples_dtype(make, tolerance):
    def half(x, t):
        return Network(dtype=torch.bfloat16)(x.to(torch.bfloat16), t)

    reference, v = state_of_network(dtype=torch.float32), latents(torch.float32, seed=2)
    state = DenoisingState(reference.sample, half(reference.sample, 300), reference.level, reference.prediction, 300)
    product = make(half)(state).matvec(v)
    assert product.dtype is torch.float32
    assert 0 < relative(product, make(Network(dtype=torch.float32))(reference).matvec(v)) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rademacher_draws_signs_of_mean_zero_from_its_generator_alone(dtype):
    like = latents(dtype)
    probes, repeat, other = (rademacher(500, like, torch.Generator().manual_seed(seed)).vectors for seed in (1, 1, 2))
    assert probes.shape == (500, *like.shape)
    assert probes.dtype is dtype
    assert bool((probes.abs() == 1).all())
    assert 0 < abs(float(probes.mean())) < 4 / probes.numel() ** 0.5  # four standard errors
    assert torch.equal(probes, repeat)
    assert not torch.equal(probes, other)


def test_one_generator_per_sample_makes_probes_independent_of_the_batch():
    like = latents()
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    batch = rademacher(3, like, generators)
    single = rademacher(3, like[1:], [torch.Generator().manual_seed(2)])
    assert torch.equal(batch.vectors[:, 1:], single.vectors)


def test_no_probe_is_refused():
    with pytest.raises(InputError, match="number of probes is 0; allowed: at least 1, or None for the exact trace"):
        rademacher(0, latents())


@pytest.mark.parametrize("shape", [(2, 3, 2, 2), (5, 2, 3, 2), (5, 1, 3, 2, 2)])
def test_probes_of_another_shape_are_refused(shape):
    with pytest.raises(InputError, match=r"Probes have shape .*allowed: \(k, 2, 3, 2, 2\) with k >= 1"):
        MatrixOperator(state_of_network()).trace(torch.ones(shape, dtype=torch.float64))


def test_empty_probes_are_refused():
    with pytest.raises(InputError, match="0 probes in groups of 1; allowed: one or more, in whole groups"):
        MatrixOperator(state_of_network()).trace(torch.ones(0, 2, 3, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize(
    "operator",
    [
        lambda state: AutodiffFisher(Network())(state),
        lambda state: FiniteDifferenceFisher(Network())(state),
        lambda state: EndpointFisher()(state, state.sample),
        MatrixOperator,
    ],
)
def test_vector_of_another_shape_is_refused(operator):
    with pytest.raises(InputError, match=r"The vector has shape \(3, 2, 2\); allowed: \(2, 3, 2, 2\)"):
        operator(state_of_network()).matvec(torch.ones(3, 2, 2, dtype=torch.float64))


@pytest.mark.parametrize("estimator", [AutodiffFisher(), FiniteDifferenceFisher()])
def test_missing_denoiser_is_refused_until_bind_sets_one(estimator):
    with pytest.raises(InputError, match=r"has no denoiser; give it one, such as AutodiffFisher\(PipelineDenoiser"):
        estimator(state_of_network())
    network, state, v = Network(), state_of_network(), latents(seed=2)
    bound_estimator = estimator.bind(network)
    assert torch.equal(bound_estimator(state).matvec(v), type(estimator)(network)(state).matvec(v))
    assert bound_estimator.bind(None) is bound_estimator  # An estimator keeps its own denoiser.


def test_binding_keeps_the_step():
    bound_estimator = FiniteDifferenceFisher(relative_step=0.03, central=True).bind(Network())
    assert (bound_estimator.relative_step, bound_estimator.central) == (0.03, True)


def test_missing_endpoint_is_refused():
    with pytest.raises(InputError, match=r"needs the clean end of the run: EndpointFisher\(\)\(state, endpoint=x0\)"):
        EndpointFisher()(state_of_network())


def test_endpoint_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"endpoint has shape \(1, 3, 2, 2\); allowed: \(2, 3, 2, 2\)"):
        EndpointFisher()(state_of_network(), endpoint=latents()[:1])


@pytest.mark.parametrize("centred", [False, True])
def test_endpoint_forms_of_predicted_noise_at_alpha_zero_are_refused(centred):
    sample, output, endpoint = (latents(seed=seed) for seed in range(3))
    level = NoiseLevel(torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64))
    with pytest.raises(InputError, match=r"which predicted noise does not tell there \(prediction type 'epsilon'\)"):
        EndpointFisher(centred)(DenoisingState(sample, output, level, Prediction("epsilon")), endpoint)
    velocity = DenoisingState(sample, output, level, Prediction("v_prediction"))
    trace = EndpointFisher(centred)(velocity, endpoint).trace().value
    assert torch.equal(trace, torch.full((2,), 12.0, dtype=torch.float64))  # the trace of the identity


def test_denoiser_without_a_graph_is_refused():
    network = Network()
    operator = AutodiffFisher(torch.no_grad()(network.__call__))(state_of_network(network))
    with pytest.raises(InputError, match=r"does not depend on its input for autograd.* Use FiniteDifferenceFisher"):
        operator.matvec(latents(seed=2))


@pytest.mark.parametrize("step", [0.0, 1.0, -0.1])
def test_relative_step_outside_its_range_is_refused(step):
    with pytest.raises(InputError, match=f"`relative_step` is {step}; allowed: between 0 and 1, such as 1e-2"):
        FiniteDifferenceFisher(relative_step=step)
