"""Shards of a dataset's likelihood, merged, are one run; folders that are not all shards of one run are refused."""

import json
import shutil
import subprocess
import sys
import time

import psutil
import pytest
from image_folders import image_folder, saved_pipeline
from typer.testing import CliRunner

from diffusers_fisher import CheckpointError, InputError
from diffusers_fisher.cli import app
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset
from diffusers_fisher.evaluation.likelihood_shards import merge_likelihoods
from diffusers_fisher.jobs.shards import Shard

from .test_dataset_likelihood import command, lines, settings_of

COUNT = 7
SHARDS = 3
CORRUPT = (1, 4)  # every image of the second shard


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny pipeline, 7 images, a run over all of them, and three shards, of which one has no readable image."""
    folder = tmp_path_factory.mktemp("shards")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", COUNT, corrupt=CORRUPT)
    evaluate_dataset(folder / "whole", settings_of(folder), batch_size=1)
    for index in range(SHARDS):
        evaluate_dataset(folder / f"shard-{index}", settings_of(folder), 1, shard=Shard(index, SHARDS))
    return folder


def shards_of(place):
    return [place / f"shard-{index}" for index in range(SHARDS)]


@pytest.fixture
def copies(place, tmp_path):
    """Copies of the shards' folders, which a test may damage."""
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in shards_of(place)]


def test_merged_shards_are_one_run(place, tmp_path):
    summary = merge_likelihoods(tmp_path / "merged", shards_of(place)[::-1])
    assert summary["shards"] == SHARDS and summary["left_out"] == len(CORRUPT) and "last_run" not in summary
    names = ["likelihoods.jsonl", "settings.json", "histogram.png", "index.html"]
    for name in names:
        assert (tmp_path / "merged" / name).read_bytes() == (place / "whole" / name).read_bytes(), name
    whole = json.loads((place / "whole" / "summary.json").read_text())
    times = {"process_seconds", "images_per_process_second", "last_run", "shards"}
    assert {name: summary[name] for name in summary.keys() - times} == {
        name: whole[name] for name in whole.keys() - times
    }
    again = merge_likelihoods(tmp_path / "merged", shards_of(place))
    assert again == summary
    # A run over all images takes the folder as its own.
    assert evaluate_dataset(tmp_path / "merged", settings_of(place))["last_run"]["images"] == 0


def test_a_shard_keeps_its_settings_and_its_end(place):
    settings, end = (json.loads((place / "shard-1" / name).read_text()) for name in ("settings.json", "shard.json"))
    assert (settings["shard_index"], settings["num_shards"]) == (1, SHARDS)
    assert (end["images"], end["evaluated"], end["left_out"], end["last_run"]["images"]) == (COUNT, 0, 2, 2)
    assert not (place / "shard-1" / "likelihoods.jsonl").exists()


def test_a_stream_is_shared_by_shards(place, tmp_path):
    settings = settings_of(place, data={"streaming": True})
    for index in range(2):
        evaluate_dataset(tmp_path / f"shard-{index}", settings, 1, shard=Shard(index, 2))
    merge_likelihoods(tmp_path / "merged", [tmp_path / "shard-0", tmp_path / "shard-1"])
    assert lines(tmp_path / "merged") == lines(place / "whole")


def test_more_shards_than_images_leave_shards_without_images(place, tmp_path):
    settings, folders = settings_of(place, data={"limit": 1}), [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders):
        evaluate_dataset(folder, settings, 1, shard=Shard(index, 2))
    assert merge_likelihoods(tmp_path / "merged", folders)["images"] == 1


def test_an_image_twice_or_not_at_all_is_refused(place, copies, tmp_path):
    with pytest.raises(InputError, match=r"No folder has shard 1 of 3, with the images at positions 1, 4\. Name"):
        merge_likelihoods(tmp_path / "merged", [copies[0], copies[2]])
    with pytest.raises(InputError, match=r"shard-2' and '.*twice' both have the images at positions 2, 5; allowed"):
        merge_likelihoods(tmp_path / "merged", [*copies, shutil.copytree(copies[2], tmp_path / "twice")])
    with pytest.raises(InputError, match="There are no folders of shards"):
        merge_likelihoods(tmp_path / "merged", [])
    assert not (tmp_path / "merged").exists()


def test_unfinished_shards_are_refused_by_name(copies, tmp_path):
    next((copies[2] / "records").iterdir()).unlink()
    with pytest.raises(InputError, match=r"shard-2' holds an unfinished shard, 2 of 3: it lacks the images at posi"):
        merge_likelihoods(tmp_path / "merged", copies)
    (copies[0] / "shard.json").unlink()
    with pytest.raises(InputError, match=r"shard-0' holds an unfinished shard, 0 of 3: it has not come to its end\."):
        merge_likelihoods(tmp_path / "merged", copies)


