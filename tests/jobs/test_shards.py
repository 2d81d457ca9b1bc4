"""Shards of the work over many items, and launches of another number of processes than was asked for."""

import os
import subprocess
import sys
import warnings

import pytest
from accelerate import PartialState

from diffusers_fisher import InputError
from diffusers_fisher.jobs.processes import WORLD_SIZES, check_process_number
from diffusers_fisher.jobs.shards import Shard, chosen_shard

ARRAY = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "5"}


@pytest.mark.parametrize("total", [0, 1, 23])
def test_the_parts_of_all_shards_hold_every_position_once(total):
    parts = [Shard(index, 3).part(process, 2) for index in range(3) for process in range(2)]
    positions = [list(part.positions(total)) for part in parts]
    assert sorted(position for own in positions for position in own) == list(range(total))
    for part, own in zip(parts, positions, strict=True):
        assert own == [position for position in range(total) if position in part]
        assert own == list(range(total))[part.shard_index % 3 :: 3][part.shard_index // 3 :: 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((4, 4, False), "`shard_index` is 4 with `num_shards` 4; allowed: 0 to 3"),
        ((-1, 4, False), "`shard_index` is -1; allowed"),
        ((0, 0, False), "`num_shards` is 0; allowed"),
        ((0, None, False), "`shard_index` is 0 and `num_shards` is None; allowed: both or none"),
        ((None, 4, False), "`shard_index` is None and `num_shards` is 4; allowed: both or none"),
        ((0, 4, True), "`shards_from_environment` is set together with"),
    ],
)
def test_shards_that_do_not_exist_are_refused(options, words):
    with pytest.raises(InputError, match=words):
        chosen_shard(*options)


def test_options_name_a_shard_or_none():
    assert chosen_shard(None, None, False) is None
    assert chosen_shard(0, 1, False) == Shard(0, 1)


def with_array(monkeypatch, changes):
    for name, value in {**ARRAY, "SLURM_ARRAY_TASK_MAX": None, **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)


@pytest.mark.parametrize("last", [None, "8"])
def test_a_job_array_names_the_shard(monkeypatch, last):
    with_array(monkeypatch, {"SLURM_ARRAY_TASK_MAX": last})
    assert chosen_shard(None, None, True) == Shard(2, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"SLURM_ARRAY_TASK_COUNT": None}, "has no SLURM_ARRAY_TASK_COUNT, which SLURM sets"),
        (dict.fromkeys(ARRAY), "has no SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT, SLURM_ARRAY_TASK_MIN, which"),
        ({"SLURM_ARRAY_TASK_ID": "x"}, "SLURM_ARRAY_TASK_ID 'x', .*; allowed: whole numbers"),
        ({"SLURM_ARRAY_TASK_ID": "9"}, "SLURM_ARRAY_TASK_ID '9', .* allowed: tasks with consecutive numbers"),
        ({"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_ID '4', .* allowed: tasks with consecutive numbers"),
        ({"SLURM_ARRAY_TASK_MAX": "11"}, "SLURM_ARRAY_TASK_MAX '11'; allowed: tasks with consecutive numbers"),
        (
            {"SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "7"},
            "an array of one task, which would take all items. To run one shard again",
        ),
    ],
)
def test_environments_without_a_whole_job_array_are_refused(monkeypatch, changes, words):
    with_array(monkeypatch, changes)
    with pytest.raises(InputError, match=words):
        chosen_shard(None, None, True)


@pytest.fixture
def one_process(monkeypatch):
    for name in (*WORLD_SIZES, "MASTER_ADDR", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    return PartialState(cpu=True)


def test_a_launch_that_is_alone_by_mistake_says_so(one_process, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.warns(
        UserWarning, match="asked for 4 processes, and this process works as one of 1. Launch by `torchr"
    ):
        check_process_number(one_process)


def test_a_launch_of_the_right_number_says_nothing(one_process, monkeypatch):
    with warnings.catch_warnings(action="error"):
        check_process_number(one_process)
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # of a cluster, without `accelerate launch`
        check_process_number(one_process)
        monkeypatch.setenv("WORLD_SIZE", "1")
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        check_process_number(one_process)


CHECK = """
from accelerate import PartialState
from diffusers_fisher.jobs.processes import check_process_number
check_process_number(PartialState(cpu=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", ["1", "2"])
def test_what_accelerate_launches_is_recognised(tmp_path, number):
    """`accelerate launch --cpu --num_processes 2` starts one process."""
    (tmp_path / "check.py").write_text(CHECK)
    environment = {name: text for name, text in os.environ.items() if name not in (*WORLD_SIZES, "MASTER_ADDR")}
    options = ["launch", "--cpu", "--num_processes", number, str(tmp_path / "check.py")]
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *options],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ("was asked for several processes" in run.stderr) == (number == "2")
