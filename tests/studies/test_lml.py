"""Levenberg-Marquardt-Langevin: small cases by hand, its limits, and everything that a diffusers scheduler does."""

import inspect
import warnings

import diffusers
import pytest
import torch
from cases import STABLE_DIFFUSION, Network, latents, relative, sampling_run

from diffusers_fisher import (
    Covariance,
    DenoisingState,
    GaussianMixture,
    InputError,
    LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler,
    LMLFlowMatchEulerDiscreteScheduler,
    NoiseLevel,
)
from diffusers_fisher.noise import Prediction, noise_level
from diffusers_fisher.studies.lml import DampedRankOneOperator, precondition

EXACT = 1e-12  # float64
VP = {**STABLE_DIFFUSION, "clip_sample": False}
CASES = {
    "DDIM": (LMLDDIMScheduler, VP),
    "DDIM v": (LMLDDIMScheduler, {**VP, "prediction_type": "v_prediction"}),
    "DDIM sample": (LMLDDIMScheduler, {**VP, "prediction_type": "sample"}),
    "DPM++": (LMLDPMSolverMultistepScheduler, STABLE_DIFFUSION),
    "DPM": (
        LMLDPMSolverMultistepScheduler,
        {**STABLE_DIFFUSION, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "flow": (LMLFlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
}
on_cases = pytest.mark.parametrize("name", CASES)


def make(name, **options):
    cls, config = CASES[name]
    return cls(**config, **options)


def parent_of(name):
    cls, config = CASES[name]
    return cls.__mro__[2](**config)


def state(shape):
    level = NoiseLevel(torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64))
    return DenoisingState(latents(shape=shape), latents(shape=shape), level, Prediction("epsilon"), 300)


def test_a_direction_in_two_dimensions_is_that_by_hand():
    epsilon = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    previous = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    # m = (0.5, 1); lambda = 0.25 * 2; eps - m * 0.5/(0.5 + 1.25) = (0.857..., -0.2857...), brought to length one.
    result = precondition(epsilon, previous, state((1, 2)), damping=0.25, kappa=0.5)
    expected = torch.tensor([[6.0, -2.0]], dtype=torch.float64) / 40**0.5
    torch.testing.assert_close(result, expected, rtol=EXACT, atol=EXACT)


def test_first_order_is_an_extrapolation_by_kappa_over_lambda():
    """docs/lml.md uses eps' = eps + (kappa/lambda) D without the part along eps. D is the change of eps per step."""
    epsilon, change = latents(shape=(2, 3, 2, 2)), latents(shape=(2, 3, 2, 2), seed=2)
    epsilon *= (12 / epsilon.flatten(1).square().sum(1)).sqrt()[:, None, None, None]  # |eps|^2 = d
    across = change - (change * epsilon).flatten(1).sum(1)[:, None, None, None] / 12 * epsilon
    errors = []
    for size in (1e-3, 1e-4):
        result = precondition(epsilon, epsilon - size * change, state((2, 3, 2, 2)), damping=0.8, kappa=0.3)
        errors.append(float((result - epsilon - 0.3 / 0.8 * size * across).norm()))
    assert errors[1] < 1e-6
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)  # the rest is of second order


def test_operator_and_its_inverse_are_the_matrix():
    at, m = state((2, 3, 2, 2)), latents(seed=8)
    damping = torch.tensor([0.7, 4.0], dtype=torch.float64)
    operator, v = DampedRankOneOperator(at, damping, m), latents(seed=9)
    rows = m.flatten(1)
    matrix = damping[:, None, None] * torch.eye(12, dtype=torch.float64) + rows[:, :, None] * rows[:, None]
    assert relative(operator.dense(), matrix) < EXACT
    assert relative(operator.solve(v).flatten(1), torch.linalg.solve(matrix, v.flatten(1))) < EXACT
    assert relative(operator.matvec(operator.solve(v)), v) < EXACT


@on_cases
def test_large_lambda_is_the_parent(name):
    x, network = latents(), Network()
    expected = sampling_run(parent_of(name), network, x)[-1]
    errors = [relative(sampling_run(make(name, lml_lambda=value), network, x)[-1], expected) for value in (1e2, 1e4)]
    assert errors[1] < 1e-4
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # first order in 1/lambda
    assert relative(sampling_run(make(name), network, x)[-1], expected) > 1e-4  # and the default is another sampler


@on_cases
def test_kappa_zero_is_the_parent_bit_for_bit_with_a_warning(name):
    with pytest.warns(UserWarning, match="`lml_kappa` is 0: .* this is the parent scheduler"):
        scheduler = make(name, lml_kappa=0.0)
    x, network = latents(torch.float32), Network(dtype=torch.float32)
    pairs = zip(sampling_run(scheduler, network, x), sampling_run(parent_of(name), network, x), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@on_cases
@pytest.mark.parametrize("fraction", [0.5, 1.0])
def test_steps_within_the_freeze_are_those_of_the_parent(name, fraction):
    x, network = latents(), Network()
    ours = sampling_run(make(name, lml_freeze=fraction), network, x)
    theirs = sampling_run(parent_of(name), network, x)
    same = [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert same == [True] * round(6 * fraction) + [False] * (6 - round(6 * fraction))


def test_direction_keeps_its_length_and_does_not_depend_on_other_samples():
    epsilon, previous = latents(shape=(3, 3, 2, 2)), latents(shape=(3, 3, 2, 2), seed=2)
    result = precondition(epsilon, previous, state((3, 3, 2, 2)), damping=0.05, kappa=0.5)
    torch.testing.assert_close(result.flatten(1).norm(dim=1), epsilon.flatten(1).norm(dim=1), rtol=EXACT, atol=0)
    cosines = torch.cosine_similarity(result.flatten(1), epsilon.flatten(1))
    assert bool((cosines < 0.99).all())
    for index in range(3):
        row = slice(index, index + 1)
        single = precondition(epsilon[row], previous[row], state((1, 3, 2, 2)), damping=0.05, kappa=0.5)
        assert relative(single, result[row]) < EXACT


def test_a_step_of_ddim_is_that_by_hand():
    """x_0 stays and the noise turns: the result of the second step is alpha_prev x_0 + sigma_prev eps'."""
    scheduler, network, x = make("DDIM", lml_lambda=0.3, lml_kappa=0.4), Network(), latents()
    first = sampling_run(parent_of("DDIM"), network, x)[0]
    result = sampling_run(scheduler, network, x)
    assert torch.equal(result[0], first)  # the first step has no previous step
    t, following = scheduler.timesteps[1], scheduler.timesteps[2]
    alpha, sigma = (scheduler.alphas_cumprod[t] ** 0.5, (1 - scheduler.alphas_cumprod[t]) ** 0.5)
    epsilon, previous = network(first, t), network(x, scheduler.timesteps[0])
    m = 0.4 * previous + 0.6 * epsilon
    inner, size = ((m * other).flatten(1).sum(1)[:, None, None, None] for other in (epsilon, m))
    direction = epsilon - m * inner / (0.3 * 12 + size)
    direction = direction * (epsilon.flatten(1).norm(dim=1) / direction.flatten(1).norm(dim=1))[:, None, None, None]
    bar = scheduler.alphas_cumprod[following]
    expected = bar**0.5 * (first - sigma * epsilon) / alpha + (1 - bar) ** 0.5 * direction
    assert relative(result[1], expected) < 1e-6  # the scheduler's own table is float32


def test_lml_does_not_converge_to_the_solution_of_the_ode():
    """With an exact score the error of DDIM falls with the number of steps, and that of LML stays (docs/lml.md)."""
    mixture = GaussianMixture(latents(shape=(5, 3, 2, 2), seed=4), Covariance.isotropic(0.05, (3, 2, 2)))

    def solve(cls, steps, **options):
        scheduler = cls(**VP, timestep_spacing="trailing", **options)
        network = lambda x, t: mixture.epsilon(x, noise_level(scheduler, t))  # noqa: E731
        return sampling_run(scheduler, network, latents(shape=(32, 3, 2, 2)), steps)[-1]

    solution = solve(diffusers.DDIMScheduler, 250)
    ddim = [relative(solve(diffusers.DDIMScheduler, steps), solution) for steps in (10, 40)]
    lml = [relative(solve(LMLDDIMScheduler, steps, lml_kappa=0.5), solution) for steps in (10, 40)]
    assert ddim[1] < 0.7 * ddim[0]
    assert lml[0] > 1.5 * ddim[0]
    assert lml[1] > max(3 * ddim[1], 0.7 * lml[0])


@on_cases
def test_a_run_does_not_depend_on_the_runs_before(name):
    scheduler, network = make(name), Network()
    first = sampling_run(scheduler, network, latents())
    sampling_run(scheduler, network, latents(shape=(5, 3, 2, 2)))  # another batch size
    repeat = sampling_run(scheduler, network, latents())
    assert all(torch.equal(a, b) for a, b in zip(first, repeat, strict=True))
    single = sampling_run(scheduler, network, latents()[:1])
    assert relative(single[-1], first[-1][:1]) < EXACT  # batch independence of whole runs


@on_cases
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)], ids=str)
def test_half_precision_gives_finite_and_accurate_samples(name, dtype, tolerance):
    scheduler, x = make(name, lml_lambda=1e-3), latents()
    reference = sampling_run(scheduler, Network(), x.to(dtype).double())
    network = Network(dtype=torch.float32)
    half = sampling_run(scheduler, lambda sample, t: network(sample.float(), t).to(dtype), x.to(dtype))
    assert all(value.dtype is dtype and bool(torch.isfinite(value).all()) for value in half)
    # Outputs rounded to eleven or eight bits, six steps; a strongly damped inverse multiplies the rounding.
    assert relative(half[-1], reference[-1]) < 10 * tolerance


