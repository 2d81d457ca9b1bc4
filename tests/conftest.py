"""Settings of the whole suite: no network, one thread, and no test may leave a global setting changed."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # for commands in processes of their own: the workers of the suite share the cores

import pytest
import torch
from diffusers.utils import logging

torch.set_num_threads(1)  # the tensors are tiny: threads only cost
logging.set_verbosity_error()

WARNINGS_OF_OTHERS = (
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning",  # its sigma tables go by numpy
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",  # torch.func.hessian's own imports use it
    "ignore:__array_wrap__ must accept context and return_scalar arguments:DeprecationWarning",
    "ignore:`algorithm_types dpmsolver and sde-dpmsolver` is deprecated:FutureWarning",  # supported until 1.0
)


def pytest_configure(config):
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="diffusers-fisher-tests-")  # not the user's own
    for line in WARNINGS_OF_OTHERS:
        config.addinivalue_line("filterwarnings", line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Of several workers, one runs all the tests of a file, so that its fixtures are made once.

    The files that decide the table in docs/compatibility.md go to the worker of the test that compares it.
    """
    from pipelines.compatibility import FILES
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.split("::")[0]
            return "docs/compatibility.md" if path.endswith((*FILES, "test_compatibility.py")) else path

    return ByFile(config, log)


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def global_settings():
    """Fails the test that leaves grad mode or the default dtype changed, and restores both for the next one."""
    before = torch.is_grad_enabled(), torch.get_default_dtype()
    yield
    after = torch.is_grad_enabled(), torch.get_default_dtype()
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    assert after == before


@pytest.fixture
def caplog(caplog, monkeypatch):
    """pytest's fixture, which sees what the package logs once, whether diffusers' logger hands it on or not."""
    name = "diffusers.diffusers_fisher"
    logger = logging.get_logger(name)
    caplog.set_level("WARNING", logger=name)
    logger.addHandler(caplog.handler)
    monkeypatch.setattr(logger, "propagate", False)
    yield caplog
    logger.removeHandler(caplog.handler)
