"""Ray survives the death of a worker, and its numbers are those of the command."""

import os
import signal
import sys
import threading
import time

import psutil
import pytest
from image_folders import CAPTIONS, image_folder, saved_pipeline

from diffusers_fisher import LikelihoodScorer
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset
from diffusers_fisher.evaluation.execution import Execution

from .test_dataset_likelihood import AGREEMENT, lines, settings_of

COUNT = 12
CORRUPT = (3,)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of Ray


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, 12 images, one of them truncated, and their likelihoods by the command."""
    folder = tmp_path_factory.mktemp("ray")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", COUNT, corrupt=CORRUPT)
    evaluate_dataset(folder / "run", settings_of(folder), batch_size=1)
    return folder


@pytest.fixture(scope="module")
def ray():
    """Ray with two cores, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # beside other work nice workers would hardly start
        ray = pytest.importorskip("ray")
        ray.init(num_cpus=2, include_dashboard=False)
        yield ray
        ray.shutdown()


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


def test_two_actors_of_ray_data_lose_no_image_when_one_is_killed(place, ray, tmp_path):
    import ray.data

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers can't import the tests
    items = [
        {"image": path.read_bytes(), "caption": CAPTIONS[number % len(CAPTIONS)], "key": path.name}
        for number in range(COUNT)
        for path in [place / "images" / f"train-{number}.png"]
    ]
    scored = ray.data.from_items(items, override_num_blocks=6).map_batches(
        DiesOnce,
        fn_constructor_args=[str(tmp_path / "died"), str(place / "pipeline")],
        fn_constructor_kwargs={"num_inference_steps": 2, "estimator": "autodiff"},
        batch_size=2, compute=ray.data.ActorPoolStrategy(size=2),
    )  # fmt: skip
    results = {row["key"]: row for row in scored.take_all()}
    assert (tmp_path / "died").exists() and len(results) == COUNT
    for row in lines(place / "run"):
        result = results[row["name"]]
        assert ("error" in row) == (result["error"] != "") == (result["status"] == "failed")
        if "error" not in row:
            assert result["bits_per_dim"] == pytest.approx(row["bits_per_dim"], abs=AGREEMENT)


def test_the_command_with_actors_of_ray_loses_no_image_when_one_is_killed(place, ray, tmp_path):
    killed = []

    def kill_one():
        while not killed:
            for process in psutil.process_iter(["cmdline"]):
                if " ".join(process.info["cmdline"] or []).startswith("ray::RayRowEvaluator.evaluate"):
                    process.kill()
                    killed.append(process.pid)
                    return
            time.sleep(0.02)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    execution = Execution(engine="ray", num_actors=2)
    summary = evaluate_dataset(tmp_path / "run", settings_of(place), batch_size=2, execution=execution)
    assert killed and (summary["images"], summary["left_out"]) == (COUNT, len(CORRUPT))
    for row, other in zip(lines(tmp_path / "run"), lines(place / "run"), strict=True):
        assert {row[name] == other.get(name) for name in ("position", "name", "error") if name in row} == {True}
        if "error" not in row:
            assert row["bits_per_dim"] == pytest.approx(other["bits_per_dim"], abs=AGREEMENT)
    assert evaluate_dataset(tmp_path / "run", settings_of(place))["last_run"]["images"] == 0
