"""A pipeline's trace model is calibrated on images, and its likelihoods state the error from then on."""

import pytest
import torch

from diffusers_fisher import InputError, calibrate_trace_model
from pipelines.backbones import BACKBONES
from pipelines.test_trace_models import model_of

SD = BACKBONES["StableDiffusion"]
OPTIONS = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}


def pictures(count):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_calibration_becomes_the_stated_error_and_changes_nothing_itself():
    pipe = SD.ours()
    pipe.trace_model = model = model_of(SD, pipe)
    calibration = calibrate_trace_model(
        pipe, pictures(9), [f"a {number}" for number in range(9)], batch_size=4, **OPTIONS
    )
    assert calibration.samples == 9 and calibration.error > 0 and len(calibration.scatter) == 5
    assert model.config["calibration"] is None and pipe.trace_model is model
    model.set_calibration(calibration)
    out = pipe.log_likelihood(pictures(2), trace_checks=0, num_inference_steps=4)
    assert torch.allclose(out.to_bits(out.trace_error), torch.full((2,), calibration.error, dtype=torch.float64))


def test_what_can_not_be_calibrated_is_refused():
    pipe = SD.ours()
    with pytest.raises(InputError, match="has no trace model to calibrate"):
        calibrate_trace_model(pipe, pictures(8))
    pipe.trace_model = model_of(SD, pipe)
    with pytest.raises(InputError, match="8 held-out images or more; got 3"):
        calibrate_trace_model(pipe, pictures(3))
    with pytest.raises(InputError, match="`batch_size` is 0"):
        calibrate_trace_model(pipe, pictures(8), batch_size=0)
    with pytest.raises(InputError, match="Give either"):
        calibrate_trace_model(pipe)
