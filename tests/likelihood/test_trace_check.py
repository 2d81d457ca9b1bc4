"""A trace model is checked on every image by differences of the denoiser, and its error is stated."""

import dataclasses
import json
import math

import pytest
import torch
from cases import STABLE_DIFFUSION
from diffusers import DDIMScheduler
from trace_cases import GaussianData, GaussianDenoiser

from diffusers_fisher import FiniteDifferenceFisher, FisherTraceModel, InputError, TraceMatchingFisher
from diffusers_fisher.fisher.calibration import TraceCalibration
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from diffusers_fisher.likelihood.calibration import TraceErrors

SHAPE = (2, 8, 8)
DATA = GaussianData(SHAPE, "dct")  # not diagonal in its own coordinates, so that directions leave noise
DENOISER = GaussianDenoiser(DATA, DDIMScheduler(**STABLE_DIFFUSION))
NATS = math.prod(SHAPE) * math.log(2)  # of one bit/dim


def wrong_model(factor=4.0):
    """A trace model of data with `factor` times the variance: its r is too large at every level."""
    model = DATA.model()
    model.set_prior(DATA.mean, factor * DATA.variance)
    return model


RIGHT, WRONG, WEAK = DATA.model(), wrong_model(), wrong_model(1 / 6)


def likelihood(samples, model=RIGHT, seed=0, denoiser=DENOISER, **options):
    generator = torch.Generator().manual_seed(seed)
    options = Integration(**{"num_steps": 20, "num_probes": None, "generator": generator, **options})
    return integrate_log_likelihood(denoiser, samples.float(), TraceMatchingFisher(model), options)


def images(count, seed=0):
    return DATA.sample(count, torch.Generator().manual_seed(seed))


def calibrated(error, model=None):
    model = DATA.model() if model is None else model
    model.set_calibration(TraceCalibration(error, 16, [-4.0, 3.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]))
    return model


def test_the_estimated_difference_and_its_error_are_right():
    samples = images(1)
    true = likelihood(samples).trace_log_prob - likelihood(samples, WRONG).trace_log_prob
    outputs = [likelihood(samples, WRONG, seed) for seed in range(100)]
    differences = torch.stack([out.trace_difference for out in outputs])[:, 0]
    errors = torch.stack([out.trace_difference_error for out in outputs])[:, 0]
    assert float(true) > 0.05 * NATS
    # 12 of 21 levels: what is interpolated between them is under 2% of the whole. The rest is the seeds' scatter.
    assert abs(float(differences.mean() - true)) < 0.02 * float(true) + 4 * float(differences.std()) / 10
    # The standard deviation of 100 draws is known to 7%; the stated variance is right to second order in the distance
    # of the checked levels.
    assert 0.7 < float(errors.square().mean().sqrt() / differences.std()) < 1.4


def test_right_models_agree_and_wrong_ones_disagree():
    samples = images(150)
    right, wrong = likelihood(samples), likelihood(samples, WRONG)
    # 3 standard errors are exceeded by 0.3% of normal draws, by some more where the standard error is estimated.
    assert right.trace_check.count("disagrees") <= 4
    assert wrong.trace_check.count("disagrees") == 150
    true = (right.trace_log_prob - wrong.trace_log_prob).abs()
    assert float((wrong.trace_error >= true).double().mean()) > 0.93
    assert torch.equal(wrong.log_prob, likelihood(samples, WRONG, trace_checks=0).log_prob)
    assert "checks disagree for 150" in str(wrong)


def test_an_image_has_the_same_check_in_every_batch():
    samples = images(4)
    together, alone = likelihood(samples, WRONG), likelihood(samples[2:3], WRONG)
    for name in ("trace_difference", "trace_difference_error", "trace_error"):
        # Batches round float32 outputs differently, which a difference divides by its small step.
        assert abs(float(vars(together)[name][2] - vars(alone)[name][0])) < 1e-3 * float(alone.trace_difference_error)


