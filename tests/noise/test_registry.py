"""Noise schedules of users, and the properties of each family."""

import math

import pytest
import torch
from cases import CASES, OUTSIDE_CASES, STABLE_DIFFUSION, Network, SchedulerCase, latents, relative, sampling_run
from diffusers import ConfigMixin, DDIMInverseScheduler, DDIMScheduler, EulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput

from diffusers_fisher import AutodiffFisher, UnsupportedError, fisher_scheduler
from diffusers_fisher.noise import (
    TableSchedule,
    VarianceExplodingSchedule,
    input_scale,
    log_noise_to_signal_range,
    noise_level,
    noise_schedule,
    prediction_of,
    register_noise_schedule,
    registry,
    timestep_at,
)


class LogScheduler(SchedulerMixin, ConfigMixin):
    """Makes Euler steps of x/alpha from sigma = e^3 to e^-3; the timestep is 1000 log(sigma/alpha)."""

    init_noise_sigma = math.exp(3)

    @register_to_config
    def __init__(self, prediction_type: str = "epsilon"):
        pass

    def set_timesteps(self, num_inference_steps):
        self.timesteps = torch.linspace(3000, -3000, num_inference_steps, dtype=torch.float64)

    def scale_model_input(self, sample, timestep):
        return sample / (1 + (timestep / 500).exp()).sqrt()

    def step(self, model_output, timestep, sample, return_dict=True):
        after = self.timesteps[self.timesteps < timestep]
        end = (after[0] / 1000).exp() if len(after) else 0.0
        moved = sample + (end - (timestep / 1000).exp()) * model_output
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)


class LogSchedule(VarianceExplodingSchedule):
    def log_noise_to_signal_at(self, timestep):
        return torch.as_tensor(timestep, dtype=torch.float64) / 1000

    def timestep_at(self, log_s):
        return 1000 * log_s

    def log_noise_to_signal_range(self):
        return -3.0, 3.0


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_SCHEDULES", dict(registry._SCHEDULES))
    register_noise_schedule("LogScheduler", LogSchedule)


@pytest.mark.usefixtures("registered")
def test_own_schedule_gives_levels_and_ranges():
    scheduler = LogScheduler()
    level = noise_level(scheduler, 1000 * math.log(2))
    assert (float(level.alpha), float(level.sigma)) == pytest.approx((1.0, 2.0), rel=1e-15)
    assert float(input_scale(scheduler, level)) == pytest.approx(1 / math.sqrt(5), rel=1e-15)
    assert float(timestep_at(scheduler, level.log_noise_to_signal)) == pytest.approx(1000 * math.log(2), rel=1e-15)
    assert log_noise_to_signal_range(scheduler) == (-3.0, 3.0)
    assert prediction_of(scheduler).kind == "epsilon"
    assert noise_schedule(scheduler).scales_samples
    assert noise_schedule(scheduler).spread_timesteps(3).tolist() == [-3000.0, 0.0, 3000.0]


@pytest.mark.usefixtures("registered")
def test_own_schedule_makes_runs_differentiable():
    network, x, weight = Network(), latents(), latents(seed=5)
    leaf = x.clone().requires_grad_()
    reference = sampling_run(LogScheduler(), network, leaf)[-1]
    (exact,) = torch.autograd.grad((weight * reference).sum(), leaf)
    scheduler = fisher_scheduler(LogScheduler)()
    with torch.no_grad(), scheduler.differentiable(AutodiffFisher(network)) as trajectory:
        result = sampling_run(scheduler, network, x)[-1]
    assert torch.equal(result, reference)
    assert relative(trajectory.gradient((weight * result).sum()), exact) < 1e-10  # float64, in another order
    assert [float(state.level.sigma) for state in trajectory.states[:2]] == pytest.approx([math.exp(3), math.exp(1.8)])


@pytest.mark.usefixtures("registered")
def test_own_schedule_knows_the_level_after_every_step():
    scheduler = LogScheduler()
    scheduler.set_timesteps(3)
    schedule = noise_schedule(scheduler)
    after = [float(schedule.level_after_step(t).sigma) for t in scheduler.timesteps]
    assert after == pytest.approx([1.0, math.exp(-3), 0.0])


def test_scheduler_is_unknown_until_it_is_registered():
    with pytest.raises(UnsupportedError, match="Noise levels of LogScheduler are not known; supported schedulers: "):
        noise_schedule(LogScheduler())


