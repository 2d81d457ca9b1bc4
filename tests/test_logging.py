"""diffusers' switches of verbosity reach the package's loggers."""

import importlib
import logging

import pytest
from diffusers.utils import logging as diffusers_logging

MODULES = (
    "data.images",
    "guidance.noise_ascent",
    "guidance.posterior",
    "evaluation.guidance_gallery",
    "training.checkpoints",
)


@pytest.mark.parametrize("name", MODULES)
def test_the_verbosity_of_diffusers_is_that_of_the_package(name):
    logger = importlib.import_module(f"diffusers_fisher.{name}").logger
    before = diffusers_logging.get_verbosity()
    try:
        diffusers_logging.set_verbosity_info()
        assert logger.isEnabledFor(logging.INFO)
        diffusers_logging.set_verbosity_error()
        assert not logger.isEnabledFor(logging.WARNING)
    finally:
        diffusers_logging.set_verbosity(before)