def test_the_calibration_is_the_error_where_checks_agree():
    samples = images(6)
    right = likelihood(samples, calibrated(0.05))
    assert right.trace_check == ["agrees"] * 6
    assert torch.allclose(right.trace_error, torch.full((6,), 0.05 * NATS, dtype=torch.float64))
    assert torch.allclose(right.total_error, right.trace_error + right.discretisation_error + right.prior_error)
    wrong = likelihood(samples, calibrated(0.01, wrong_model()))
    assert wrong.trace_check == ["disagrees"] * 6
    assert bool((wrong.trace_error > 0.05 * NATS).all())
    unchecked = likelihood(samples, calibrated(0.05), trace_checks=0)
    assert unchecked.trace_check is None and torch.equal(unchecked.trace_error, right.trace_error)


def test_an_error_that_nobody_knows_is_infinite():
    out = likelihood(images(2), trace_checks=0)
    assert out.trace_error.isinf().all() and out.total_error.isinf().all()


def test_traces_by_probes_and_exact_ones_are_not_checked():
    samples = images(2).float()
    for count in (None, 1):
        out = integrate_log_likelihood(
            DENOISER, samples, FiniteDifferenceFisher(DENOISER), Integration(num_steps=8, num_probes=count)
        )
        assert out.trace_check is None and not out.trace_error.any()


def test_grids_of_few_levels_are_checked_too():
    for steps in (2, 3, 4):
        out = likelihood(images(2), calibrated(0.05), num_steps=steps)
        assert out.trace_check is not None and bool(torch.isfinite(out.trace_difference_error).all())


def test_checks_cost_one_evaluation_each():
    assert likelihood(images(3)).num_denoiser_calls == 21 + 12
    assert likelihood(images(3), trace_checks=5).num_denoiser_calls == 21 + 5
    assert likelihood(images(3), trace_checks=0).num_denoiser_calls == 21


@pytest.mark.parametrize("tolerance", [None, 0.02])
def test_probes_take_the_place_of_a_model_that_is_wrong(tolerance):
    far = images(5)
    options = {"tolerance": tolerance, "untrusted_trace": "probes"}
    out, truth = likelihood(far, WRONG, **options), likelihood(far, tolerance=tolerance)
    assert out.trace_check == ["replaced by probes"] * 5
    assert not out.trace_error.any() and bool((out.standard_error > 0).all())
    # Five images within 4 standard errors, and the two errors of the steps.
    allowed = 4 * out.standard_error + out.discretisation_error + truth.discretisation_error
    assert bool(((out.log_prob - truth.log_prob).abs() < allowed).all())
    kept = likelihood(far, WRONG, tolerance=tolerance)
    assert bool(((kept.log_prob - truth.log_prob).abs() > 0.05 * NATS).all())
    assert out.num_denoiser_calls >= kept.num_denoiser_calls + 42
    assert (out.status, kept.status) == ((None, None) if tolerance is None else (["converged"] * 5,) * 2)


def test_images_that_agree_keep_their_numbers_beside_those_that_are_replaced():
    class HalfWrong(TraceMatchingFisher):
        """Has a wrong model for the last two samples alone."""

        def __call__(self, state, endpoint=None):
            wrong = torch.arange(len(state.sample)) >= len(state.sample) - 2
            right_operator, wrong_operator = super().__call__(state, endpoint), TraceMatchingFisher(WRONG)(state)
            return right_operator * (~wrong).double() + wrong_operator * wrong.double()

    samples, generator = images(5).float(), torch.Generator().manual_seed(0)
    options = Integration(num_steps=20, num_probes=None, generator=generator, untrusted_trace="probes")
    out = integrate_log_likelihood(DENOISER, samples, HalfWrong(RIGHT), options)
    assert out.trace_check == ["agrees"] * 3 + ["replaced by probes"] * 2
    assert torch.allclose(out.log_prob[:3], likelihood(samples).log_prob[:3], rtol=1e-6)
    assert out.trace_by_level.shape == (21, 1, 5)
    assert torch.allclose(out.trace_by_level.sum((0, 1)), out.trace_log_prob)


