"""The random draws of a likelihood: what they depend on, and the error that they leave."""

import math

import pytest
import torch
from cases import ORACLE_SHAPE, ORACLES, STABLE_DIFFUSION, relative
from diffusers import DDIMScheduler

from diffusers_fisher import AutodiffFisher, FiniteDifferenceFisher, InputError
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from diffusers_fisher.likelihood.draws import ImageDraws
from diffusers_fisher.likelihood.traces import level_error, trace_variance
from diffusers_fisher.seeds import content_key
from diffusers_fisher.testing import OracleDenoiser


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def likelihood(samples, **options):
    denoiser = OracleDenoiser(ORACLES["mixture"], DDIMScheduler(**STABLE_DIFFUSION))
    estimator = options.pop("estimator", AutodiffFisher)(denoiser)
    return integrate_log_likelihood(denoiser, samples, estimator, Integration(options.pop("num_steps", 12), **options))


def samples(count=4):
    return ORACLES["mixture"].sample(count, seeded(5))


@pytest.mark.parametrize("options", [{}, {"num_probes": 3}, {"fixed_probes": True, "num_probes": 2}, {"noised": True}])
def test_numbers_depend_on_seed_and_image_alone(options):
    x = samples()
    batch = likelihood(x, generator=seeded(1), **options).log_prob
    turned = likelihood(x.flip(0), generator=seeded(1), **options).log_prob.flip(0)
    alone = torch.cat([likelihood(row[None], generator=seeded(1), **options).log_prob for row in x])
    # The same float64 sums in another order.
    assert relative(turned, batch) < 1e-12
    assert relative(alone, batch) < 1e-12
    assert relative(likelihood(x, generator=seeded(2), **options).log_prob, batch) > 1e-4


def test_finer_grids_keep_the_directions_of_their_common_levels():
    draws = ImageDraws(samples(), seeded())
    coarse, fine = (likelihood(samples(), generator=seeded(1), num_steps=steps) for steps in (6, 12))
    assert relative(fine.noise_to_signal[::2], coarse.noise_to_signal) < 1e-12
    # The first node lies at the same point, so it has the same value; the path to the others depends on the steps.
    first = [out.unexplained_noise_fraction[0] for out in (coarse, fine)]
    assert relative(first[0], first[1]) < 1e-10
    assert torch.equal(draws.signs(2, "probes", "1.5"), draws.signs(2, "probes", "1.5"))
    assert not torch.equal(draws.signs(2, "probes", "1.5"), draws.signs(2, "probes", "1.6"))


def test_signs_are_even_and_independent():
    draws = ImageDraws(torch.zeros(2, 100, 50), seeded(), ["a", "b"])
    signs = draws.signs(4, "probes", "0").double().flatten(2).flatten(0, 1)
    assert bool((signs.abs() == 1).all())
    correlations = signs @ signs.T / 5000 - torch.eye(8)
    assert float(correlations.abs().max()) < 4.5 / 5000**0.5  # the largest of 28; one in 5,000 exceeds it
    assert float(signs.mean(1).abs().max()) < 4.5 / 5000**0.5


def test_keys_stand_for_images():
    x = samples(2)
    keys = [content_key(row) for row in x]
    named = likelihood(x, generator=seeded(), keys=keys).log_prob
    assert torch.equal(named, likelihood(x, generator=seeded()).log_prob)
    same = likelihood(x[:1].expand(2, *ORACLE_SHAPE), generator=seeded(), keys=["a", "a"])
    assert float(same.log_prob[0]) == float(same.log_prob[1])
    other = likelihood(x[:1].expand(2, *ORACLE_SHAPE), generator=seeded(), keys=["a", "b"])
    assert float(other.log_prob[0]) != float(other.log_prob[1])
    with pytest.raises(InputError, match="3 image keys were given for 2 images; give as many"):
        likelihood(x, keys=["a", "b", "c"])


def test_keys_of_contents_do_not_depend_on_strides_or_dtype_but_on_shape():
    x = torch.arange(12.0).view(3, 4)
    assert content_key(x.T) == content_key(x.T.contiguous())
    assert content_key(x.double()) == content_key(x)
    assert len({content_key(each) for each in (x, x.T, x.view(2, 6), x + 1)}) == 4


