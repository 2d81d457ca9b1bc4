"""Configurations that give timesteps and sigmas another meaning."""

import math

import diffusers
import pytest
import torch
from cases import CASES

from diffusers_fisher.noise import log_noise_to_signal_range, noise_level, noise_schedule, timestep_at

WITH_SIGMAS = [case for case in CASES if "sigmas" in vars(case.parent(**case.config))]


@pytest.mark.parametrize("case", WITH_SIGMAS, ids=str)
def test_sigma_of_a_level_is_the_entry_of_the_run(case):
    scheduler = case.parent(**case.config)
    scheduler.set_timesteps(6)
    schedule, sigmas = noise_schedule(scheduler), scheduler.sigmas.double()
    levels = [schedule.level_of_sigma(sigma) for sigma in sigmas[1:-1]]  # the ends may be infinite
    entries = torch.stack([schedule.sigma_of(level.log_noise_to_signal) for level in levels])
    torch.testing.assert_close(entries, sigmas[1:-1])


def test_reversed_flow_begins_in_pure_noise_and_ends_clean():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(4)
    begin, end = noise_level(scheduler, scheduler.timesteps[0], 0), noise_schedule(scheduler).level_of_sigma
    assert (float(begin.alpha), float(begin.sigma)) == (0.0, 1.0)
    assert float(end(scheduler.sigmas[-1].double()).alpha) == 1.0
    low, high = log_noise_to_signal_range(scheduler)
    assert timestep_at(scheduler, torch.tensor([low, high])).tolist() == pytest.approx([999.0, 1.0])
    # A network that knows the clean sample x_0 predicts x_0 - eps.
    x_0, epsilon, prediction = torch.tensor(2.0), torch.tensor(-1.0), noise_schedule(scheduler).prediction
    level = noise_level(scheduler, 300.0)
    sample = 0.3 * x_0 + 0.7 * epsilon
    for expected, (a, b) in (
        (x_0, prediction.original_coefficients(level)),
        (epsilon, prediction.epsilon_coefficients(level)),
    ):
        assert float(a * sample + b * (x_0 - epsilon)) == pytest.approx(float(expected))


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_both_schedulers_with_the_setting_are_reversed(name):
    scheduler = getattr(diffusers, name)(invert_sigmas=True)
    assert float(noise_level(scheduler, 250.0).alpha) == 0.25


def test_continuous_timesteps_are_logarithms_of_sigma():
    settings = {"timestep_type": "continuous", "prediction_type": "v_prediction"}
    ends = {"sigma_min": 0.002, "sigma_max": 700.0}
    scheduler = diffusers.EulerDiscreteScheduler(**settings, **ends, use_karras_sigmas=True)
    scheduler.set_timesteps(5)
    levels = noise_level(scheduler, scheduler.timesteps)
    torch.testing.assert_close(levels.sigma, scheduler.sigmas[:-1].double(), rtol=1e-5, atol=0)
    assert log_noise_to_signal_range(scheduler) == (math.log(0.002), math.log(700))
    assert noise_schedule(scheduler).spread_timesteps(3).tolist()[::2] == pytest.approx(
        [math.log(0.002) / 4, math.log(700) / 4]
    )
    table = diffusers.EulerDiscreteScheduler(**settings)  # without ends of its own it was trained on the whole table
    discrete = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    assert log_noise_to_signal_range(table) == log_noise_to_signal_range(discrete)
    # For other predictions diffusers keeps whole timesteps.
    whole = diffusers.EulerDiscreteScheduler(**{**settings, "prediction_type": "epsilon"})
    assert float(noise_level(whole, 500).sigma) == float(noise_level(discrete, 500).sigma)
