"""Both modes of automatic differentiation, and finite differences, of networks whose Jacobian is not symmetric."""

import pytest
import torch
from cases import Network, latents, relative
from pipeline_cases import PIPELINES

from diffusers_fisher import AutodiffFisher, FiniteDifferenceFisher, InputError, PipelineDenoiser, UnsupportedError
from diffusers_fisher.fisher.numerics import dot

from .problems import apply, state_of_network


def jacobian(network, x):
    """Returns d output / d x, (B, 12, 12), row by row."""
    rows = []
    for index in range(12):
        leaf = x.clone().requires_grad_()
        rows.append(torch.autograd.grad(network(leaf, 300).flatten(1)[:, index].sum(), leaf)[0].flatten(1))
    return torch.stack(rows, 1)


def test_modes_multiply_by_the_jacobian_or_its_transposed():
    network, v = Network(), latents(seed=2)
    state = state_of_network(network)
    exact = jacobian(network, state.sample)
    assert relative(exact, exact.mT) > 0.5
    reverse, forward = AutodiffFisher(network)(state), AutodiffFisher(network, forward_mode=True)(state)
    assert relative(reverse.output_jacobian(v), apply(exact.mT, v)) < 1e-14
    assert relative(forward.output_jacobian(v), apply(exact, v)) < 1e-14
    assert relative(reverse.transposed().output_jacobian(v), apply(exact, v)) < 1e-14
    assert relative(forward.transposed().output_jacobian(v), apply(exact.mT, v)) < 1e-14
    central = FiniteDifferenceFisher(network, 1e-4, central=True)(state)
    assert relative(central.output_jacobian(v), apply(exact, v)) < 1e-7  # 1e-4 squared times third derivatives


@pytest.mark.parametrize("size", [2, 5, 12, 100])
def test_chunks_give_the_same_matrix(size):
    network = Network()
    state = state_of_network(network)
    reference, chunked = AutodiffFisher(network)(state), AutodiffFisher(network, chunk_size=size)(state)
    assert relative(chunked.dense(), reference.dense()) < 1e-14
    assert relative(chunked.trace().value, reference.trace().value) < 1e-14
    assert relative(chunked.diagonal().value, reference.diagonal().value) < 1e-14


def test_samples_in_channels_last_give_the_same_products():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 3, 3, padding=1)]
    model = torch.nn.Sequential(*layers).double().requires_grad_(False)
    state, v = state_of_network(lambda x, t: model(x)), latents(seed=2)
    last = state_of_network(lambda x, t: model(x), x=state.sample.to(memory_format=torch.channels_last))
    for forward_mode in (False, True):
        estimator = AutodiffFisher(lambda x, t: model(x), forward_mode=forward_mode, chunk_size=4)
        expected = estimator(state)
        assert relative(estimator(last).matvec(v.to(memory_format=torch.channels_last)), expected.matvec(v)) < 1e-12
        assert relative(estimator(last).dense(), expected.dense()) < 1e-12
        assert relative(estimator(last).diagonal().value, expected.diagonal().value) < 1e-12


def test_networks_without_a_batched_backward_take_vectors_one_at_a_time():
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.GroupNorm(2, 8), torch.nn.Conv2d(8, 3, 3, padding=1)]
    model = torch.nn.Sequential(*layers).double().requires_grad_(False)
    state = state_of_network(lambda x, t: model(x))
    expected = AutodiffFisher(lambda x, t: model(x))(state).dense()
    model.to(memory_format=torch.channels_last)
    chunked = AutodiffFisher(lambda x, t: model(x), chunk_size=5)(state)
    assert relative(chunked.dense(), expected) < 1e-12
    assert not chunked._batched  # Otherwise this torch has the batched backward pass, and the test tests nothing.


def failing(message):
    """Returns a network whose backward pass raises an error."""

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError(message)

    return lambda x, t: Failing.apply(x)


def test_errors_of_the_backward_pass_are_not_hidden():
    operator = AutodiffFisher(failing("out of luck"), chunk_size=4).without_comparison()(state_of_network())
    with pytest.raises(RuntimeError, match="out of luck"):
        operator.dense()


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_compiled_networks_that_free_their_graph_are_refused_with_advice(chunk_size):
    message = (  # the message of torch for a compiled function
        "This backward function was compiled with non-empty donated buffers which requires create_graph=False and "
        "retain_graph=False. Please keep backward(create_graph=False, retain_graph=False) across all backward() "
        "function calls, or set torch._functorch.config.donated_buffer=False to disable donated buffer."
    )
    operator = AutodiffFisher(failing(message), chunk_size=chunk_size).without_comparison()(state_of_network())
    with pytest.raises(UnsupportedError, match=r"Set torch\._functorch\.config\.donated_buffer = False before"):
        operator.dense()


def test_chunk_size_zero_is_refused():
    with pytest.raises(InputError, match="`chunk_size` is 0; allowed: at least 1"):
        AutodiffFisher(chunk_size=0)


def test_binding_keeps_the_mode():
    bound_estimator = AutodiffFisher(forward_mode=True, chunk_size=3).bind(Network())
    assert (bound_estimator.forward_mode, bound_estimator.chunk_size, bound_estimator.needs_graph) == (True, 3, False)


def test_forward_mode_builds_no_graph():
    network, modes = Network(), []

    def function(x, t):
        modes.append(torch.is_grad_enabled())
        return network(x, t)

    product = AutodiffFisher(function, forward_mode=True)(state_of_network(network)).matvec(latents(seed=2))
    assert modes == [False]
    assert not product.requires_grad


def test_forward_mode_needs_an_output_that_depends_on_its_input():
    def constant(x, t):
        return torch.ones_like(x.detach())

    with pytest.raises(InputError, match="does not depend on its input for forward-mode autograd; use AutodiffFisher"):
        AutodiffFisher(constant, forward_mode=True)(state_of_network()).matvec(latents(seed=2))


# Attention, group norms, guidance, packed (B, N, C) latents: tiny pipelines of the real classes, in float32.
@pytest.mark.parametrize(("name", "t"), [("SD", 300), ("SD guided", 300), ("SD3", 400.0), ("Flux", 400.0)])
def test_modes_agree_through_real_pipelines(name, t):
    case = PIPELINES[name]
    denoiser = PipelineDenoiser(case.make(), guidance_scale=case.guidance_scale, **case.arguments())
    state = denoiser.state(case.noise(), t)
    v, w = (latents(torch.float32, case.shape, seed) for seed in (2, 3))
    reverse, forward = AutodiffFisher(denoiser)(state), AutodiffFisher(denoiser, forward_mode=True)(state)
    product, adjoint = forward.output_jacobian(v), reverse.output_jacobian(w)
    size = (dot(w, w) * dot(product, product)).sqrt()
    assert bool(((dot(w, product) - dot(adjoint, v)).abs() < 1e-5 * size).all())
    assert relative(reverse.output_jacobian(v), product) > 0.5  # random weights: far from symmetric
    # Measured up to 5e-4: rounding of 1e-7 over the step, and truncation.
    central = FiniteDifferenceFisher(denoiser, 1e-2, central=True)(state)
    assert relative(central.output_jacobian(v), product) < 2e-3
    chunked = AutodiffFisher(denoiser, chunk_size=2)(state)
    assert relative(chunked.matmat(torch.stack([v, w]))[1], reverse.matvec(w)) < 1e-5
