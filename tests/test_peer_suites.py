"""The command that runs diffusers' tests with our classes, on a small suite of the same form as diffusers' own.

No checkout of diffusers is read here. The suite has the packages, relative imports and base classes of diffusers'
tests, and tests that each kind of difference makes fail.
"""

import subprocess
import sys
from pathlib import Path

import peer_suites
import pytest
from peer_suites import Difference

COMMON = """
import tempfile
import unittest

import torch


class SchedulerCommonTest(unittest.TestCase):
    scheduler_classes = ()

    def test_from_save_pretrained(self):
        for scheduler_class in self.scheduler_classes:
            scheduler, sample = scheduler_class(), torch.ones(1, 3, 8, 8)
            with tempfile.TemporaryDirectory() as folder:
                scheduler.save_config(folder)
                again = scheduler_class.from_pretrained(folder)
            for each in (scheduler, again):
                each.set_timesteps(5)
            outputs = [each.step(sample, each.timesteps[0], sample).prev_sample for each in (scheduler, again)]
            assert torch.equal(*outputs)
"""
SCHEDULERS = """
import diffusers
import pytest
from diffusers import DDIMScheduler, DDPMScheduler, IPNDMScheduler

from .test_schedulers import SchedulerCommonTest


class DDIMSchedulerTest(SchedulerCommonTest):
    scheduler_classes = (DDIMScheduler, IPNDMScheduler)

    def test_fails_with_both(self):
        assert not issubclass(DDIMScheduler, diffusers.SchedulerMixin)

    def test_is_found_inside_diffusers(self):
        getattr(diffusers.schedulers, DDIMScheduler.__name__)

    def test_layerwise_casting_inference(self):
        assert "Fisher" not in DDIMScheduler.__name__

    @unittest_skip
    def test_skipped(self):
        pass


@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler])
def test_name_of_a_class_in_a_test(cls):
    assert cls().config.num_train_timesteps == 1000
""".replace("@unittest_skip", '@pytest.mark.skip("on purpose")')
PIPELINES = """
import tempfile
import unittest

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel


class DDPMPipelineFastTests(unittest.TestCase):
    pipeline_class = DDPMPipeline

    def make(self):
        unet = UNet2DModel(sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4,
                           down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        return self.pipeline_class(unet=unet, scheduler=DDPMScheduler())

    def test_save_load_local(self):
        with tempfile.TemporaryDirectory() as folder:
            self.make().save_pretrained(folder)
            again = self.pipeline_class.from_pretrained(folder)
        assert isinstance(again.scheduler, DDPMScheduler)

    def test_pickled_weights(self):
        with tempfile.TemporaryDirectory() as folder:
            self.make().save_pretrained(folder, safe_serialization=False)
"""
UNEXPECTED = """
from diffusers import DDIMScheduler


def test_class_is_that_of_diffusers():
    assert DDIMScheduler.__mro__[1].__name__ == "SchedulerMixin"
"""
FAILING_IMPORT = """
from diffusers import DDIMScheduler

assert DDIMScheduler.__name__ == "DDIMScheduler", "at import"


def test_anything():
    pass
"""


@pytest.fixture
def suite(tmp_path):
    """Writes a folder of tests like that of a checkout."""
    files = {
        "schedulers/test_schedulers.py": COMMON, "schedulers/test_scheduler_ddim.py": SCHEDULERS,
        "schedulers/test_import.py": FAILING_IMPORT, "schedulers/test_other.py": UNEXPECTED,
        "pipelines/test_ddpm.py": PIPELINES,
    }  # fmt: skip
    for name, text in files.items():
        file = tmp_path / "checkout" / "tests" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in (file.parent, file.parent.parent):
            (folder / "__init__.py").touch()
        file.write_text(text)
    return tmp_path / "checkout" / "tests"


def command(*arguments):
    script = Path(peer_suites.__file__)
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_differences_are_reported_with_their_reasons(suite):
    run = command(suite)
    assert run.returncode == 1, run.stdout + run.stderr
    reports = {lines.split("::")[-1].split("\n")[0]: lines for lines in f"\n{run.stdout}".split("\ntests/")[1:]}
    expected = {
        "test_is_found_inside_diffusers": "expected: a parser looks the class up by name",
        "test_layerwise_casting_inference": "expected: our schedulers keep the samples",
        "test_pickled_weights": "expected: our pipelines refuse to save pickles",
        "test_class_is_that_of_diffusers": "AssertionError: assert 'FisherSchedulerMixin' == 'SchedulerMixin'",
        "test_anything": "AssertionError: at import",
    }
    assert reports.keys() == expected.keys()
    assert all(words in reports[name] for name, words in expected.items())
    unexpected = [name for name, lines in reports.items() if "NOT EXPECTED" in lines]
    assert sorted(unexpected) == ["test_anything", "test_class_is_that_of_diffusers"]
    assert run.stdout.endswith(
        "11 of 13 tests pass with diffusers' classes; 5 of them do not pass with ours, 3 as expected\n"
    )


def test_a_path_without_tests_is_refused_in_words(tmp_path):
    run = command(tmp_path / "nowhere")
    assert run.returncode == 2
    assert "nowhere']; pass files or folders of a checkout's tests: make peer-suites TESTS=" in run.stdout


def test_skipped_missing_and_failed_tests_differ_from_passed_ones():
    stock = {"a": "", "b": "", "c": "", "d": "", "e": "fails"}
    ours = {"a": "", "b": "E   KeyError: 'FisherDDIMScheduler'", "c": "Skipped: no", "e": "fails"}
    result = peer_suites.differences(stock, ours)
    assert result == [
        Difference("b", ours["b"]), Difference("c", "Skipped: no"), Difference("d", "The test was not found."),
    ]  # fmt: skip
    assert [peer_suites.reason(each) is None for each in result] == [False, True, True]
