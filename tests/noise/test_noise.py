"""Noise levels against the schedulers' own numbers, and conversions against their own predictions of x_0."""

import dataclasses
import inspect
import itertools
import math
from typing import Any

import diffusers
import pytest
import torch
from cases import CASES, OUTSIDE_CASES, STABLE_DIFFUSION, ZERO_SNR, Network, SchedulerCase, latents, model_input

from diffusers_fisher import DenoisingState, InputError, NoiseLevel, UnsupportedError, noise_level
from diffusers_fisher.noise import (
    expand,
    input_scale,
    log_noise_to_signal_at,
    log_noise_to_signal_range,
    prediction_of,
    state_of,
    timestep_at,
)

UNCLIPPED = [case for case in CASES + OUTSIDE_CASES if not {"clip_sample", "thresholding"} & set(case.changes)]
# Their tables and sigmas are float32 and 1 - alphas_cumprod cancels: measured up to 2e-6 of the sample's size.
FLOAT32 = 1e-5


@dataclasses.dataclass(frozen=True)
class Step:
    """Holds one step of a float32 run: the state before it, and the scheduler's own numbers."""

    state: DenoisingState
    run_sigma: torch.Tensor | None
    model_scale: torch.Tensor
    converted: torch.Tensor | None
    result: Any


def recorded_run(case: SchedulerCase, num_steps: int = 6) -> tuple[Any, list[Step]]:
    scheduler, network, x = case.parent(**case.config), Network(dtype=torch.float32), latents(torch.float32)
    scheduler.set_timesteps(num_steps)
    options = dict(case.step)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = torch.Generator().manual_seed(3)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    steps = []
    for t in scheduler.timesteps:
        output = network(model_input(scheduler, x, t), t)
        model_scale = model_input(scheduler, torch.ones(()), t)
        if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
            scheduler._init_step_index(t)
        index = getattr(scheduler, "step_index", None)
        state = state_of(scheduler, x, output, t, index or 0)
        sigma = scheduler.sigmas[index] if hasattr(scheduler, "sigmas") else None
        convert = getattr(scheduler, "convert_model_output", None)
        converted = None if convert is None else convert(output, sample=x)
        result = scheduler.step(output, t, x, **options)
        steps.append(Step(state, sigma, model_scale, converted, result))
        x = result.prev_sample
    return scheduler, steps


def assert_close(value: torch.Tensor, reference: torch.Tensor, size: torch.Tensor) -> None:
    scale = max(float(size.abs().max()), float(reference.abs().max()))
    assert float((value - reference).abs().max()) <= FLOAT32 * scale


def named(cases: list[SchedulerCase], *words: str) -> list[SchedulerCase]:
    return [case for case in cases if case.name.startswith(words)]


RETURN_ORIGINAL = ("DDIM", "DDPM", "Euler", "Heun", "KDPM2", "LMS", "EDMEuler")
CONVERT = ("DPMSolver", "EDMDPMSolver", "UniPC", "DEIS", "SASolver")
CONVERT_TO_EPSILON = {"deis", "dpmsolver", False}  # `algorithm_type` or `predict_x0` of solvers that integrate epsilon


@pytest.mark.parametrize("case", named(UNCLIPPED, *RETURN_ORIGINAL), ids=str)
def test_pred_original_sample_is_the_schedulers_own_at_every_step(case):
    for step in recorded_run(case)[1]:
        assert_close(step.state.pred_original_sample, step.result.pred_original_sample, step.state.sample)


@pytest.mark.parametrize("case", named(UNCLIPPED, *CONVERT), ids=str)
def test_conversion_is_the_solvers_own_at_every_step(case):
    scheduler, steps = recorded_run(case)
    form = scheduler.config.get("algorithm_type", scheduler.config.get("predict_x0"))
    for step in steps:
        value = step.state.epsilon if form in CONVERT_TO_EPSILON else step.state.pred_original_sample
        assert_close(value, step.converted, step.state.sample)


@pytest.mark.parametrize("case", named(UNCLIPPED, "LCM"), ids=str)
def test_pred_original_sample_gives_lcms_denoised_output(case):
    scheduler, steps = recorded_run(case)
    for step in steps:
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(step.state.timestep)
        denoised = skip * step.state.sample + out * step.state.pred_original_sample
        assert_close(denoised, step.result.denoised, step.state.sample)


