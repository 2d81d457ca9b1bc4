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


def test_bounds_with_a_pull_are_compared_prompt_by_prompt(load):
    benchmark = load("guidance_regulariser")
    free = {"rewards": [[0, 0], [2, 2]], "held_out": [[0, 0], [5, 7]], "seconds": [1, 1], "bound_before": [1.0, 2.0]}
    rows = [free | {"bound": [2.0, 4.0]}], [free | {"bound": [1.0, 1.0]}]
    summary = benchmark.summarise(*rows)
    assert (summary["reward"], summary["held_out"], summary["bound_before"], summary["bound"]) == (2, 6, 1.5, 3)
    assert (summary["bound_difference"], summary["bound_difference_standard_error"]) == (2, pytest.approx(1))


def test_cheap_runs_are_compared_prompt_by_prompt(load):
    benchmark = load("guidance_steps")
    full = {
        "rewards": [1.0, 3.0], "held_out": [0.0, 0.0], "cheap_rewards": None, "full_rewards": None, "reordered": 0.0,
        "guidance_scheduler": "", "seconds": 10.0, "denoiser_calls": 100, "iterations": 2,
    }  # fmt: skip
    cheap = {
        **full, "rewards": [2.0, 6.0], "cheap_rewards": [1.0, 5.0], "full_rewards": [2.0, 6.0], "reordered": 0.5,
        "seconds": 4.0, "denoiser_calls": 30,
    }  # fmt: skip
    summary = benchmark.summarise([cheap], [full])
    assert (summary["rewards"], summary["rewards_difference"]) == (4, 2)
    assert summary["rewards_difference_standard_error"] == pytest.approx(1)  # differences 1 and 3
    assert (summary["denoiser_calls_over_exact"], summary["seconds_over_exact"]) == (0.3, 0.4)
    assert (summary["cheap_rewards"], summary["full_rewards"], summary["pairs_reordered"]) == (3, 4, 0.5)
    assert "cheap_rewards" not in benchmark.summarise([full], [full])


def test_cheap_runs_fit_into_shares_of_the_exact_methods_cost(load):
    benchmark = load("guidance_steps")
    setting = benchmark.Setting(steps=25, iterations=10)
    price = {"denoise": 1.0, "denoise backward": 3.0, "decode": 1.0, "decode backward": 3.0}
    assert benchmark.exact_cost(setting, price) == 10 * 78 + 26
    # A sixth of 806 is 134.3: 26 for the last full run, 6 for the last run of 5 steps, and 9 per guidance step.
    assert benchmark.num_iterations(setting, price, 5, 1 / 6) == 11
    assert benchmark.num_iterations(setting, price, None, 1.0) == 26  # 29 each


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise_whiteness", "guidance_steps", "guidance_regulariser"])
def test_tiny_benchmarks_compute_nothing_twice(name, load, tmp_path, monkeypatch):
    benchmark = load(name)
    benchmark.main(["--tiny", "--records", str(tmp_path)])
    count = len(list((tmp_path / "records").iterdir()))
    names = ["another class", "left minus right", "inpainting"]
    monkeypatch.setattr(benchmark.Problem, "rewards", lambda *_: dict.fromkeys(names))
    setting = benchmark.dataclasses.replace(benchmark.TINY, compared_prompts=benchmark.TINY.prompts)
    result = benchmark.run(setting, tmp_path)
    assert len(list((tmp_path / "records").iterdir())) == count
    json.dumps(result, allow_nan=False)
