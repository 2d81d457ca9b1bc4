"""Random probes, stochastic traces and diagonals: means, standard errors, variances and costs."""

import pytest
import torch
from cases import Network, latents, relative

from diffusers_fisher import AutodiffFisher, FiniteDifferenceFisher, InputError, Probes
from diffusers_fisher.fisher import antithetic, gaussian, orthogonal, rademacher

from .problems import MatrixOperator, state_of_network


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise_covariance(eigenvalues, seed=6):
    """Returns F = (I - M)/sigma^2 on (2, 1, ...) samples, where M has these eigenvalues and random eigenvectors."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    dimensions = len(eigenvalues)
    normal = torch.randn(2, dimensions, dimensions, generator=seeded(seed), dtype=torch.float64)
    basis = torch.linalg.qr(normal)[0]
    m = basis * eigenvalues @ basis.mT
    state = state_of_network(Network(dimensions), x=latents(shape=(2, 1, dimensions // 4, 4)))
    matrix = (torch.eye(dimensions, dtype=torch.float64) - m) / state.level.sigma**2
    return MatrixOperator(state, (matrix + matrix.mT) / 2)


def exact_trace(operator):
    return operator.matrix.diagonal(dim1=1, dim2=2).sum(1)


# Probes

KINDS = {
    "rademacher": rademacher,
    "gaussian": gaussian,
    "orthogonal": lambda count, like, generator: orthogonal(count, like, generator, group=5),
    "orthogonal, whole basis": lambda count, like, generator: orthogonal(count, like, generator, group=12),
    "antithetic": lambda count, like, generator: antithetic(gaussian(count // 2, like, generator)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_probes_have_mean_zero_and_identity_covariance(kind):
    count = 6000
    vectors = KINDS[kind](count, latents(), seeded()).vectors.flatten(2)
    assert vectors.shape == (count, 2, 12)
    # Entries of the moments scatter by at most sqrt(2 * 2/count) (pairs count once; squares of normals have variance
    # 2); five of these, and more than a hundredth of one, for the largest of 12 and 144.
    scatter = (4 / count) ** 0.5
    mean, covariance = vectors.mean(0), torch.einsum("kbd,kbe->bde", vectors, vectors) / count
    assert float(mean.abs().max()) < 5 * scatter
    error = covariance - torch.eye(12, dtype=torch.float64)
    assert float(error.abs().max()) < 5 * scatter
    if "whole basis" not in kind:  # A whole basis has the identity as its covariance.
        assert float(error.abs().max()) > 0.01 * scatter
    cross = torch.einsum("kd,ke->de", vectors[:, 0], vectors[:, 1]) / count  # There is one set per sample.
    assert 0.01 * scatter < float(cross.abs().max()) < 5 * scatter


def test_orthogonal_probes_are_orthogonal_within_their_groups_alone():
    probes = orthogonal(20, latents(), seeded(), group=5)
    vectors = probes.vectors.flatten(2).permute(1, 0, 2)
    gram = (vectors @ vectors.mT).view(2, 4, 5, 4, 5)
    for group in range(4):
        assert relative(gram[:, group, :, group], 12 * torch.eye(5).expand(2, 5, 5)) < 1e-13  # float64 QR
    assert float(gram[:, 0, :, 1].abs().max()) > 1


@pytest.mark.parametrize(
    ("count", "group"), [(1, 1), (2, 1), (3, 1), (8, 4), (9, 3), (24, 12), (48, 12), (26, 2), (50, 10)]
)
def test_orthogonal_probes_make_two_groups_or_more(count, group):
    probes = orthogonal(count, latents(), seeded())
    assert (len(probes), probes.group) == (count, group)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_probes_depend_on_their_generator_alone_and_take_the_samples_dtype(kind, dtype):
    like = latents(dtype)
    first, repeat, other = (KINDS[kind](60, like, seeded(seed)).vectors for seed in (1, 1, 2))
    assert first.dtype is dtype
    assert torch.equal(first, repeat)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", KINDS)
def test_one_generator_per_sample_makes_probes_independent_of_the_batch(kind):
    batch = KINDS[kind](60, latents(), [seeded(1), seeded(2)])
    single = KINDS[kind](60, latents()[1:], [seeded(2)])
    # One float64 QR for another: LAPACK may block differently.
    assert relative(batch.vectors[:, 1:], single.vectors) < 1e-13


def test_antithetic_probes_are_pairs_inside_their_groups():
    base = orthogonal(6, latents(), seeded(), group=3)
    pairs = antithetic(base)
    assert (len(pairs), pairs.group) == (12, 6)
    assert torch.equal(pairs.vectors[0::2], base.vectors)
    assert torch.equal(pairs.vectors[1::2], -base.vectors)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda like: orthogonal(13, like, group=13), "`group` is 13; allowed: at most 12, the dimension of a sample"),
        (lambda like: orthogonal(8, like, group=3), "8 probes in groups of 3; allowed: one or more, in whole groups"),
        (lambda like: orthogonal(0, like), "number of probes is 0; allowed: at least 1, or None for the exact trace"),
        (lambda like: gaussian(-1, like), "number of probes is -1; allowed: at least 1"),
        (lambda like: Probes(like[None], group=2), "1 probes in groups of 2; allowed"),
        (lambda like: Probes(like[None], group=0), "1 probes in groups of 0; allowed"),
    ],
)
def test_impossible_probes_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        make(latents())


# Hutchinson


def gaussian_variance(matrix):
    return 2 * matrix.square().sum((1, 2))


def rademacher_variance(matrix):
    return gaussian_variance(matrix - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2)))


def sphere_variance(matrix):
    d = matrix.shape[-1]
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    return 2 * d / (d + 2) * (matrix.square().sum((1, 2)) - trace**2 / d)


def group_variance(size):
    """A group's values are negatively correlated, since a whole basis adds up to the trace: by -1/(d - 1) each."""
    return lambda matrix: sphere_variance(matrix) * (1 - (size - 1) / (matrix.shape[-1] - 1))