@pytest.mark.parametrize("case", named(UNCLIPPED, "TCD"), ids=str)
def test_epsilon_and_original_give_tcds_noised_prediction(case):
    scheduler, steps = recorded_run(dataclasses.replace(case, step={"eta": 0.0}))
    previous = [int(t) for t in scheduler.timesteps[1:]] + [0]
    for step, t in zip(steps, previous, strict=True):
        alpha_bar = scheduler.alphas_cumprod[t]
        noised = alpha_bar.sqrt() * step.state.pred_original_sample + (1 - alpha_bar).sqrt() * step.state.epsilon
        assert_close(noised, step.result.pred_noised_sample, step.state.sample)


@pytest.mark.parametrize("case", named(UNCLIPPED, "PNDM"), ids=str)
def test_pndm_level_is_that_of_its_timestep_even_if_the_timestep_repeats(case):
    scheduler, steps = recorded_run(case)
    timesteps = [int(step.state.timestep) for step in steps]
    assert len(set(timesteps)) < len(timesteps)  # PNDM evaluates the model twice and more at one timestep
    for t, step in zip(timesteps, steps, strict=True):
        assert float(step.state.level.alpha**2) == pytest.approx(float(scheduler.alphas_cumprod[t]), rel=FLOAT32)


@pytest.mark.parametrize("case", named(UNCLIPPED, "FlowMatch"), ids=str)
def test_flow_matching_runs_take_the_runs_sigma(case):
    for step in recorded_run(case)[1]:
        state, sigma, output = step.state, step.run_sigma, step.state.model_output
        if case.changes.get("invert_sigmas"):  # time runs from noise to data: x = sigma x_0 + (1 - sigma) eps
            sigma, output = 1 - sigma, -output
        assert_close(state.pred_original_sample, state.sample - sigma * output, state.sample)
        assert_close(state.epsilon, state.sample + (1 - sigma) * output, state.sample)


@pytest.mark.parametrize("case", UNCLIPPED, ids=str)
def test_model_input_scale_is_the_schedulers_own_at_every_step(case):
    """This includes second stages, whose level lies between two of the run's sigmas for KDPM2."""
    scheduler, steps = recorded_run(case)
    for step in steps:
        assert float(input_scale(scheduler, step.state.level)) == pytest.approx(float(step.model_scale), rel=FLOAT32)


@pytest.mark.parametrize("case", UNCLIPPED, ids=str)
def test_sample_is_rebuilt_from_epsilon_and_original(case):
    for step in recorded_run(case)[1]:
        state = step.state
        if case.changes.get("prediction_type") == "sample" and state.level.sigma == 0:
            continue  # an x_0 prediction at sigma = 0 says nothing about the noise
        rebuilt = (
            expand(state.level.alpha, state.sample) * state.pred_original_sample
            + expand(state.level.sigma, state.sample) * state.epsilon
        )
        assert_close(rebuilt, state.sample, state.sample)


def test_karras_level_comes_from_the_run_and_not_from_the_rounded_timestep():
    case = SchedulerCase("DPMSolverMultistepScheduler", {"use_karras_sigmas": True})
    scheduler, steps = recorded_run(case, num_steps=10)
    differences = []
    for step in steps:
        assert float(step.state.level.noise_to_signal) == pytest.approx(float(step.run_sigma), rel=1e-9)
        rounded_ratio = noise_level(scheduler, step.state.timestep).noise_to_signal
        differences.append(abs(float(rounded_ratio / step.run_sigma) - 1))
    assert 0.01 < max(differences) < 0.1  # rounding the timestep costs some per cent at the clean end


def test_ddim_inverse_sample_lies_one_step_below_its_timestep():
    scheduler, steps = recorded_run(SchedulerCase("DDIMInverseScheduler", {}), num_steps=10)
    first, second = steps[0].state.level, steps[1].state.level
    assert float(first.alpha**2) == float(scheduler.initial_alpha_cumprod)
    assert torch.equal(second.alpha, noise_level(scheduler, scheduler.timesteps[0]).alpha)


def exact_table(beta_schedule: str, start: float = 0.00085, end: float = 0.012) -> torch.Tensor:
    """Returns alpha_bar of every timestep in float64, from the definitions of the schedules."""
    if beta_schedule == "squaredcos_cap_v2":
        bar = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(bar)]
    elif beta_schedule == "linear":
        betas = torch.linspace(start, end, 1000, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, 1000, dtype=torch.float64) ** 2
    return (1 - torch.as_tensor(betas, dtype=torch.float64)).cumprod(0)


