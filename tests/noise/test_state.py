"""Denoising states: every prediction type's conversions against the definition of x_t."""

import math

import diffusers
import pytest
import torch
from cases import latents

from diffusers_fisher import DenoisingState, InputError, NoiseLevel, noise_level
from diffusers_fisher.noise import Prediction, input_scale, state_of


def level_of(alpha, sigma):
    return NoiseLevel(torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64))


LEVELS = {
    "variance preserving": level_of(0.8, 0.6),
    "k-diffusion": level_of(1.0, 7.0),
    "flow": level_of(0.3, 0.7),
    "pure noise": level_of(0.0, 1.0),
    "one per sample": level_of([0.8, 0.1], [0.6, math.sqrt(0.99)]),
}


def outputs(x, original, noise, alpha, sigma):
    """Returns the raw output of a model that knows x_0 and eps, from the definition of each prediction type."""
    norm = (alpha**2 + sigma**2).sqrt()
    scaled, total = x / alpha, sigma**2 / alpha**2 + 0.25  # EDM's own coordinates and s^2 + sigma_data^2
    preconditioned = (original - 0.25 / total * scaled) / (sigma / alpha * 0.5 / total.sqrt())
    return {
        Prediction("epsilon"): noise,
        Prediction("sample"): original,
        Prediction("v_prediction"): (alpha * noise - sigma * original) / norm,
        Prediction("flow_prediction"): noise - original,
        Prediction("edm", 0.5, "epsilon"): preconditioned,
        Prediction("edm", 0.5, "v_prediction"): -preconditioned,
    }


PREDICTIONS = list(outputs(*[torch.ones(())] * 5))
# EDM's coordinates divide by alpha, so this family has no level of pure noise.
PAIRS = [(name, kind) for name in LEVELS for kind in PREDICTIONS if (name, kind.kind) != ("pure noise", "edm")]


def label(value):
    return value if isinstance(value, str) else f"{value.kind} {value.edm_kind}"


@pytest.mark.parametrize(("name", "prediction"), PAIRS, ids=label)
def test_epsilon_original_and_score_are_recovered_from_the_raw_output(name, prediction):
    level, original, noise = LEVELS[name], latents(seed=4), latents(seed=5)
    alpha, sigma = (value.reshape(-1, 1, 1, 1) for value in (level.alpha, level.sigma))
    x = alpha * original + sigma * noise
    state = DenoisingState(x, outputs(x, original, noise, alpha, sigma)[prediction], level, prediction)
    # float64 roundings, multiplied by at most sigma/alpha or alpha/sigma, here below ten
    tolerance = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(state.epsilon, noise, **tolerance)
    torch.testing.assert_close(state.score, -noise / sigma, **tolerance)
    if not (name == "pure noise" and prediction.kind == "epsilon"):  # Pure noise contains no x_0.
        torch.testing.assert_close(state.pred_original_sample, original, **tolerance)


@pytest.mark.parametrize("prediction", PREDICTIONS, ids=label)
@pytest.mark.parametrize("name", ["variance preserving", "k-diffusion", "flow"])
def test_output_coefficients_rebuild_the_raw_output(name, prediction):
    level, output = LEVELS[name], latents(seed=6)
    state = DenoisingState(latents(), output, level, prediction)
    noise, original, identity = prediction.output_coefficients(level)
    rebuilt = noise * state.epsilon + original * state.pred_original_sample + identity * state.sample
    torch.testing.assert_close(rebuilt, output, rtol=1e-12, atol=1e-12)  # float64 roundings


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_combined_in_the_samples_dtype(dtype):
    x, output = latents(torch.float32), latents(torch.float32, seed=2).to(dtype)
    level, prediction = LEVELS["variance preserving"], Prediction("v_prediction")
    state = DenoisingState(x, output, level, prediction)
    reference = DenoisingState(x, output.float(), level, prediction)
    for name in ("epsilon", "pred_original_sample", "score"):
        assert getattr(state, name).dtype is torch.float32
        assert torch.equal(getattr(state, name), getattr(reference, name))


def test_output_of_another_shape_is_refused():
    with pytest.raises(InputError, match=r"shape \(2, 6, 2, 2\); allowed: \(2, 3, 2, 2\).* pass the mean half"):
        DenoisingState(latents(), latents(shape=(2, 6, 2, 2)), LEVELS["flow"], Prediction("epsilon"))


def test_state_of_takes_the_runs_own_level_and_input_scale():
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(10)
    x, output, t = latents(), latents(seed=2), scheduler.timesteps[0]
    scheduler._init_step_index(t)
    in_run, outside_run = state_of(scheduler, x, output, t, 0), state_of(scheduler, x, output, t)
    assert float(in_run.level.sigma) == float(scheduler.sigmas[0])
    assert torch.equal(outside_run.level.sigma, noise_level(scheduler, t).sigma)
    assert torch.equal(outside_run.input_scale, input_scale(scheduler, outside_run.level))
    # The run's factor is rounded to float32, as the model's input was; the rest is one float64 rounding.
    torch.testing.assert_close(in_run.input_scale * x, scheduler.scale_model_input(x, t), rtol=1e-15, atol=0)