@pytest.mark.usefixtures("registered")
def test_registered_subclass_comes_before_its_parent():
    class Renamed(DDIMScheduler):
        pass

    assert type(noise_schedule(Renamed())) is TableSchedule
    register_noise_schedule("Renamed", LogSchedule)
    assert type(noise_schedule(Renamed())) is LogSchedule
    assert type(noise_schedule(DDIMScheduler())) is TableSchedule


# Runge-Kutta steps of PNDM return to the sample at which they began.
ONWARD = [case for case in CASES + OUTSIDE_CASES if case.name != "PNDMScheduler" or case.changes.get("skip_prk_steps")]


@pytest.mark.parametrize("case", ONWARD, ids=str)
def test_level_after_a_step_is_the_level_of_the_next_sample(case):
    scheduler, network, x = case.parent(**case.config), Network(), latents()
    scheduler.set_timesteps(6)
    schedule, expected, count = noise_schedule(scheduler), None, 0
    for t in scheduler.timesteps:
        level = schedule.level_in_run(t, schedule.start_step(t))
        if expected is not None:
            assert torch.equal(expected.alpha, level.alpha)
            assert torch.equal(expected.sigma, level.sigma)
            count += 1
        model_input = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(model_input, t), t, x, return_dict=False)[0]
        is_repeated = (
            case.name == "PNDMScheduler" and (scheduler.timesteps == t).sum() > 1
        )  # PNDM takes the timestep twice.
        expected = None if schedule.awaits_second_stage or is_repeated else schedule.level_after_step(t)
    assert count >= 4


@pytest.mark.parametrize(
    ("case", "variance"),
    [
        (SchedulerCase("DDPMScheduler", {}), 0.0),
        (SchedulerCase("DDIMScheduler", {}), 0.0),
        (SchedulerCase("DDIMScheduler", {"set_alpha_to_one": False}), 0.00085),
        (SchedulerCase("HeunDiscreteScheduler", {}), 0.0),
        (SchedulerCase("KDPM2DiscreteScheduler", {}), 0.0),
        (SchedulerCase("FlowMatchHeunDiscreteScheduler", {}), 0.0),
    ],
    ids=str,
)
def test_level_after_the_last_step_is_that_of_the_runs_result(case, variance):
    scheduler = case.parent(**case.config)
    schedule = noise_schedule(scheduler)
    sampling_run(scheduler, Network(), latents(), num_steps=4)
    assert not schedule.awaits_second_stage
    final = schedule.level_after_step(scheduler.timesteps[-1])
    assert float(final.sigma**2) == pytest.approx(variance, rel=1e-4)  # the scheduler's float32 table


def test_inverse_run_ends_at_the_level_of_its_last_timestep():
    """A step from x_0 without noise gives a sample at that level."""
    scheduler = DDIMInverseScheduler(**STABLE_DIFFUSION, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    t, schedule = scheduler.timesteps[-1], noise_schedule(scheduler)
    begin, end, original = schedule.level_in_run(t, 4), schedule.level_after_step(t), latents()
    after = scheduler.step(0 * original, t, begin.alpha * original).prev_sample
    assert relative(after, end.alpha * original) < 1e-6  # the scheduler's table is float32


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize(
    ("case", "flow", "scales"),
    [
        (SchedulerCase("DDIMScheduler", {}), False, False),
        (SchedulerCase("DPMSolverMultistepScheduler", {}), False, False),
        (SchedulerCase("DPMSolverMultistepScheduler", FLOW), True, False),
        (SchedulerCase("KDPM2DiscreteScheduler", {}), False, True),
        (SchedulerCase("EDMEulerScheduler", {}), False, True),
        (SchedulerCase("FlowMatchHeunDiscreteScheduler", {}), True, False),
    ],
    ids=str,
)
def test_schedule_says_whether_it_is_flow_and_whether_it_scales(case, flow, scales):
    schedule = noise_schedule(case.parent(**case.config))
    assert (schedule.is_flow, schedule.scales_samples) == (flow, scales)


def test_schedulers_without_flow_sigmas_ignore_that_key_of_anothers_config():
    """A config keeps the keys of the scheduler that it comes from. Euler does not read this key."""
    case = SchedulerCase("DPMSolverMultistepScheduler", {**FLOW, "prediction_type": "epsilon"})
    scheduler = EulerDiscreteScheduler.from_config(case.parent(**case.config).config)
    assert scheduler.config["use_flow_sigmas"]
    assert not noise_schedule(scheduler).is_flow
    assert float(noise_level(scheduler, 500).sigma) == pytest.approx(float(_deviation(scheduler, 500)), rel=1e-4)


def _deviation(scheduler, timestep):
    alpha_bar = scheduler.alphas_cumprod[timestep]
    return ((1 - alpha_bar) / alpha_bar).sqrt()