VARIANCE_PRESERVING = ["DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"]


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_table_is_float64_recomputed_from_the_config(name, beta_schedule):
    scheduler = getattr(diffusers, name)(**{**STABLE_DIFFUSION, "beta_schedule": beta_schedule})
    alpha_bar, level = exact_table(beta_schedule), noise_level(scheduler, torch.arange(1000))
    # Two float64 sums of logarithms against products: a thousand roundings, and 1 - alpha_bar[0] loses three digits.
    torch.testing.assert_close(level.alpha**2, alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(level.sigma**2, 1 - alpha_bar, rtol=1e-10, atol=0)
    torch.testing.assert_close(level.alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=0)


def test_first_variance_is_beta_start_although_the_float32_table_differs():
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    assert float(noise_level(scheduler, 0).sigma ** 2) == pytest.approx(0.00085, rel=1e-12)
    assert float(1 - scheduler.alphas_cumprod[0]) != pytest.approx(0.00085, rel=1e-6)


OWN_BETAS = [{"trained_betas": [0.01, 0.02, 0.05, 0.3]}, {"beta_schedule": "sigmoid"}]


@pytest.mark.parametrize("changes", OWN_BETAS, ids=str)
def test_tables_without_a_formula_are_those_of_the_scheduler(changes):
    count = len(changes.get("trained_betas", range(1000)))
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=count, **changes)
    alpha = noise_level(scheduler, torch.arange(count)).alpha
    # Only the float32 table exists: converting it and back costs float64 roundings.
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)