@on_cases
def test_it_is_saved_and_loaded_as_a_diffusers_scheduler(name, tmp_path):
    cls, config = CASES[name]
    parent = cls.__mro__[2]
    scheduler = make(name, lml_lambda=0.7, lml_kappa=0.25, lml_freeze=0.5)
    for method in ("step", "set_timesteps"):
        assert inspect.signature(getattr(cls, method)) == inspect.signature(getattr(parent, method))
    scheduler.save_pretrained(tmp_path)
    result = cls.from_pretrained(tmp_path)
    lml_keys = ("lml_lambda", "lml_kappa", "lml_freeze")
    assert [result.config[key] for key in lml_keys] == [0.7, 0.25, 0.5]
    parent_keys = [key for key in parent(**config).config if not key.startswith("_")]
    assert {key: result.config[key] for key in parent_keys} == {
        key: parent(**config).config[key] for key in parent_keys
    }
    back = parent.from_config(result.config)
    assert type(back) is parent
    from_parent = cls.from_config(parent(**config).config)
    assert from_parent.config.lml_kappa == 0.1
    assert cls.__module__ == "diffusers_fisher"


def test_it_runs_in_a_stock_pipeline_and_in_a_differentiable_run():
    import tiny

    from diffusers_fisher import DirectFisher, fisher_scheduler

    pipe = tiny.stable_diffusion()
    pipe.scheduler = fisher_scheduler(LMLDDIMScheduler).from_config(pipe.scheduler.config)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe("a b", latents=noise, num_inference_steps=4, output_type="latent").images
    with pipe.scheduler.differentiable(DirectFisher()) as trajectory:
        images = pipe("a b", latents=noise, num_inference_steps=4, output_type="latent").images
    assert torch.equal(images.detach(), expected)
    assert bool(torch.isfinite(trajectory.gradient(images.sum())).all())


@pytest.mark.parametrize(
    ("option", "value", "match"),
    [
        ("lml_lambda", 0.0, "`lml_lambda` is 0.0; allowed: a positive number"),
        ("lml_lambda", float("nan"), "`lml_lambda` is nan; allowed: a positive number"),
        ("lml_kappa", 1.0, "`lml_kappa` is 1.0; allowed: 0 to less than 1"),
        ("lml_kappa", -0.1, "`lml_kappa` is -0.1; allowed: 0 to less than 1"),
        ("lml_freeze", 1.5, "`lml_freeze` is 1.5; allowed: 0 to 1"),
    ],
)
def test_options_outside_their_range_raise_an_error(option, value, match):
    with pytest.raises(InputError, match=match):
        LMLDDIMScheduler(**{option: value})


def test_default_options_raise_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(LMLDDIMScheduler(), diffusers.DDIMScheduler)