VARIANCES = {
    "rademacher": rademacher_variance,
    "gaussian": gaussian_variance,
    "orthogonal": group_variance(5),
    "antithetic": lambda matrix: 2 * gaussian_variance(matrix),  # A pair counts once.
}


@pytest.mark.parametrize("kind", VARIANCES)
def test_trace_is_unbiased_with_the_standard_error_of_its_probes(kind):
    operator, count = MatrixOperator(state_of_network()), 3000
    estimate = operator.trace(KINDS[kind](count, operator.state.sample, seeded()))
    error = (VARIANCES[kind](operator.matrix) / count).sqrt()
    deviation = (estimate.value - exact_trace(operator)).abs() / error
    assert bool((deviation < 4).all())
    assert bool((deviation > 1e-3).all())  # 1 in 600 for two samples
    # A standard deviation of 600 groups scatters by 3%, of squares of normals by 5%.
    assert relative(estimate.standard_error, error) < 0.15
    assert relative(estimate.values.mean(0), estimate.value) < 1e-13
    assert estimate.num_probes == count


def test_a_whole_orthogonal_basis_gives_the_exact_trace():
    operator = MatrixOperator(state_of_network())
    estimate = operator.trace(orthogonal(24, operator.state.sample, seeded()))
    assert estimate.values.shape == (2, 2)
    for value in estimate.values:
        assert relative(value, exact_trace(operator)) < 1e-13
    assert float(estimate.standard_error.max()) < 1e-12


def test_one_group_has_no_finite_standard_error():
    operator = MatrixOperator(state_of_network())
    for probes in (
        orthogonal(12, operator.state.sample, seeded(), group=12),
        antithetic(rademacher(1, operator.state.sample, seeded())),
    ):
        assert bool(torch.isinf(operator.trace(probes).standard_error).all())


def test_antithetic_probes_cancel_the_first_order_of_forward_differences():
    network = Network()
    state = state_of_network(network)
    probes = rademacher(20, state.sample, seeded())
    exact = AutodiffFisher(network)(state).trace(probes).value

    def errors(probes, central=False):
        for step in (4e-2, 2e-2):
            value = FiniteDifferenceFisher(network, step, central)(state).trace(probes).value
            yield float((value - exact).abs().sum())

    forward_errors, antithetic_errors, central_errors = (
        list(errors(probes)),
        list(errors(antithetic(probes))),
        list(errors(probes, central=True)),
    )
    assert forward_errors[0] / forward_errors[1] == pytest.approx(2, abs=0.2)  # first order
    assert antithetic_errors[0] / antithetic_errors[1] == pytest.approx(4, abs=0.4)  # second
    assert antithetic_errors[1] < 0.2 * forward_errors[1]
    assert antithetic_errors == pytest.approx(central_errors, rel=1e-9)  # Both make the same two evaluations.