def test_table_that_was_edited_on_the_scheduler_is_used():
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    alpha = noise_level(scheduler, torch.arange(1000)).alpha
    # Converting the table and back costs float64 roundings.
    torch.testing.assert_close(alpha**2, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_floor_under_a_zero_terminal_snr_is_the_schedulers_own(name):
    level = noise_level(getattr(diffusers, name)(**{**STABLE_DIFFUSION, **ZERO_SNR}), 999)
    assert float(level.noise_to_signal) == pytest.approx(2**12, rel=1e-6)  # alphas_cumprod[-1] = 2^-24


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr_has_alpha_zero_and_finite_conversions(kind):
    scheduler = diffusers.DDIMScheduler(**{**STABLE_DIFFUSION, **ZERO_SNR, "prediction_type": kind})
    x, output = latents(), latents(seed=2)
    state = state_of(scheduler, x, output, 999)
    assert float(state.level.alpha) == 0.0
    assert float(state.level.sigma) == 1.0
    assert math.isinf(float(state.level.noise_to_signal))
    assert torch.equal(state.epsilon, x)  # pure noise
    assert torch.equal(state.pred_original_sample, -output if kind == "v_prediction" else output)


def test_flow_at_its_noise_end_has_alpha_zero_and_finite_conversions():
    x, output = latents(), latents(seed=2)
    state = state_of(diffusers.FlowMatchEulerDiscreteScheduler(), x, output, 1000)
    assert (float(state.level.alpha), float(state.level.sigma)) == (0.0, 1.0)
    assert torch.equal(state.epsilon, x)
    assert torch.equal(state.pred_original_sample, x - output)


FRACTIONAL = [
    (SchedulerCase("DDIMScheduler", {}), [0.0, 0.25, 499.5, 998.75, 999.0]),
    (SchedulerCase("DDIMScheduler", ZERO_SNR), [0.0, 0.25, 499.5, 997.75, 998.0]),
    (SchedulerCase("EulerDiscreteScheduler", {}), [0.0, 333.3, 999.0]),
    (SchedulerCase("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}),
     [0.5, 333.3, 999.5]),
    (SchedulerCase("FlowMatchEulerDiscreteScheduler", {}), [0.5, 333.3, 999.5]),
    (SchedulerCase("EDMEulerScheduler", {}), [-1.5, 0.0, 1.09]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "timesteps"), FRACTIONAL, ids=str)
def test_timestep_at_inverts_the_levels_of_fractional_timesteps(case, timesteps):
    scheduler, t = case.parent(**case.config), torch.tensor(timesteps, dtype=torch.float64)
    level = noise_level(scheduler, t)
    assert level.alpha.shape == t.shape
    back = timestep_at(scheduler, level.log_noise_to_signal)
    # log s rises by at least 0.003 per timestep, so its rounding of 1e-15 is 1e-12 of a timestep; sums add to that.
    torch.testing.assert_close(back, t, rtol=0, atol=1e-9)


def test_fractional_timesteps_are_linear_in_log_noise_to_signal():
    scheduler = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
    low, middle, high = noise_level(scheduler, torch.tensor([400, 400.25, 401])).log_noise_to_signal
    assert float(middle) == pytest.approx(float(0.75 * low + 0.25 * high), rel=1e-12)
    assert low < middle < high


def test_flow_and_edm_timesteps_follow_their_definitions():
    flow = noise_level(diffusers.FlowMatchEulerDiscreteScheduler(), 250.0)
    assert (float(flow.alpha), float(flow.sigma)) == pytest.approx((0.75, 0.25), rel=1e-12)
    edm = noise_level(diffusers.EDMEulerScheduler(), 0.25 * math.log(3.0))
    assert (float(edm.alpha), float(edm.sigma)) == pytest.approx((1.0, 3.0), rel=1e-12)


@pytest.mark.parametrize("case", [case for case, _ in FRACTIONAL], ids=str)
def test_range_is_finite_ordered_and_inside_the_schedule(case):
    scheduler = case.parent(**case.config)
    low, high = log_noise_to_signal_range(scheduler)
    assert -math.inf < low < high <= math.log(0.999 / 0.001)
    ends = timestep_at(scheduler, torch.tensor([low, high]))
    torch.testing.assert_close(log_noise_to_signal_at(scheduler, ends), torch.tensor([low, high]).double())


@pytest.mark.parametrize("log_s", [-8.0, 0.0, 1.3, math.inf, -math.inf])
def test_level_from_log_noise_to_signal_is_variance_preserving(log_s):
    level = NoiseLevel.from_log_noise_to_signal(torch.tensor(log_s, dtype=torch.float64))
    assert float(level.norm) == pytest.approx(1.0, rel=1e-15)
    assert float(level.noise_to_signal) == pytest.approx(math.exp(log_s), rel=1e-12)
    scaled = level.scaled(3.0)
    assert float(scaled.norm) == pytest.approx(3.0, rel=1e-15)
    assert float(scaled.noise_to_signal) == pytest.approx(math.exp(log_s), rel=1e-12)


SUPPORTED = "supported schedulers: DDIMScheduler, .*FlowMatchEulerDiscreteScheduler"
TYPES = "epsilon, sample, v_prediction, flow_prediction"


@pytest.mark.parametrize("function", [prediction_of, lambda scheduler: noise_level(scheduler, 1)])
def test_unknown_scheduler_is_refused_with_the_known_ones(function):
    with pytest.raises(UnsupportedError, match=f"CMStochasticIterativeScheduler are not known; {SUPPORTED}"):
        function(diffusers.CMStochasticIterativeScheduler())


def test_subclass_inherits_its_parents_level():
    class Renamed(diffusers.DDIMScheduler):
        pass

    level = noise_level(Renamed(**STABLE_DIFFUSION), 500)
    assert torch.equal(level.sigma, noise_level(diffusers.DDIMScheduler(**STABLE_DIFFUSION), 500).sigma)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("DDIMScheduler", "foo"), ("DPMSolverMultistepScheduler", "flow_prediction"), ("EDMEulerScheduler", "sample")],
)
def test_unknown_prediction_type_is_refused_with_the_known_ones(name, kind):
    scheduler = getattr(diffusers, name)(prediction_type=kind)
    with pytest.raises(UnsupportedError, match=f"`prediction_type` of {name} is '{kind}'; supported: {TYPES}"):
        prediction_of(scheduler)


@pytest.mark.parametrize(
    ("name", "timestep", "last"),
    [("DDIMScheduler", -1, 999), ("DDIMScheduler", 999.5, 999), ("DDIMScheduler", float("nan"), 999),
     ("FlowMatchEulerDiscreteScheduler", 1000.5, 1000)],
)  # fmt: skip
def test_timestep_outside_the_schedule_is_refused(name, timestep, last):
    with pytest.raises(InputError, match=f"lies outside the schedule; allowed: 0 to {last}"):
        noise_level(getattr(diffusers, name)(), timestep)


@pytest.mark.parametrize("log_s", [-9.0, 9.0])
def test_level_outside_the_schedule_is_refused(log_s):
    with pytest.raises(InputError, match=r"leave the schedule's range \[-3\.5\d+, 2\.6\d+\]; stay inside it"):
        timestep_at(diffusers.DDIMScheduler(**STABLE_DIFFUSION), torch.tensor([0.0, log_s]))


def test_level_per_sample_must_fit_the_batch():
    with pytest.raises(InputError, match="were given for 3 samples, but the batch has 2"):
        expand(torch.ones(3), latents())