def test_folders_of_other_runs_are_refused_by_name(place, copies, tmp_path):
    with pytest.raises(InputError, match=r"absent' holds no shard: it has no settings\.json"):
        merge_likelihoods(tmp_path / "merged", [*copies[:2], tmp_path / "absent"])
    with pytest.raises(InputError, match=r"whole' holds a run over all images, and has its own report"):
        merge_likelihoods(tmp_path / "merged", [*copies[:2], place / "whole"])
    settings = json.loads((copies[2] / "settings.json").read_text())
    (copies[2] / "settings.json").write_text(json.dumps({**settings, "seed": 3, "num_shards": 4}))
    words = r"shard-2' has other settings than '.*shard-0': `num_shards` was 3, is 4; `seed` was 0, is 3\. Merge"
    end = json.loads((copies[2] / "shard.json").read_text())
    (copies[2] / "shard.json").write_text(json.dumps({**end, "images": 3}))  # all images of shard 2 of 4 among three
    with pytest.raises(InputError, match=words):
        merge_likelihoods(tmp_path / "merged", copies)
    (copies[2] / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"shard-2' is a shard of 3 images, and '.*shard-0' of 7; allowed: the same"):
        merge_likelihoods(tmp_path / "merged", copies)
    (copies[2] / "shard.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"shard\.json' does not hold the end of a shard"):
        merge_likelihoods(tmp_path / "merged", copies)


def test_outputs_that_hold_something_else_are_refused(place, copies, tmp_path):
    output = shutil.copytree(place / "whole", tmp_path / "whole")
    file = min((output / "records").iterdir())
    shutil.copyfile(file, file.with_name(file.name.replace("000000000", "000000009")))
    with pytest.raises(InputError, match=r"whole' has records that are in no folder of a shard, such as '0000"):
        merge_likelihoods(output, copies)
    with pytest.raises(InputError, match=r"holds records of other settings: `num_shards` was 3, is absent"):
        merge_likelihoods(copies[0], copies)
    with pytest.raises(InputError, match="lies in the folder of the data"):
        merge_likelihoods(place / "images" / "merged", copies)


def test_shards_of_images_that_have_changed_or_that_all_fail_are_refused(place, tmp_path):
    images = image_folder(tmp_path / "images", 2, corrupt=(0, 1))
    settings = settings_of(place, data={"path": str(images)})
    folders = [tmp_path / "a", tmp_path / "b"]
    for index, folder in enumerate(folders):
        evaluate_dataset(folder, settings, 1, shard=Shard(index, 2))
    with pytest.raises(InputError, match=r"Not one image could be evaluated\. The first: Image 'train-0\.png' of"):
        merge_likelihoods(tmp_path / "merged", folders)
    image_folder(tmp_path / "images", 2)
    with pytest.raises(InputError, match=r"a' has likelihoods of other images: `images` was \"2, .* Take the images"):
        merge_likelihoods(tmp_path / "merged", folders)


def test_a_shard_goes_on_as_the_same_shard_alone(copies, place):
    with pytest.raises(InputError, match="holds records of other settings: `shard_index` was 0, is 1"):
        evaluate_dataset(copies[0], settings_of(place), shard=Shard(1, SHARDS))
    with pytest.raises(InputError, match="holds records of other settings: `num_shards` was 3, is absent"):
        evaluate_dataset(copies[0], settings_of(place))


def test_the_commands_take_a_shard_from_a_job_array(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "2")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for task in ("1", "2"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        arguments = command(place, tmp_path / task, "--shards-from-environment", "--limit", "3")[2:]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert "Shard 1 of 2 is finished: 1 of 3 images, 1 of them left out" in result.output
    result = CliRunner().invoke(app, ["merge", *(str(tmp_path / name) for name in ("merged", "1", "2"))])
    assert result.exit_code == 0 and "2 of 3 images" in result.output
    assert [row["position"] for row in lines(tmp_path / "merged")] == [0, 1, 2]
    result = CliRunner().invoke(app, ["merge", *(str(tmp_path / name) for name in ("merged", "1", "1"))])
    assert result.exit_code == 1 and "both have the images at positions 0, 2" in result.stderr


@pytest.mark.slow
def test_shards_that_were_killed_and_that_had_two_processes_are_one_run(tmp_path):
    """SIGKILL ends both shards after their first file. One goes on in one process, the other in two."""
    image_folder(tmp_path / "images", count=40)
    saved_pipeline(tmp_path / "pipeline")
    folders = [tmp_path / "shard-0", tmp_path / "shard-1"]
    for index, folder in enumerate(folders):
        options = ("--batch-size", "1", "--shard-index", str(index), "--num-shards", "2")
        process = subprocess.Popen([sys.executable, *command(tmp_path, folder, *options)], stdout=subprocess.DEVNULL)
        while not list(folder.glob("records/0*.json")):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        psutil.Process(process.pid).kill()
        process.wait()
        with pytest.raises(InputError, match="holds an unfinished shard"):
            merge_likelihoods(tmp_path / "merged", folders[: index + 1])
        launcher = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731") if index else ()
        subprocess.run(
            [sys.executable, *launcher, *command(tmp_path, folder, *options)], check=True, capture_output=True
        )
    merge_likelihoods(tmp_path / "merged", folders)
    evaluate_dataset(tmp_path / "whole", settings_of(tmp_path), batch_size=1)
    assert lines(tmp_path / "merged") == lines(tmp_path / "whole")
