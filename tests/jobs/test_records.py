"""Records of many items are whole or absent, and never belong to other settings."""

import json
import os
import signal
import subprocess
import sys

import pytest

from diffusers_fisher import CheckpointError, InputError
from diffusers_fisher.jobs.records import Records, item_keys, shard

SETTINGS = {"steps": 3, "prompts": ["a", "b"], "scale": 2.0}


def test_the_next_run_reads_the_records(tmp_path):
    keys = item_keys(3)
    first = Records(tmp_path, SETTINGS)
    assert first.missing(keys) == keys == ["00000", "00001", "00002"]
    first.write(keys[1], {"reward": [0.25, 1.0]})
    second_records = Records(tmp_path, {**SETTINGS, "prompts": ("a", "b")})  # JSON makes it a list
    assert second_records.missing(keys) == [keys[0], keys[2]]
    assert second_records.done() == {keys[1]}
    assert second_records.read(keys[1]) == {"reward": [0.25, 1.0]}
    for key in (keys[0], keys[2]):
        second_records.write(key, {"key": key})
    assert [record.get("key") for record in second_records.collected(keys)] == [keys[0], None, keys[2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, "`steps` was 3, is 4"),
        ({"more": None}, "`more` was absent, is null"),
        ({"prompts": ["x" * 200]}, r'`prompts` was \["a", "b"\], is \["xxx.*\.\.\.'),
    ],
)
def test_other_settings_are_refused_and_named(tmp_path, changes, message):
    Records(tmp_path, SETTINGS).write("a", {})
    with pytest.raises(InputError, match=rf"holds records of other settings: {message}\. Take the same settings"):
        Records(tmp_path, SETTINGS | changes)
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS


def test_a_run_without_records_leaves_the_folder_to_other_settings(tmp_path):
    Records(tmp_path, SETTINGS)
    Records(tmp_path, SETTINGS | {"steps": 4}).write("a", {})
    with pytest.raises(InputError, match="`steps` was 4, is 3"):
        Records(tmp_path, SETTINGS)


def test_records_without_settings_are_refused(tmp_path):
    Records(tmp_path, SETTINGS).write("a", {})
    (tmp_path / "settings.json").unlink()
    with pytest.raises(CheckpointError, match=r"has records but no settings\.json; name another folder"):
        Records(tmp_path, SETTINGS)


@pytest.mark.parametrize("text", ["", '{"reward": ', "[1]"], ids=["empty", "cut", "no record"])
def test_damaged_record_is_named(tmp_path, text):
    records = Records(tmp_path, SETTINGS)
    (tmp_path / "records" / "a.json").write_text(text)
    with pytest.raises(
        CheckpointError, match=r"records/a\.json' (is not valid JSON|is no record of this run: Input should be)"
    ):
        records.read("a")


def test_missing_record_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"records/b\.json"):
        Records(tmp_path, SETTINGS).collected(["b"])


@pytest.mark.parametrize("key", ["", ".hidden", "a/b", "../a", "-x", "a b", "x" * 201])
def test_keys_that_are_no_file_names_are_refused(tmp_path, key):
    with pytest.raises(InputError, match=r"The item's key is .*; allowed: up to 200 letters"):
        Records(tmp_path, SETTINGS).write(key, {})


def test_numbers_that_are_not_finite_never_get_into_a_record(tmp_path):
    records = Records(tmp_path, SETTINGS)
    with pytest.raises(ValueError, match="Out of range float values"):
        records.write("a", {"reward": float("nan")})
    assert records.done() == set()
    assert sorted(path.name for path in (tmp_path / "records").iterdir()) == []


def test_folder_that_can_not_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(InputError, match="can't be written"):
        Records(tmp_path / "file" / "inside", SETTINGS)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_shards_are_a_partition(processes):
    items = list(range(6))
    shards = [shard(items, index, processes) for index in range(processes)]
    assert sorted(item for part in shards for item in part) == items
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


WRITER = """
import sys
from diffusers_fisher.jobs.records import Records
records = Records(sys.argv[1], {})
print("ready", flush=True)
for index in range(10**6):
    records.write(f"{index:07d}", {"values": list(range(2000))})
"""


def test_kill_leaves_whole_records_only(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert writer.stdout.readline() == "ready\n"
        while len(list((tmp_path / "records").glob("0*.json"))) < 5:
            assert writer.poll() is None
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    records = Records(tmp_path, {})
    assert len(records.done()) >= 5
    assert all(record == {"values": list(range(2000))} for record in records.collected(sorted(records.done())))
