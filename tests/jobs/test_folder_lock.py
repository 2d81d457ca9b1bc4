"""The lock of a folder: one living owner, whose death frees the folder, on one machine and on several."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from image_folders import image_folder, saved_pipeline
from typer.testing import CliRunner

from diffusers_fisher import InputError
from diffusers_fisher.cli import app
from diffusers_fisher.files import read_json
from diffusers_fisher.jobs import folder_lock
from diffusers_fisher.jobs.folder_lock import LOCK, FolderLock

HOLD = (
    "import sys, time, pathlib; from diffusers_fisher.jobs.folder_lock import FolderLock\n"
    "with FolderLock(pathlib.Path(sys.argv[1])): print('locked', flush=True); time.sleep(60)"
)


@pytest.fixture(autouse=True)
def impatience(monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 0.0)


@contextlib.contextmanager
def holding(folder):
    """Starts another process, which holds the lock of `folder`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def write_owner(folder, **changes):
    """Writes a lock as this process would write it, with `changes`."""
    with FolderLock(folder):
        owner = json.loads((folder / LOCK).read_text())
    (folder / LOCK).write_text(json.dumps({**owner, **changes}))


def test_the_lock_is_removed_with_its_block_and_after_an_error(tmp_path):
    with FolderLock(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]
    with contextlib.suppress(KeyboardInterrupt), FolderLock(tmp_path):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_living_owner_is_named_and_keeps_its_folder(tmp_path):
    with holding(tmp_path) as process:
        with pytest.raises(InputError, match=rf"process {process.pid} on .*, since 20.*Name another folder.*{LOCK}"):
            FolderLock(tmp_path).__enter__()
        assert json.loads((tmp_path / LOCK).read_text())["process"] == process.pid
        assert len(list(tmp_path.iterdir())) == 1


def test_one_process_has_the_lock_once(tmp_path):
    with FolderLock(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), FolderLock(tmp_path):
        pass


def test_a_killed_owner_gives_the_folder_free(tmp_path):
    with holding(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / LOCK).exists()
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_killed_owner_whose_parent_has_not_noticed_is_dead(tmp_path):
    with holding(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        with FolderLock(tmp_path):
            pass


def test_a_run_waits_a_moment_for_a_process_that_is_ending(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE_SECONDS", 60.0)
    with holding(tmp_path) as process:
        threading.Timer(0.5, process.kill).start()
        with FolderLock(tmp_path):
            assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_another_process_with_the_number_of_a_dead_owner_is_not_the_owner(tmp_path):
    write_owner(tmp_path, started=psutil.Process().create_time() - 100)
    with FolderLock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[]", '{"process": "x"}'], ids=repr)
def test_a_damaged_lock_holds_until_it_is_old(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    with pytest.raises(InputError, match="has not ended"):
        FolderLock(tmp_path).__enter__()
    timestamp = time.time() - folder_lock.SILENT_SECONDS - 1
    os.utime(tmp_path / LOCK, (timestamp, timestamp))
    with FolderLock(tmp_path):
        pass


def test_an_owner_of_another_machine_lives_as_long_as_it_touches_its_lock(tmp_path, monkeypatch):
    write_owner(tmp_path, machine="elsewhere", host="elsewhere", process=1)
    with pytest.raises(InputError, match="process 1 on elsewhere"):
        FolderLock(tmp_path).__enter__()
    monkeypatch.setattr(folder_lock, "SILENT_SECONDS", 0.05)
    time.sleep(0.1)
    with FolderLock(tmp_path):
        pass


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "BEAT_SECONDS", 0.05)
    with FolderLock(tmp_path):
        before = (tmp_path / LOCK).stat().st_mtime_ns
        time.sleep(0.5)
        assert (tmp_path / LOCK).stat().st_mtime_ns > before


def test_an_owner_that_lost_its_folder_leaves_the_new_lock(tmp_path):
    owner = json.dumps({"process": 1, "host": "elsewhere", "machine": "elsewhere"})
    with FolderLock(tmp_path):
        (tmp_path / LOCK).write_text(owner)
    assert (tmp_path / LOCK).read_text() == owner
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_system_without_hard_links_has_locks_too(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", link)
    with FolderLock(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()} on"), FolderLock(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_of_many_runs_that_find_a_dead_owner_one_takes_the_folder(tmp_path):
    begin, end, results = threading.Barrier(8), threading.Barrier(8), []

    def run():
        begin.wait()
        try:
            with FolderLock(tmp_path):
                results.append(True)
                end.wait()  # until all have tried
        except InputError:
            results.append(False)
            end.wait()

    for _ in range(10):
        write_owner(tmp_path, started=0.0)
        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [False] * 7 + [True]
        assert not list(tmp_path.iterdir())
        results.clear()


def test_a_run_that_was_killed_while_it_took_a_lock_over_blocks_nobody(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "TURN_SECONDS", 0.2)
    write_owner(tmp_path, started=0.0)
    (tmp_path / folder_lock.TURN).touch()
    with FolderLock(tmp_path):
        assert [file.name for file in tmp_path.iterdir()] == [LOCK]


def test_of_two_runs_of_other_settings_in_one_folder_the_second_is_refused(tmp_path):
    """The second command starts while the first one loads, before it has written anything but its lock."""
    saved_pipeline(tmp_path / "pipeline")
    image_folder(tmp_path / "images", count=6)
    output = tmp_path / "run"

    def command(steps):
        return [
            sys.executable, "-m", "diffusers_fisher.cli", "likelihood", "--model", str(tmp_path / "pipeline"),
            "--data", str(tmp_path / "images"), "--num-inference-steps", str(steps), "--output", str(output),
        ]  # fmt: skip

    first = subprocess.Popen(command(400), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (output / LOCK).exists():
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.02)
    second = CliRunner().invoke(app, command(2)[3:])
    assert second.exit_code == 1
    assert f"belongs to a run that has not ended: process {first.pid} on" in second.output
    first.kill()
    first.communicate()
    assert not (output / "settings.json").exists() or read_json(output / "settings.json")["num_inference_steps"] == 400
