"""Scores of memorised prompts against closed forms: laws that have collapsed beside broad ones."""

import dataclasses
import math

import diffusers
import pytest
import torch
from cases import STABLE_DIFFUSION, FunctionFisher

from diffusers_fisher import (
    Covariance,
    ExactFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    GaussianMixture,
    InputError,
    NumericalError,
    UnsupportedError,
    denoiser_memorisation,
)
from diffusers_fisher.fisher import LevelFisher
from diffusers_fisher.noise import log_noise_to_signal_range, timestep_at
from diffusers_fisher.testing import OracleDenoiser

SHAPE = (1, 4, 8)
VP = diffusers.DDIMScheduler(**STABLE_DIFFUSION)
FLOW = diffusers.FlowMatchEulerDiscreteScheduler()
LEVELS = (2.0, 1.0, 0.5)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(variance):
    """Returns N(0, variance), where `variance` is a number or (1, 4, 8)."""
    variances = torch.as_tensor(variance, dtype=torch.float64).expand(1, *SHAPE).clone()
    return GaussianMixture(torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.diagonal(variances))


def modes(count=6):
    centres = torch.randn(count, *SHAPE, dtype=torch.float64, generator=seeded(3))
    variances = torch.full((count, *SHAPE), 0.1, dtype=torch.float64)
    return GaussianMixture(centres, Covariance.diagonal(variances))


def point_of(law):
    """Returns a law that has collapsed about the first mode of `law`."""
    return GaussianMixture(law.means[:1], Covariance.diagonal(torch.full((1, *SHAPE), 1e-3, dtype=torch.float64)))


POINT, BROAD = gaussian(0.01), gaussian(1.0)


def noises(draws=6, count=2, seed=0):
    return torch.randn(draws, count, *SHAPE, dtype=torch.float64, generator=seeded(seed))


def compare(conditional, unconditional, noise, scheduler=VP, **options):
    pair = (OracleDenoiser(law, scheduler) for law in (conditional, unconditional))
    return denoiser_memorisation(*pair, noise, **{"generator": seeded(), **options})


def agrees(value, error, expected, rounding=1e-6):
    """The denoiser's timestep is rounded to float32."""
    return bool(((value - expected).abs() <= 3 * error + rounding).all())


@pytest.mark.parametrize("scheduler", [VP, FLOW])
@pytest.mark.parametrize("level", [None, 1.0])
def test_scores_of_gaussians_are_the_exact_ones(scheduler, level):
    """r = v/(v + s^2) and eps = s x~/(v + s^2); a step from t to s multiplies x~ by 1 + (s - t) t/(v + t^2)."""
    out = compare(POINT, BROAD, noises(24, 3), scheduler, noise_to_signal=level)
    high = math.exp(log_noise_to_signal_range(scheduler)[1])
    s = float(out.noise_to_signal[0])
    assert s == pytest.approx(high if level is None else level)
    v_c, v_0 = 0.01, 1.0
    assert agrees(out.trace_difference, out.trace_error, v_0 / (v_0 + s**2) - v_c / (v_c + s**2))
    start = OracleDenoiser(POINT, scheduler).level(timestep_at(scheduler, torch.tensor(high).double().log()))
    size = float((start.norm / start.alpha) ** 2) * (1 + (s - high) * high / (v_c + high**2)) ** 2
    expected = size * s**2 * (1 / (v_c + s**2) - 1 / (v_0 + s**2)) ** 2
    assert agrees(out.score_difference, out.score_error, expected)
    assert bool((out.trace_difference > 0).all())
    assert bool((out.score_error < 0.2 * out.score_difference).all())


class OwnLaw(FisherEstimator):
    """Gives the exact Fisher of the law of each denoiser."""

    default_num_probes = None

    def bind(self, denoiser):
        return ExactFisher(denoiser.oracle)

    def __call__(self, state, endpoint=None):
        raise AssertionError("The estimator was not bound.")