def test_global_seed_decides_without_a_generator():
    torch.manual_seed(3)
    first = likelihood(samples()).log_prob
    second = likelihood(samples()).log_prob
    torch.manual_seed(3)
    assert torch.equal(first, likelihood(samples()).log_prob)
    assert not torch.equal(first, second)


def test_differences_agree_with_derivatives_along_the_same_directions():
    by_graph = likelihood(samples(), generator=seeded())
    by_differences = likelihood(
        samples(), generator=seeded(), estimator=lambda denoiser: FiniteDifferenceFisher(denoiser, relative_step=1e-5)
    )
    # O(h) with h = 1e-5 |x| against s_0 = 0.03. The scatter by the directions themselves is 100 times larger.
    assert relative(by_differences.log_prob, by_graph.log_prob) < 1e-3
    assert relative(by_differences.standard_error, by_graph.standard_error) < 1e-2


def test_variance_from_one_direction_per_level():
    """Matrices that change slowly over the levels: the estimate against the variance in closed form."""
    levels, dimensions = 40, 200
    generator = seeded()
    basis = torch.randn(2, dimensions, dimensions, generator=generator, dtype=torch.float64) / dimensions**0.5
    basis = basis + basis.transpose(1, 2)
    diagonal = torch.linspace(0, 3, dimensions, dtype=torch.float64).diag()
    u = torch.linspace(0, 1, levels, dtype=torch.float64)[:, None, None]
    matrices = diagonal * (1 - u) + basis[0] * u + 0.5 * basis[1]
    signs = 2.0 * torch.randint(0, 2, (levels, dimensions), generator=generator) - 1
    products = (matrices @ signs.double()[..., None])[..., 0]
    diagonals = signs * products
    neighbours = (diagonals[1:] * diagonals[:-1]).sum(1, keepdim=True)
    traces = diagonals.sum(1, keepdim=True)
    estimate = trace_variance(products.square().sum(1, keepdim=True), neighbours, traces, 1)
    squares = matrices.square().sum((1, 2)) - matrices.diagonal(dim1=1, dim2=2).square().sum(1)
    # Every level's estimate scatters by 1/(2 sqrt(d)) = 4% and more; their sum by less, and has no bias.
    assert abs(float(estimate.sum() / (2 * squares).sum()) - 1) < 0.05
    assert relative(estimate[:, 0], 2 * squares) < 0.3


def test_variance_where_the_trace_changes_much_from_level_to_level():
    """The diagonals of neighbouring levels differ by a factor of 1.5, which would be taken for noise."""
    dimensions, factors = 400, 1.5 ** torch.arange(12, dtype=torch.float64)
    generator = seeded()
    noise = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64) / dimensions
    matrix = torch.linspace(0.5, 1.5, dimensions, dtype=torch.float64).diag() / dimensions + (noise + noise.T) / 100
    signs = 2.0 * torch.randint(0, 2, (12, dimensions), generator=generator) - 1
    products = factors[:, None] * (matrix @ signs.double()[..., None])[..., 0]
    diagonals = signs * products
    neighbours = (diagonals[1:] * diagonals[:-1]).sum(1, keepdim=True)
    traces = diagonals.sum(1, keepdim=True)
    estimate = trace_variance(products.square().sum(1, keepdim=True), neighbours, traces, 1)[:, 0] / factors.square()
    exact = 2 * (matrix.square().sum() - matrix.diagonal().square().sum())
    # Six seeds are within 0.05. Without the traces the estimate is below 0.
    assert abs(float(estimate.mean() / exact) - 1) < 0.15


@pytest.mark.parametrize("probes", [1, 2])
def test_scatter_over_levels_is_the_standard_error_of_the_sum(probes):
    levels, repetitions = 33, 4000
    course = torch.sin(torch.linspace(0, 3, levels, dtype=torch.float64))
    noise = torch.randn(levels, probes, repetitions, generator=seeded(), dtype=torch.float64)
    weights = torch.linspace(1, 2, levels, dtype=torch.float64)
    by_level = weights[:, None, None] * (course[:, None, None] + 0.1 * noise)
    error = level_error(by_level, weights)
    spread = by_level.mean(1).sum(0).std()
    # 33 levels: the mean square has no bias but for the course's bend, (3/32)^2/2 = 0.004 against 0.1.
    assert abs(float(error.square().mean().sqrt() / spread) - 1) < 0.05  # 4,000 repetitions scatter by 1.1%
    assert float(error.std() / error.mean()) < 0.2
    assert math.isfinite(float(error.max()))