# Hutch++


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "orthogonal"])
def test_sketched_trace_is_unbiased_with_the_right_standard_error(kind):
    operator, count = MatrixOperator(state_of_network()), 600
    sketch = gaussian(3, operator.state.sample, seeded(1))
    estimate = operator.trace(KINDS[kind](count, operator.state.sample, seeded()), sketch)
    assert bool(((estimate.value - exact_trace(operator)).abs() < 4 * estimate.standard_error).all())
    assert relative(estimate.values.mean(0), estimate.value) < 1e-13
    assert estimate.num_probes == count + 3
    # This is the exact error for random signs on the rest of the sketch.
    sigma, vectors = operator.state.level.sigma, sketch.vectors.flatten(2).permute(1, 2, 0)
    m = torch.eye(12, dtype=torch.float64) - sigma**2 * operator.matrix
    basis = torch.linalg.qr(m @ vectors)[0]
    complement = torch.eye(12, dtype=torch.float64) - basis @ basis.mT
    if kind == "rademacher":
        error = (rademacher_variance(complement @ m @ complement) / count).sqrt() / sigma**2
        assert relative(estimate.standard_error, error) < 0.15  # scatters by 3 to 4%


def test_sketched_trace_is_unbiased_over_sketches():
    operator, generator = MatrixOperator(state_of_network()), seeded()
    like = operator.state.sample
    values = torch.stack(
        [operator.trace(rademacher(2, like, generator), gaussian(2, like, generator)).value for _ in range(400)]
    )
    error = values.std(0) / 20
    assert bool(((values.mean(0) - exact_trace(operator)).abs() < 4 * error).all())
    assert bool((error > 0).all())


@pytest.mark.parametrize("make", [gaussian, rademacher], ids=["gaussian", "rademacher"])
def test_a_sketch_of_the_rank_gives_the_exact_trace(make):
    operator = noise_covariance([0.9, 0.5, 0.2] + 13 * [0.0])
    like = operator.state.sample
    for size in (3, 7):  # The trace stays exact with more vectors than the rank.
        estimate = operator.trace(rademacher(2, like, seeded()), make(size, like, seeded(1)))
        assert relative(estimate.value, exact_trace(operator)) < 1e-12
        assert float(estimate.standard_error.max()) < 1e-10
    estimate = operator.trace(rademacher(2, like, seeded()), make(2, like, seeded(1)))
    assert relative(estimate.value, exact_trace(operator)) > 1e-4


def test_a_sketch_has_less_variance_at_equal_products_where_eigenvalues_decay_fast():
    operator, generator = noise_covariance([0.5**index for index in range(64)]), seeded()
    like, exact = operator.state.sample, exact_trace(operator)
    probe_errors, sketch_errors, standard_errors = [], [], []
    for _ in range(100):  # 12 products each
        probe_errors.append(operator.trace(rademacher(12, like, generator)).value - exact)
        estimate = operator.trace(rademacher(4, like, generator), gaussian(4, like, generator))
        sketch_errors.append(estimate.value - exact)
        standard_errors.append(estimate.standard_error)
    probe_errors, sketch_errors, standard_errors = (
        torch.stack(values).square().mean().sqrt() for values in (probe_errors, sketch_errors, standard_errors)
    )
    assert float(sketch_errors / probe_errors) < 0.5  # measured 0.21 to 0.35 over seeds
    assert float(standard_errors / sketch_errors) == pytest.approx(1, abs=0.5)