def test_probes_agree_with_exact_traces_of_a_mixture_and_a_collapsed_mode():
    laws = point_of(modes()), modes()
    exact = compare(*laws, noises(12), noise_to_signal=LEVELS, estimator=OwnLaw())
    out = compare(*laws, noises(12), noise_to_signal=LEVELS)
    assert torch.allclose(out.score_differences, exact.score_differences)
    rest = (out.trace_differences - exact.trace_differences).mean(0)
    assert agrees(rest.mean(0), rest.std(0) / len(rest) ** 0.5, 0, 1e-3)  # the error of forward differences
    assert bool((exact.trace_difference > 0.05).all())
    assert exact.trace == "OwnLaw, no probes"


def test_differences_are_those_of_the_laws_at_the_first_state():
    laws, noise = (point_of(modes()), modes()), noises(2)
    out = compare(*laws, noise, estimator=OwnLaw())
    log_s = torch.tensor(log_noise_to_signal_range(VP)[1], dtype=torch.float64)
    level = OracleDenoiser(modes(), VP).level(timestep_at(VP, log_s))
    for draw, x in enumerate(noise):  # at the highest level the network's input is the noise itself
        left, right = (law.epsilon(x, level) for law in laws)
        assert torch.allclose(out.score_differences[0, draw], (left - right).square().flatten(1).mean(1), rtol=1e-4)
        states = [OracleDenoiser(law, VP).state(x, timestep_at(VP, log_s)) for law in laws]
        traces = [ExactFisher(law)(state).trace().value for law, state in zip(laws, states, strict=True)]
        expected = float(level.sigma) ** 2 * (traces[0] - traces[1]) / 32
        assert torch.allclose(out.trace_differences[0, draw], expected, atol=1e-6)  # timesteps in float32


def test_a_prompt_that_changes_nothing_scores_zero():
    out = compare(modes(), modes(), noises(4), noise_to_signal=LEVELS, maps=True)
    for value in (out.score_differences, out.trace_differences, out.score_maps, out.trace_maps, out.trace_maps_error):
        assert torch.equal(value, torch.zeros_like(value))


def test_maps_show_the_half_that_is_fixed():
    variance = torch.ones(SHAPE, dtype=torch.float64)
    variance[..., :4] = 1e-3
    out = compare(gaussian(variance), BROAD, noises(40), noise_to_signal=1.0, maps=True)
    assert out.trace_maps.shape == out.score_maps.shape == (2, *SHAPE)
    assert torch.allclose(out.trace_maps.flatten(1).mean(1), out.trace_difference)
    assert torch.allclose(out.score_maps.flatten(1).mean(1), out.score_difference)
    assert float(out.score_maps[..., 4:].abs().max()) < 1e-12 < float(out.score_maps[..., :4].min())
    expected = torch.zeros(SHAPE, dtype=torch.float64)
    expected[..., :4] = 1 / 2 - 1e-3 / 1.001
    excess = ((out.trace_maps - expected).abs() / (out.trace_maps_error + 1e-9)).flatten()
    assert float(excess.square().mean()) < 2  # in standard errors
    pixels = out.image_maps(8, 16)
    assert pixels.shape == (2, 8, 16)
    assert torch.allclose(pixels.flatten(1).mean(1), out.trace_difference)
    assert float(pixels[..., :8].mean()) > 0.4 > 0.1 > float(pixels[..., 8:].abs().mean())
    assert float(out.image_maps(8, 16, by="score")[..., 8:].max()) < 1e-12


@pytest.mark.parametrize(
    ("options", "score_calls", "calls"),
    [
        ({}, 6, 12),
        ({"num_probes": 0}, 6, 6),
        ({"num_probes": 3}, 6, 24),
        ({"noise_to_signal": LEVELS}, 21, 39),
        ({"estimator": LevelFisher(torch.ones(1), torch.full((1,), 0.5)), "num_probes": None}, 6, 6),
    ],
)
def test_evaluations_are_counted(options, score_calls, calls):
    pair = [OracleDenoiser(law, VP) for law in (POINT, BROAD)]
    steps = []
    out = denoiser_memorisation(*pair, noises(3), **options, on_step=lambda: steps.append(1))
    assert (out.score_calls, out.num_denoiser_calls) == (score_calls, calls)
    assert sum(denoiser.num_calls for denoiser in pair) == calls
    assert len(steps) == 3 * len(out.noise_to_signal)
    assert "evaluations" in str(out)


