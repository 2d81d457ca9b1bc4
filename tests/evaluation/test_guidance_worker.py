"""A worker gives the images of the command under every engine, and a row for every bad prompt."""

import io
import json
import math
import pickle

import datasets
import numpy
import pandas
import pytest
from PIL import Image

from diffusers_fisher import GuidanceWorker, InputError
from diffusers_fisher.evaluation import guidance_worker
from diffusers_fisher.evaluation.guidance_gallery import GallerySettings, Memory, run_gallery
from diffusers_fisher.evaluation.guidance_worker import NUMBERS, RESULTS

PROMPTS = ["a photo of a sneaker", "a photo of a bag"]
OPTIONS = {
    "held_out": "classifier:embedded:sneaker", "num_guidance_steps": 1, "num_inference_steps": 2,
    "guidance_scale": 2.0, "seed": 5,
    "estimator": "direct",  # the differences of the default estimator would amplify the rounding of other batches
}  # fmt: skip


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """The folder of the command's run over both prompts, of the seeds 5 and 6."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    run_gallery(folder / "out", folder / "prompts.txt", GallerySettings(**OPTIONS), Memory(2))
    return folder / "out"


@pytest.fixture(scope="module")
def worker():
    return GuidanceWorker("embedded", batch_size=2, **OPTIONS)


def expect_the_commands(gallery, results, rows):
    """Compares rows of columns with the records and pictures of the command, in its order."""
    for number, row in enumerate(rows):
        record = json.loads((gallery / "records" / f"{number:05d}.json").read_text())
        best = record["best_run"]
        with Image.open(io.BytesIO(results["image"][row])) as picture, Image.open(gallery / record["after"]) as other:
            difference = numpy.asarray(picture).astype(int) - numpy.asarray(other)
        assert abs(difference).max() <= 1  # of rounding, in another batch
        numbers = [record["rewards"][0], record["rewards"][best], record["held_out"][best]]
        assert [results[name][row] for name in NUMBERS] == pytest.approx(numbers, rel=1e-4, abs=1e-4)
        assert results["status"][row] == "completed" and results["error"][row] == ""


def test_prompts_have_the_images_of_the_command_and_bad_rows_an_error(gallery, worker):
    prompts = [PROMPTS[1], 3.5, PROMPTS[0], None, "a photo of a bag"]
    results = worker({"prompt": prompts, "seed": [6, 6, numpy.int64(5), 6, -1], "key": list("abcde")})
    assert list(results) == ["key", *RESULTS] and list(results["key"]) == list("abcde")
    expect_the_commands(gallery, results, rows=(2, 0))
    words = [
        "",
        "Row 1: the prompt is 3.5 (float); allowed: a text or a class label.",
        "",
        "Row 3: the prompt is None",
    ]
    words.append("Row 4: the seed is -1 (int); allowed: a whole number that is not negative.")
    for row, word in enumerate(words):
        assert word in results["error"][row] and (results["status"][row] == "failed") == bool(word)
        if word:
            assert results["image"][row] == b"" and all(math.isnan(results[name][row]) for name in NUMBERS)


def test_datasets_map_takes_a_worker(gallery, worker):
    rows = datasets.Dataset.from_dict({"prompt": PROMPTS, "seed": [5, 6]}).rename_column("seed", "other")
    results = rows.rename_column("other", "seed").map(pickle.loads(pickle.dumps(worker)), batched=True)
    expect_the_commands(gallery, results[:], rows=(0, 1))
    assert results.features["reward"].dtype == "float64" and results.features["image"].dtype == "binary"


def test_frames_of_spark_have_the_types_of_rows_without_a_good_prompt(worker):
    frames = list(worker.score_frames(iter([pandas.DataFrame({"prompt": [1.5, math.nan]})])))
    assert list(frames[0].columns) == list(RESULTS) and frames[0]["reward"].dtype == "float64"
    assert (frames[0]["status"] == "failed").all()


def test_prompts_that_the_pipeline_refuses_are_rows(worker, monkeypatch):
    """A process keeps the model; a reward that refuses one of two prompts leaves the other its image."""
    guide = guidance_worker._guide(worker.settings, worker.memory, None)
    reward = guide.reward

    def refuse_bags(images, prompts):
        if any("bag" in prompt for prompt in prompts):
            raise InputError("No bags are allowed.")
        return reward(images, prompts)

    monkeypatch.setattr(guide, "reward", refuse_bags)
    results = worker({"prompt": numpy.array(PROMPTS)})
    assert [bool(error) for error in results["error"]] == [False, True] and "No bags" in results["error"][1]
    assert guidance_worker._guide.cache_info().currsize == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": 3}, "`model` is 3 .*; allowed: a string"),
        ({"steps": 3}, r"`steps` is no setting of a worker; allowed: batch_size, .*, step_size\."),
        ({"batch_size": 0}, "`batch_size` is 0; allowed"),
        ({"estimator": "best"}, "`estimator` is 'best'; allowed"),
        ({"optimizer": "Best"}, "Best"),
        ({"patience": 1, "batch_size": 2}, "`patience` counts runs of a whole batch"),
    ],
)
def test_settings_that_do_not_exist_are_refused_at_once(options, words):
    with pytest.raises(InputError, match=words):
        GuidanceWorker(**{"model": "absent", **options})


def test_models_devices_and_batches_that_do_not_fit_are_errors(worker):
    with pytest.raises(InputError, match=r"The batch has no column 'prompt'; it has: text\. Set `prompt_column`"):
        worker({"text": ["a"]})
    with pytest.raises(InputError, match="has a column 'reward' already, which the results would replace"):
        worker({"prompt": ["a"], "reward": [1.0]})
    with pytest.raises(InputError, match="'absent' can't be loaded as a pipeline"):
        GuidanceWorker("absent")({"prompt": ["a"]})
    with pytest.raises(InputError, match="`device` is 'cuda:77', which can't be used here"):
        GuidanceWorker("embedded", device="cuda:77")({"prompt": ["a"]})
    with pytest.raises(InputError, match=r"`device` is 'abacus', which can't be used here: .* Name a device"):
        GuidanceWorker("embedded", device="abacus")({"prompt": ["a"]})
    assert list(GuidanceWorker("never loaded")({"prompt": []})) == list(RESULTS)