def test_sketches_that_can_not_be_used_are_refused():
    operator = MatrixOperator(state_of_network())
    like = operator.state.sample
    probes = rademacher(2, like, seeded())
    with pytest.raises(InputError, match="A sketch needs probes for what it leaves; pass `probes` too, or neither"):
        operator.trace(sketch=probes)
    with pytest.raises(InputError, match="The sketch has 12 vectors in 12 dimensions; ask for the exact trace"):
        operator.trace(probes, gaussian(12, like, seeded()))
    with pytest.raises(
        InputError, match="sketch is the probes themselves, which biases the trace; draw it separately"
    ):
        operator.trace(probes, probes)
    with pytest.raises(InputError, match=r"Probes have shape \(3, 1, 3, 2, 2\); allowed: \(k, 2, 3, 2, 2\)"):
        operator.trace(probes, gaussian(3, like[:1], seeded()))


# Diagonals


@pytest.mark.parametrize("kind", ["rademacher", "gaussian", "orthogonal", "antithetic"])
def test_diagonal_estimate_is_unbiased_with_the_right_standard_error(kind):
    operator, count = MatrixOperator(state_of_network()), 4000
    estimate = operator.diagonal(KINDS[kind](count, operator.state.sample, seeded()))
    exact = operator.matrix.diagonal(dim1=1, dim2=2).view_as(operator.state.sample)
    assert estimate.value.shape == estimate.standard_error.shape == operator.state.sample.shape
    assert estimate.value.dtype is torch.float64
    deviation = (estimate.value - exact).abs() / estimate.standard_error
    assert 1 < float(deviation.max()) < 4.5  # the largest of 24; beyond 4.5: 2e-4
    if kind == "rademacher":
        rows = operator.matrix.square().sum(2) - operator.matrix.diagonal(dim1=1, dim2=2).square()
        assert relative(estimate.standard_error.flatten(1), (rows / count).sqrt()) < 0.05
    probes = KINDS[kind](100, operator.state.sample, seeded(1))
    total = operator.diagonal(probes).value.flatten(1).sum(1)
    assert relative(total, operator.trace(probes).value) < 1e-13  # the same products


def test_exact_diagonal_is_the_matrixs():
    operator = MatrixOperator(state_of_network())
    estimate = operator.diagonal()
    assert relative(estimate.value.flatten(1), operator.matrix.diagonal(dim1=1, dim2=2)) < 1e-13
    assert torch.count_nonzero(estimate.standard_error) == 0
    assert estimate.num_probes == 0


# Costs


ESTIMATES = {
    "exact trace": (lambda o, p, s: o.trace(), 12),
    "exact diagonal": (lambda o, p, s: o.diagonal(), 12),
    "trace": (lambda o, p, s: o.trace(p), 5),
    "diagonal": (lambda o, p, s: o.diagonal(p), 5),
    "sketched trace": (lambda o, p, s: o.trace(p, s), 5 + 2 * 3),
    "antithetic trace": (lambda o, p, s: o.trace(antithetic(p)), 10),
}
CALLS = {  # calls per state and per product
    "autodiff": (AutodiffFisher, 1, 0),
    "autodiff, in chunks": (lambda network: AutodiffFisher(network, chunk_size=4), 1, 0),
    "autodiff, forward mode": (lambda network: AutodiffFisher(network, forward_mode=True), 0, 1),
    "forward differences": (FiniteDifferenceFisher, 0, 1),
    "central differences": (lambda network: FiniteDifferenceFisher(network, central=True), 0, 2),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ESTIMATES)
def test_estimates_cost_the_calls_that_they_report(kind, name):
    network, timesteps = Network(), []

    def counting(x, t):
        timesteps.append(t)
        return network(x, t)

    make, calls_per_state, calls_per_product = CALLS[name]
    ask, products = ESTIMATES[kind]
    operator = make(counting)(state_of_network(network))
    probes, sketch = (gaussian(count, operator.state.sample, seeded(count)) for count in (5, 3))
    estimate = ask(operator, probes, sketch)
    assert estimate.num_denoiser_calls == len(timesteps) == calls_per_state + products * calls_per_product


def test_calls_of_combinations_add_up():
    network, timesteps = Network(), []

    def counting(x, t):
        timesteps.append(t)
        return network(x, t)

    state = state_of_network(network)
    operator = AutodiffFisher(counting)(state) + 2.0 * FiniteDifferenceFisher(counting, central=True)(state)
    estimate = operator.damped(0.1).trace(rademacher(3, state.sample, seeded()))
    assert estimate.num_denoiser_calls == len(timesteps) == 1 + 3 * 2
