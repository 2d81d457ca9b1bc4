"""The commands of docs/million_images.md run as they stand, and Ray Data survives the death of a worker."""

import os
import re
import shlex
import signal
from pathlib import Path

import pytest
from image_folders import CAPTIONS, image_folder, saved_pipeline
from typer.testing import CliRunner

from diffusers_fisher import LikelihoodScorer
from diffusers_fisher.cli import app
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset

from .test_dataset_likelihood import AGREEMENT, lines, settings_of

PAGE = (Path(__file__).parents[2] / "docs" / "million_images.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], {})
    commands = [line for line in re.findall(r"^    diffusers-fisher (.*)$", PAGE, re.MULTILINE) if "$" not in line]
    commands = [line for line in commands if not line.endswith("\\")]
    assert len(commands) == 4
    for line in commands:
        result = CliRunner().invoke(app, shlex.split(line))
        assert result.exit_code == 0, result.output
    assert len(lines(tmp_path / "outputs" / "likelihood")) == 16


class DiesOnce:
    """A scorer whose first process ends without a word after its first batch."""

    def __init__(self, marker, model, **settings):
        self.marker, self.scorer = marker, LikelihoodScorer(model, **settings)

    def __call__(self, batch):
        results = self.scorer(batch)
        try:
            os.mkdir(self.marker)
        except FileExistsError:
            return results
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray
def test_two_actors_of_ray_lose_no_image_when_one_is_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray = pytest.importorskip("ray")
    pipeline, count, corrupt = saved_pipeline(tmp_path / "pipeline"), 12, (3,)
    image_folder(tmp_path / "images", count, corrupt=corrupt)
    evaluate_dataset(tmp_path / "run", settings_of(tmp_path), batch_size=1)
    items = [
        {"image": path.read_bytes(), "caption": CAPTIONS[number % len(CAPTIONS)], "key": path.name}
        for number in range(count)
        for path in [tmp_path / "images" / f"train-{number}.png"]
    ]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        import ray.data

        scored = ray.data.from_items(items, override_num_blocks=6).map_batches(
            DiesOnce,
            fn_constructor_args=[str(tmp_path / "died"), pipeline],
            fn_constructor_kwargs={"num_inference_steps": 2, "estimator": "autodiff"},
            batch_size=2, compute=ray.data.ActorPoolStrategy(size=2),
        )  # fmt: skip
        results = {row["key"]: row for row in scored.take_all()}
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists() and len(results) == count
    for row in lines(tmp_path / "run"):
        result = results[row["name"]]
        assert ("error" in row) == (result["error"] != "") == (result["status"] == "failed")
        if "error" not in row:
            assert result["bits_per_dim"] == pytest.approx(row["bits_per_dim"], abs=AGREEMENT)
