"""Targets, losses and draws of trace matching.

The loss is least at the conditional expectation, and the draws are the same for any number of processes.
"""

import itertools
import math

import pytest
import torch
from cases import ZERO_SNR, Network, SchedulerCase
from scipy.special import chdtr
from trace_cases import IMAGE, GaussianData, GaussianDenoiser

from diffusers_fisher import (
    AutodiffFisher,
    DenoisingState,
    FiniteDifferenceFisher,
    InputError,
    NoiseLevel,
    NumericalError,
)
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.fisher.trace_matching import noise_shares
from diffusers_fisher.models import FisherTraceOutput, trace_inputs
from diffusers_fisher.noise import Prediction, log_noise_to_signal_range
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.training.trace_losses import (
    TraceDraw,
    TraceObjective,
    draw_log_noise,
    draw_trace_batch,
    jacobian_target,
    mirrored_noise,
    noised_state,
    norm_target,
    residual_target,
    scale_free_loss,
    trace_loss,
)

SCHEDULERS = {
    "Stable Diffusion": SchedulerCase("DDIMScheduler", {}),
    "zero terminal SNR": SchedulerCase("DDIMScheduler", ZERO_SNR),
    "k-diffusion": SchedulerCase("EulerDiscreteScheduler", {}),
    "flow": SchedulerCase("FlowMatchEulerDiscreteScheduler", {}),
    "EDM": SchedulerCase("EDMEulerScheduler", {}),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def make(name="Stable Diffusion"):
    case = SCHEDULERS[name]
    return case.parent(**case.config)


def posterior_draws(data, log_noise, count):
    """Draws one x_t and `count` noises of its posterior: (state of the ideal denoiser, noise, x_0)."""
    level = NoiseLevel.from_log_noise_to_signal(torch.tensor(log_noise))
    x = (
        level.alpha * data.sample(1, seeded(5))
        + level.sigma * torch.randn(1, *data.shape, generator=seeded(6)).double()
    )
    inverse = 1 / data.noised(level)
    mean = data.mean + data.gain(x - level.alpha * data.mean, level.alpha * data.variance * inverse)
    spread = (data.variance * level.sigma**2 * inverse).sqrt()
    clean = mean + data.gain(torch.randn(count, *data.shape, generator=seeded(7), dtype=torch.float64), spread)
    noise = (x - level.alpha * clean) / level.sigma
    epsilon = data.gain(level.sigma * (x - level.alpha * data.mean), inverse)
    state = DenoisingState(x.expand_as(clean), epsilon.expand_as(clean), level, Prediction("epsilon"))
    return state, noise, clean


def mean_is_close(values, exact, errors=5):
    """Returns whether the mean of independent values (n, ...) is within some standard errors of `exact`."""
    return bool(((values.mean(0) - exact).abs() < errors * values.std(0) / len(values) ** 0.5).all())


# Targets


@pytest.mark.parametrize("log_noise", [-2.0, 0.0, 2.0])
@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_residual_is_r_on_average_over_the_posterior(basis, log_noise):
    data = GaussianData(basis=basis)
    state, noise, _ = posterior_draws(data, log_noise, 20000)
    y = residual_target(state, noise)
    assert y.shape == (20000,)
    assert mean_is_close(y, data.r(state.level, 1))
    assert not mean_is_close(y, 1.05 * data.r(state.level, 1))  # the test notices an error of 5%
    diagonal = residual_target(state, noise, basis)
    assert diagonal.shape == noise.shape
    assert mean_is_close(diagonal, (1 - data.shares(state.level))[0])


def test_denoiser_s_bias_enters_the_residual_by_its_square():
    data = GaussianData()
    state, noise, _ = posterior_draws(data, 0.0, 50000)
    bias = 0.2 * torch.randn(data.shape, generator=seeded(), dtype=torch.float64)
    biased_state = DenoisingState(state.sample, state.model_output + bias, state.level, state.prediction)
    assert mean_is_close(residual_target(biased_state, noise), data.r(state.level, 1) + bias.square().mean())


@pytest.mark.parametrize("log_noise", [-2.0, 0.0, 2.0])
def test_norm_gives_r_through_the_denoiser_s_own_clean_sample(log_noise):
    data = GaussianData()
    state, _, clean = posterior_draws(data, log_noise, 20000)
    y = norm_target(clean)
    moment = state.pred_original_sample[0].square().mean() + state.level.noise_to_signal**2 * data.r(state.level, 1)
    assert mean_is_close(y, moment)
    output = FisherTraceOutput(second_moment=moment.float().expand(len(clean)))
    share = noise_shares(output, state)[0]
    # float32 moments of order one, multiplied by the signal-to-noise ratio, at most 55
    assert torch.allclose(share, data.r(state.level, len(clean)), atol=1e-5)


def all_signs(shape):
    """Returns every vector of signs, (2^d, *shape)."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=math.prod(shape))), dtype=torch.float64).view(
        -1, *shape
    )


@pytest.mark.parametrize("basis", [None, "pixel", "dct"])
def test_jacobian_target_is_unbiased(basis):
    """The mean over all vectors of signs is exactly 1 - sigma tr J/d. In a basis this holds for each coordinate."""
    shape = (1, 2, 3)
    probes = all_signs(shape)
    network, level = Network(6), NoiseLevel.from_log_noise_to_signal(torch.tensor(-0.3))
    x = torch.randn(1, *shape, generator=seeded(), dtype=torch.float64).expand(len(probes), -1, -1, -1)
    state = DenoisingState(x, network(x, 300), level, Prediction("epsilon"), 300)
    exact = torch.func.jacrev(lambda x: network(x, 300))(x[:1]).view(6, 6)
    if basis == "dct":
        transform = GaussianData(shape, "dct").transform
        exact = transform.analyse(transform.analyse(exact).mT).mT
    shares = 1 - level.sigma * exact.diagonal()
    expected = shares.mean() if basis is None else shares.view(shape)
    for estimator in (AutodiffFisher(network), AutodiffFisher(network, forward_mode=True)):
        y = jacobian_target(estimator(state), probes, basis)
        assert y.shape == ((64,) if basis is None else probes.shape)
        assert torch.allclose(y.mean(0).double(), expected, atol=1e-6)  # float32
        assert float(y.std()) > 0.01
    differences = jacobian_target(FiniteDifferenceFisher(network, central=True)(state), probes, basis)
    assert torch.allclose(differences.mean(0).double(), expected, atol=1e-4)  # truncation, of the square of 1e-2


def test_targets_of_a_perfect_denoiser_agree():
    data, scheduler = GaussianData(), make()
    denoiser = GaussianDenoiser(data, scheduler)
    draw = draw_trace_batch(scheduler, IMAGE, 4, 0, 0, mirrored=False, with_probes=True)
    state = noised_state(denoiser, data.sample(4, seeded()), draw, with_graph=True)
    y = jacobian_target(AutodiffFisher()(state), draw.probes)
    # In pixels M is diagonal, so one probe is exact.
    assert torch.allclose(y.double(), data.r(state.level, 4), atol=1e-6)


# Losses


@pytest.mark.parametrize("floor", [0.0, 1e-2])
@pytest.mark.parametrize("mean", [0.003, 0.3, 0.98])
def test_scale_free_loss_is_least_at_the_mean(mean, floor):
    """This holds for every law of the target, with values below zero and above one too."""
    logits = torch.linspace(-8, 8, 1601, dtype=torch.float64)
    for spread in (0.0, 0.5):
        targets = mean + spread * torch.tensor([-1.0, -0.5, 1.5], dtype=torch.float64)
        losses = scale_free_loss(logits[:, None], targets, floor).mean(1)
        best_logit = logits[losses.argmin()]
        assert float(best_logit) == pytest.approx(math.log(mean / (1 - mean)), abs=0.011)  # the grid's step
        interior = losses[1:-1]
        minima = ((interior < losses[:-2]) & (interior < losses[2:])).sum()
        assert int(minima) == 1


def test_loss_counts_relative_errors_alike_at_both_ends():
    """A factor of 1.1 costs the same in r at large noise as in 1 - r at small noise, for all sizes of them."""
    costs = []
    for r in (1e-4, 1e-2):
        for sign in (1, -1):
            logit = sign * math.log(r / (1 - r))
            values = torch.tensor([logit, logit + sign * math.log(1.1)], dtype=torch.float64)
            exact = torch.sigmoid(values[0])
            low, high = scale_free_loss(values, exact)
            costs.append(float(high - low))
    assert max(costs) < 1.03 * min(costs)


@pytest.mark.parametrize("shape", [(), IMAGE])
def test_squared_weight_adds_the_squared_error_of_the_trace(shape):
    generator = seeded()
    output = FisherTraceOutput(logits=torch.randn(3, *shape, generator=generator))
    target = torch.rand(3, *shape, generator=generator)
    difference = trace_loss(output, target, 1e-2, squared_weight=100.0) - trace_loss(output, target, 1e-2)
    r, y = (each.view(3, -1).mean(1) for each in (torch.sigmoid(output.logits), target))
    assert torch.allclose(
        difference, 100 * (r - y).square(), atol=1e-5
    )  # float32 differences of losses of a few units


@pytest.mark.parametrize("kind", ["trace", "diagonal", "norm"])
def test_loss_is_least_at_the_truth_on_gaussian_data(kind):
    """The mean loss over posterior draws is least where the model's output is not shifted."""
    data = GaussianData()
    settings = {"norm": {"target": "norm"}, "diagonal": {"output": "diagonal"}, "trace": {}}[kind]
    model = data.model(**settings)
    for log_noise in (-1.5, 1.0):
        state, noise, clean = posterior_draws(data, log_noise, 20000)
        exact = model.evaluate(state)
        target = (
            norm_target(clean)
            if kind == "norm"
            else residual_target(state, noise, "pixel" if kind == "diagonal" else None)
        )
        losses = {}
        for shift in (-0.1, 0.0, 0.1):
            if kind == "norm":
                output = FisherTraceOutput(second_moment=exact.second_moment + shift)
            else:
                output = FisherTraceOutput(logits=exact.logits + shift)
            losses[shift] = [float(trace_loss(output, target, 0.0, weight).mean()) for weight in (0.0, 100.0)]
        for weight in (0, 1):
            assert losses[0.0][weight] < min(losses[-0.1][weight], losses[0.1][weight])


def test_gradient_at_the_truth_vanishes_on_average():
    data = GaussianData()
    state, noise, _ = posterior_draws(data, 0.5, 40000)
    logits = data.model().evaluate(state).logits.requires_grad_()
    (gradient,) = torch.autograd.grad(
        trace_loss(FisherTraceOutput(logits=logits), residual_target(state, noise)).sum(), logits
    )
    assert mean_is_close(gradient, 0.0)


# Draws


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_are_half_uniform_in_their_logarithm_and_half_in_time(name):
    scheduler = make(name)
    low, high = log_noise_to_signal_range(scheduler)
    levels = draw_log_noise(scheduler, 4000, seeded())
    assert levels.dtype is torch.float64
    assert low <= float(levels.min()) < low + 0.01 * (high - low)
    assert high - 0.01 * (high - low) < float(levels.max()) <= high
    by_log = draw_log_noise(scheduler, 4000, seeded(), log_fraction=1.0).sort().values
    assert torch.allclose(by_log, torch.linspace(low, high, 4000, dtype=torch.float64), atol=(high - low) / 4000)
    by_time = draw_log_noise(scheduler, 4000, seeded(), log_fraction=0.0)
    quantiles = torch.cat([by_log, by_time]).quantile(torch.tensor([0.1, 0.5, 0.9]).double())
    assert torch.allclose(levels.quantile(torch.tensor([0.1, 0.5, 0.9]).double()), quantiles, atol=0.01)  # strata
    assert not torch.equal(levels, levels.sort().values)


@pytest.mark.parametrize("dimensions", [3, 256, 20000])
def test_mirrored_noise_is_noise_of_the_opposite_direction_and_quantile(dimensions):
    noise = torch.randn(2000 if dimensions < 1000 else 50, dimensions, generator=seeded(), dtype=torch.float64)
    mirrored = mirrored_noise(noise)
    norms, mirrored_norms = noise.square().sum(1), mirrored.square().sum(1)
    assert torch.allclose(mirrored / mirrored_norms.sqrt()[:, None], -noise / norms.sqrt()[:, None])
    quantiles = [torch.from_numpy(chdtr(dimensions, value.numpy())) for value in (norms, mirrored_norms)]
    assert torch.allclose(sum(quantiles), torch.ones(len(noise), dtype=torch.float64), atol=1e-9)
    assert torch.allclose(mirrored_noise(mirrored), noise, rtol=1e-6)
    if dimensions == 256:  # only the skewness of chi-square is left of the fluctuation
        relative = (norms / dimensions - 1).std()
        assert float(relative) == pytest.approx((2 / dimensions) ** 0.5, rel=0.1)
        assert float(((norms + mirrored_norms) / (2 * dimensions) - 1).std()) < 0.06 * float(relative)


def test_mirrored_pairs_tell_one_minus_r_at_small_noise():
    """The mean of 1 - y over a pair scatters by a tenth of 1 - r, and 1 - y of one draw scatters by twice 1 - r."""
    data, scheduler = GaussianData((1, 16, 16)), make()
    data.variance.fill_(0.04)
    denoiser, clean = GaussianDenoiser(data, scheduler), data.sample(200, seeded())
    spread = {}
    for mirrored in (True, False):
        batch = draw_trace_batch(scheduler, data.shape, 200, 0, 0, mirrored=mirrored)
        draw = TraceDraw(torch.full_like(batch.log_noise, math.log(0.0413)), batch.noise, batch.copies)
        state = noised_state(denoiser, draw.repeat(clean), draw)
        share = (1 - residual_target(state, draw.noise)).view(draw.copies, 200).mean(0)
        spread[mirrored] = float(share.std() / (1 - data.r(state.level, len(state.sample))[0]))
    assert spread[True] < 0.15
    assert spread[False] > 1.5


@pytest.mark.parametrize("mirrored", [True, False])
@pytest.mark.parametrize("processes", [2, 3])
def test_number_of_processes_changes_nothing(processes, mirrored):
    options = {"mirrored": mirrored, "with_probes": True}
    batch = draw_trace_batch(make(), IMAGE, 6, 3, 1, **options)
    share = 6 // processes
    pieces = [
        draw_trace_batch(make(), IMAGE, 6, 3, 1, slice(rank * share, (rank + 1) * share), **options)
        for rank in range(processes)
    ]
    assert batch.copies == (2 if mirrored else 1)
    for name in ("log_noise", "noise", "probes"):
        parts = [getattr(piece, name).unflatten(0, (batch.copies, share)) for piece in pieces]
        assert torch.equal(torch.cat(parts, dim=1).flatten(0, 1), getattr(batch, name))


def test_draws_depend_on_step_and_seed():
    draws = [draw_trace_batch(make(), IMAGE, 4, step, seed) for step, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert torch.equal(draws[0].noise, draws[3].noise)
    for other in draws[1:3]:
        assert not bool((draws[0].noise == other.noise).any())
        assert not bool((draws[0].log_noise == other.log_noise).any())
    assert torch.equal(draws[0].repeat(torch.arange(4)), torch.arange(4).repeat(2))


def test_draws_leave_the_global_generator_unchanged():
    before = torch.get_rng_state()
    draw_trace_batch(make(), IMAGE, 4, 0, 0, with_probes=True)
    assert torch.equal(torch.get_rng_state(), before)


# One training step


@pytest.mark.parametrize("kind", ["residual", "jacobian", "norm", "residual diagonal", "jacobian diagonal"])
def test_gradients_of_two_processes_average_to_those_of_one(kind):
    target, *output = kind.split()
    data, scheduler = GaussianData(basis="dct"), make()
    model = data.model(target=target, output="diagonal" if output else "trace", pooled_channels=3)
    denoiser = GaussianDenoiser(data, scheduler)
    objective = TraceObjective(model.config, AutodiffFisher(denoiser))
    samples, pooled = data.sample(4, seeded()).float(), torch.randn(4, 3, generator=seeded())

    def gradient(rows):
        draw = draw_trace_batch(scheduler, IMAGE, 4, 0, 0, rows, with_probes=True)
        losses = objective(model, denoiser, samples[rows], draw, pooled[rows])
        assert losses.shape == (len(draw.noise),)
        return torch.autograd.grad(losses.mean(), list(model.head.parameters()))

    full_gradient, first, second = gradient(slice(None)), gradient(slice(0, 2)), gradient(slice(2, 4))
    for all_, one, two in zip(full_gradient, first, second, strict=True):
        assert torch.allclose(all_, (one + two) / 2, rtol=1e-3, atol=1e-5)
    assert max(float(part.abs().max()) for part in full_gradient) > 0


@pytest.mark.parametrize("target", ["residual", "jacobian"])
def test_training_finds_what_the_prior_does_not_know(target):
    """The data are Gaussian with two scales, so r depends on the sample."""
    scheduler = make()

    class Scales(Denoiser):
        """The ideal denoiser of x_0 ~ N(0, v I) with v = 0.02 or 0.5, equally likely. It is differentiable."""

        variances = torch.tensor([0.02, 0.5])

        def parts(self, x, level):
            alpha, sigma = (value.view(-1, 1).to(x) for value in (level.alpha, level.sigma))
            total = alpha**2 * self.variances.to(x) + sigma**2
            flat, size = x.flatten(1), x[0].numel()
            log = -0.5 * flat.square().sum(1, keepdim=True) / total - 0.5 * size * total.log()
            return log.softmax(1), total, sigma

        def model_output(self, x, timestep):
            weights, total, sigma = self.parts(x, self.level(timestep))
            return ((weights / total).sum(1, keepdim=True) * sigma * x.flatten(1)).view_as(x)

        def sample(self, count, generator):
            scale = self.variances[torch.randint(2, (count,), generator=generator)].sqrt()
            return scale.view(-1, 1, 1, 1) * torch.randn(count, *IMAGE, generator=generator)

    denoiser = Scales(scheduler)
    data = GaussianData()
    data.mean.zero_()
    data.variance.fill_(0.26)
    model = data.model(target=target).train()
    objective = TraceObjective(model.config, AutodiffFisher(denoiser))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    def error():
        draw = draw_trace_batch(scheduler, IMAGE, 500, 0, 9, mirrored=False)
        state = noised_state(denoiser, denoiser.sample(500, seeded(4)), draw)
        trace = AutodiffFisher(denoiser)(state).trace().value
        exact = 1 - state.level.sigma**2 * trace / 32
        return float((model.unexplained_noise_fraction(state) - exact).abs().mean())

    before = error()
    for step in range(150):
        draw = draw_trace_batch(scheduler, IMAGE, 32, step, 0, with_probes=target == "jacobian")
        samples = denoiser.sample(32, step_generator(0, "data", step))
        objective(model, denoiser, samples, draw).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert error() < 0.35 * before


# Bad input


def test_empty_batches_are_refused():
    for batch, rows in ((0, slice(None)), (4, slice(4, 8))):
        with pytest.raises(InputError, match=f"The batch has {batch} samples, 0 of them here"):
            draw_trace_batch(make(), IMAGE, batch, 0, 0, rows)


def test_targets_that_do_not_fit_the_model_are_refused():
    output = FisherTraceOutput(logits=torch.zeros(2, *IMAGE))
    with pytest.raises(
        InputError, match=r"output has shape \(2, 2, 4, 4\), the target \(2,\).*basis=model.config.basis"
    ):
        trace_loss(output, torch.zeros(2))


def test_jacobian_needs_an_estimator_and_probes():
    data = GaussianData()
    model = data.model(target="jacobian")
    with pytest.raises(InputError, match="needs an estimator"):
        TraceObjective(model.config)
    denoiser = GaussianDenoiser(data, make())
    objective = TraceObjective(model.config, AutodiffFisher(denoiser))
    with pytest.raises(InputError, match="needs probes; draw the batch with `with_probes=True`"):
        objective(model, denoiser, data.sample(2, seeded()).float(), draw_trace_batch(make(), IMAGE, 2, 0, 0))


def test_a_step_with_numbers_that_are_not_finite_raises():
    data = GaussianData()
    denoiser, model = GaussianDenoiser(data, make()), data.model()
    draw = draw_trace_batch(make(), IMAGE, 2, 0, 0)
    samples = data.sample(2, seeded()).float()
    objective = TraceObjective(model.config)
    with pytest.raises(NumericalError, match="The denoiser's output is not finite"):
        objective(model, denoiser, samples * float("nan"), draw)
    with torch.no_grad():
        model.head.last.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="The loss is not finite at log"):
        objective(model, denoiser, samples, draw)


def test_states_have_a_graph_only_with_with_graph():
    data = GaussianData()
    denoiser, draw = GaussianDenoiser(data, make()), draw_trace_batch(make(), IMAGE, 2, 0, 0)
    clean = draw.repeat(data.sample(2, seeded()).float())
    assert not noised_state(denoiser, clean, draw).model_output.requires_grad
    with_graph = noised_state(denoiser, clean, draw, with_graph=True)
    assert with_graph.model_output.requires_grad
    assert not any(value.requires_grad for value in trace_inputs(with_graph).values())