def test_first_draws_are_those_of_fewer_draws_and_errors_shrink():
    many = compare(POINT, BROAD, noises(24), noise_to_signal=1.0)
    few = compare(POINT, BROAD, noises(24)[:6], noise_to_signal=1.0)
    assert torch.equal(few.trace_differences, many.trace_differences[:, :6])
    assert bool((many.trace_error < few.trace_error).all())
    single = compare(POINT, BROAD, noises(1))
    assert bool(torch.isinf(single.score_error).all())


def test_least_memorised_noise_has_the_smallest_score_of_each_prompt():
    law = modes()
    out = compare(point_of(law), law, noises(8, 3), noise_to_signal=LEVELS)
    for by, scores in (("score", out.score_differences.mean(0)), ("trace", out.trace_differences.mean(0))):
        chosen = out.least_memorised_noise(by)
        assert chosen.shape == (3, *SHAPE)
        for row in range(3):
            assert torch.equal(chosen[row], out.noise[int(scores[:, row].argmin()), row])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_to_signal": 20.0}, r"`noise_to_signal` is 20.0; allowed: numbers from 14.6\d* down to"),
        ({"noise_to_signal": [1.0, 2.0]}, "decreasing, at least one"),
        ({"noise_to_signal": []}, "at least one. None takes the highest"),
        ({"noise_to_signal": [float("nan")]}, "`noise_to_signal` is .nan. .list.; allowed"),
        ({"noise_to_signal": [-1.0]}, "`noise_to_signal` is .-1.0.; allowed"),
        ({"num_probes": -1}, "`num_probes` is -1; allowed: 1 or more, 0 for no traces"),
        ({"estimator": FiniteDifferenceFisher(OracleDenoiser(BROAD, VP))}, "FiniteDifferenceFisher has a denoiser of"),
        ({"noise": noises()[0, 0, 0]}, r"`noise` has shape \(4, 8\); allowed"),
        ({"noise": noises() * float("nan")}, "must be finite"),
        ({"generator": [seeded()]}, "1 generators were given for 2 images"),
        ({"unconditional": OracleDenoiser(BROAD, FLOW)}, "allowed: one schedule for both"),
    ],
)
def test_bad_input_is_refused(options, message):
    pair = {"conditional": OracleDenoiser(POINT, VP), "unconditional": OracleDenoiser(BROAD, VP), "noise": noises()}
    with pytest.raises(InputError, match=message):
        denoiser_memorisation(**{**pair, **options})


def test_outputs_refuse_what_they_do_not_have():
    out = compare(POINT, BROAD, noises(), num_probes=0, maps=True)
    with pytest.raises(InputError, match="There are no trace differences, because `num_probes` was 0"):
        _ = out.trace_difference
    with pytest.raises(InputError, match="The maps are None for images of 8x16 pixels"):
        out.image_maps(8, 16)
    with pytest.raises(InputError, match="`by` is 'both'"):
        out.least_memorised_noise("both")
    assert out.image_maps(4, 8, by="score").shape == (2, 4, 8)
    flat = dataclasses.replace(out, score_maps=out.score_maps.flatten(2))
    with pytest.raises(InputError, match=r"The maps are \(2, 1, 32\)"):
        flat.image_maps(8, 16, by="score")


def test_scores_that_are_not_finite_raise():
    class Broken(OracleDenoiser):
        def model_output(self, x, timestep):
            return super().model_output(x, timestep) / 0

    with pytest.raises(NumericalError, match="Score differences are not finite"):
        denoiser_memorisation(OracleDenoiser(POINT, VP), Broken(BROAD, VP), noises(1))
    broken = FunctionFisher(lambda state, endpoint=None: ExactFisher(BROAD)(state) * float("nan"))
    with pytest.raises(NumericalError, match="Trace differences are not finite"):
        denoiser_memorisation(OracleDenoiser(POINT, VP), OracleDenoiser(BROAD, VP), noises(1), estimator=broken)


def test_a_scheduler_without_known_levels_is_refused():
    with pytest.raises(UnsupportedError):
        compare(POINT, BROAD, noises(1), diffusers.RePaintScheduler())
