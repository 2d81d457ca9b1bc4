"""The benchmarks of white noise and of cheap runs: their tiny forms, and what they compare."""

import importlib
import json
import sys

import pytest

from .test_examples import EXAMPLES, script


@pytest.fixture
def load(monkeypatch):
    """A function that imports a benchmark, for which `guidance` is a benchmark and not this folder of tests."""
    monkeypatch.setitem(sys.modules, "guidance", script(EXAMPLES / "benchmarks" / "guidance.py"))
    return importlib.import_module


def test_held_out_rewards_are_compared_where_the_rewards_meet(load):
    benchmark = load("noise_whiteness")
    plain = {"rewards": [[0, 0], [2, 2], [4, 4]], "held_out": [[0, 0], [5, 7], [1, 2]], "seconds": [1, 1, 1]}
    soft = {"rewards": [[0, 0], [1, 1], [2, 2]], "held_out": [[0, 0], [3, 3], [6, 10]], "seconds": [1, 1, 1]}
    result = benchmark.at_equal_reward({"none": [plain], "soft": [soft]})
    assert result["reward"] == 2
    assert (result["none"]["run"], result["soft"]["run"]) == (1, 2)
    assert (result["none"]["held_out"], result["soft"]["held_out"]) == (6, 8)
    assert result["soft"]["held_out_difference"] == 2
    assert result["soft"]["held_out_difference_standard_error"] == pytest.approx(1)  # differences 1 and 3
    rows = [{**soft, "whiteness": [[0.5, 0.5], [0.001, 0.5], [0.5, 0.005]], "best_runs": [2, 2]}]
    summary = benchmark.summarise(rows)
    assert (summary["whiteness_below_0.01"], summary["after"], summary["held_out_after"]) == (0.5, 2, 8)


def test_cheap_runs_are_compared_prompt_by_prompt(load):
    benchmark = load("guidance_steps")
    full = {
        "rewards": [1.0, 3.0], "held_out": [0.0, 0.0], "cheap_rewards": None, "full_rewards": None, "reordered": 0.0,
        "guidance_scheduler": "", "seconds": 10.0, "denoiser_calls": 100,
    }  # fmt: skip
    cheap = {
        **full, "rewards": [2.0, 6.0], "cheap_rewards": [1.0, 5.0], "full_rewards": [2.0, 6.0], "reordered": 0.5,
        "seconds": 4.0, "denoiser_calls": 30,
    }  # fmt: skip
    summary = benchmark.summarise([cheap], [full])
    assert (summary["rewards"], summary["rewards_difference"]) == (4, 2)
    assert summary["rewards_difference_standard_error"] == pytest.approx(1)  # differences 1 and 3
    assert (summary["denoiser_calls_over_full_runs"], summary["seconds_over_full_runs"]) == (0.3, 0.4)
    assert (summary["cheap_rewards"], summary["full_rewards"], summary["pairs_reordered"]) == (3, 4, 0.5)
    assert "cheap_rewards" not in benchmark.summarise([full], [full])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise_whiteness", "guidance_steps"])
def test_tiny_benchmarks_compute_nothing_twice(name, load, tmp_path, monkeypatch):
    benchmark = load(name)
    benchmark.main(["--tiny", "--records", str(tmp_path)])
    count = len(list((tmp_path / "records").iterdir()))
    monkeypatch.setattr(benchmark.Problem, "rewards", lambda *_: dict.fromkeys(["another class", "left minus right"]))
    setting = benchmark.dataclasses.replace(benchmark.TINY, compared_prompts=benchmark.TINY.prompts)
    result = benchmark.run(setting, tmp_path)
    assert len(list((tmp_path / "records").iterdir())) == count
    json.dumps(result, allow_nan=False)