def test_errors_are_measured_without_the_noise_of_the_directions():
    generator = torch.Generator().manual_seed(0)
    levels, count, weights = 30, 4000, torch.full((30,), 0.05, dtype=torch.float64)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    true = torch.full((levels, count), 0.4, dtype=torch.float64)
    model = true + 0.02 + 0.03 * normal(1, count)  # the same error at all levels of an image
    errors = TraceErrors(torch.arange(30).double(), weights, model, true[:, None] + 0.2 * normal(levels, 2, count))
    calibration = errors.calibration()
    # Total weight 1.5: a bias of 0.03 and a deviation of 0.045; 4,000 images know the deviation to a few percent.
    assert abs(calibration.error - (0.03 + 1.96 * 0.045)) < 0.008
    assert calibration.samples == count
    for values, expected in ((calibration.bias, 0.02), (calibration.deviation, 0.03)):
        assert abs(sum(values) / levels - expected) < 0.005
    assert abs(calibration.scatter[3] - math.sqrt(0.02**2 + 0.03**2 + 0.2**2)) < 0.01


def test_measured_errors_of_a_right_model_are_small_and_those_of_a_wrong_one_are_its_own():
    samples = images(32).float()
    right, wrong = (
        TraceErrors.measure(DENOISER, samples, model, 20, torch.Generator().manual_seed(1)).calibration()
        for model in (RIGHT, WRONG)
    )
    true = (likelihood(samples).trace_log_prob - likelihood(samples, WRONG).trace_log_prob) / NATS
    assert right.error < 0.2 * wrong.error
    assert float(true.abs().mean()) < wrong.error < 1.5 * float(true.abs().max())


def test_the_calibration_lies_in_the_models_folder(tmp_path):
    model = calibrated(0.05)
    model.save_pretrained(tmp_path)
    loaded = FisherTraceModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()
    assert TraceMatchingFisher(loaded).calibration == TraceMatchingFisher(model).calibration
    assert json.loads((tmp_path / "config.json").read_text())["calibration"]["error"] == 0.05
    assert TraceMatchingFisher(RIGHT).calibration is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trace_checks": 1}, "`trace_checks` is 1; allowed: 2 or more"),
        ({"trace_checks": -3}, "`trace_checks` is -3"),
        ({"untrusted_trace": "ignore"}, "`untrusted_trace` is 'ignore'; allowed: warn, probes"),
        ({"untrusted_trace": "probes", "trace_checks": 0}, "needs checks of the trace model"),
    ],
)
def test_options_that_can_not_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        likelihood(images(1), **options)


def test_calibrations_that_can_not_be_are_refused():
    good = TraceCalibration(0.1, 8, [0.0], [0.0], [0.0], [0.0])
    for changes in ({"error": -1.0}, {"bias": [0.0, 0.0]}, {"scatter": [math.nan]}, {"error": math.inf}):
        with pytest.raises(InputError, match="A trace model's calibration has error"):
            dataclasses.replace(good, **changes)
    few = TraceErrors(torch.zeros(2), torch.ones(2).double(), torch.zeros(2, 7), torch.zeros(2, 2, 7))
    with pytest.raises(InputError, match="8 held-out images or more; got 7"):
        few.calibration()


def test_errors_that_cancel_between_levels_are_seen():
    class Cancelling(TraceMatchingFisher):
        """Has an r that is too large where the noise is strong, and too small where it is weak."""

        calibration = TraceErrors.measure(
            DENOISER, images(32).float(), RIGHT, 20, torch.Generator().manual_seed(1)
        ).calibration()

        def __call__(self, state, endpoint=None):
            strong = float(state.level.sigma / state.level.alpha) > 0.35
            return TraceMatchingFisher(WRONG if strong else WEAK)(state)

    options = Integration(num_steps=20, num_probes=None, generator=torch.Generator().manual_seed(0))
    out = integrate_log_likelihood(DENOISER, images(8).float(), Cancelling(RIGHT), options)
    small = Cancelling.calibration.error * NATS / 1.96
    scores = out.trace_difference.abs() / torch.hypot(out.trace_difference_error, torch.tensor(small))
    assert float(scores.median()) < 3  # the integral alone would say nothing
    assert out.trace_check == ["disagrees"] * 8
