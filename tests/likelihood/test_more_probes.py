"""`max_standard_error` adds random directions for the samples that need them."""

import math
import warnings

import pytest
import torch
from cases import STABLE_DIFFUSION
from diffusers import DDIMScheduler
from trace_cases import GaussianData, GaussianDenoiser

from diffusers_fisher import FiniteDifferenceFisher, InputError, ProbeNoiseWarning, TraceModelWarning
from diffusers_fisher.fisher import ExactFisher
from diffusers_fisher.likelihood import Integration, integrate_log_likelihood
from likelihood.test_trace_check import WRONG, likelihood as modelled_likelihood

SHAPE = (2, 8, 8)
DATA = GaussianData(SHAPE, "dct")
DENOISER = GaussianDenoiser(DATA, DDIMScheduler(**STABLE_DIFFUSION))
NATS = math.prod(SHAPE) * math.log(2)
SAMPLES = DATA.sample(6, torch.Generator().manual_seed(0)).float()


def likelihood(samples=SAMPLES, estimator=None, **options):
    generator = torch.Generator().manual_seed(0)
    options = Integration(**{"num_steps": 16, "generator": generator, **options})
    return integrate_log_likelihood(DENOISER, samples, estimator or FiniteDifferenceFisher(DENOISER), options)


def bits(out):
    return out.to_bits(out.standard_error)


def test_standard_errors_end_below_the_limit_and_numbers_come_nearer_to_the_truth():
    truth = likelihood(estimator=ExactFisher(DATA.distribution), num_probes=None)
    one, more = likelihood(), likelihood(max_standard_error=float(bits(likelihood()).mean()) / 3)
    limit = float(bits(one).mean()) / 3
    assert bool((bits(one) > limit).all()) and bool((bits(more) <= limit).all())
    assert bool(((more.log_prob - truth.log_prob).abs() < 4 * more.standard_error + 1e-3 * NATS).all())
    assert more.num_denoiser_calls > 9 * one.num_denoiser_calls / 2  # 9 directions at least, and the path
    assert torch.allclose(more.trace_by_level.mean(1).sum(0), more.trace_log_prob)


def test_samples_that_are_good_enough_keep_their_numbers():
    one = likelihood()
    order = bits(one).argsort()
    limit = float(bits(one)[order[2:4]].mean())  # between the third and the fourth
    more = likelihood(max_standard_error=limit)
    assert torch.equal(more.log_prob[order[:3]], one.log_prob[order[:3]])
    assert bool((more.log_prob[order[3:]] != one.log_prob[order[3:]]).all())
    assert bool((bits(more) <= limit).all())
    assert more.trace_by_level.shape == (17, 1, 6)
    alone = likelihood(SAMPLES[order[4:5]], max_standard_error=limit)
    # Differences of float32 outputs, which round by batch.
    assert abs(float(alone.log_prob - more.log_prob[order[4]])) < 1e-3 * NATS


def test_a_limit_that_the_largest_number_does_not_reach_is_said():
    with pytest.warns(ProbeNoiseWarning, match="1 of 1 samples have a standard error above 1e-06 bits/dim with 64"):
        out = likelihood(SAMPLES[:1], max_standard_error=1e-6)
    assert out.num_denoiser_calls == 17 * 2 + 17 * 65


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_standard_error": 0.0}, "`max_standard_error` is 0.0; allowed: a positive number"),
        ({"max_standard_error": math.nan}, "`max_standard_error` is nan"),
        ({"max_standard_error": 0.1, "num_probes": None}, "but this trace has none"),
        ({"max_standard_error": 0.1, "num_probes": 2, "fixed_probes": True}, "the same ones at all levels"),
    ],
)
def test_limits_that_can_not_be_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        likelihood(**options)


def test_a_trace_model_that_disagrees_warns_once_unless_probes_replace_it():
    with pytest.warns(TraceModelWarning, match="disagrees with differences of its denoiser for 6 of 6 samples"):
        modelled_likelihood(SAMPLES, WRONG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TraceModelWarning)
        modelled_likelihood(SAMPLES, WRONG, untrusted_trace="probes")
