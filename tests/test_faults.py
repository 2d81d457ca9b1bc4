"""Full disks, unwritable places, killed runs and damaged files: words that name the file, and nothing lost."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import psutil
import pytest
import torch
from image_folders import image_folder

from diffusers_fisher import CheckpointError, GaussianFisher, InputError, embedded_checkpoint
from diffusers_fisher.data import CachedLatents
from diffusers_fisher.distributions import banks
from diffusers_fisher.evaluation.dataset_likelihood_report import ImageGroup, ImageRecords
from diffusers_fisher.evaluation.guidance_gallery_report import FailedPrompt, GuidedPrompt
from diffusers_fisher.files import (
    SILENT_SECONDS,
    WriteError,
    atomic_path,
    check_writable,
    load_tensors,
    read_json,
    read_table,
    save_tensors,
    write_json,
    writing,
)
from diffusers_fisher.guidance import named_reward
from diffusers_fisher.guidance.movers import optimizer_factory
from diffusers_fisher.jobs.command import errors_in_words
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.jobs.pages import Page
from diffusers_fisher.jobs.pipelines import DenoiserSettings, load_pipeline
from diffusers_fisher.jobs.records import Records
from diffusers_fisher.training.checkpoints import TrainingFolder
from diffusers_fisher.training.paths import Paths
from diffusers_fisher.training.trace_config import TraceMatchingConfig

resource = pytest.importorskip("resource", reason="limits of files are POSIX's")


@pytest.fixture
def small_files():
    """Files of this process can't be larger than 2,000 bytes, as on a full disk."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


WRITERS = {
    "JSON": lambda path: write_json(path, "x" * 5000),
    "tensors": lambda path: save_tensors(path, {"a": torch.zeros(5000)}, {}),
    "page": lambda path: Page("x" * 5000).write(path),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_an_error_in_words_and_the_old_file_stays(tmp_path, small_files, writer):
    (tmp_path / "result").write_text("old")
    with pytest.raises(WriteError, match=r"result' can't be written: .*large.*make room there and run the same"):
        WRITERS[writer](tmp_path / "result")
    assert [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_text() == "old"


def test_a_full_disk_is_seen_before_the_work(tmp_path, small_files):
    with pytest.raises(InputError, match=r"can't be written: .*File too large.* Name another folder"):
        check_writable(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_advice_of_the_outer_block_is_given(tmp_path):
    (tmp_path / "state").mkdir()
    words = r"state' can't be written: Is a directory; the last step is 3\.$"
    with pytest.raises(WriteError, match=words), writing(tmp_path / "state", "the last step is 3"):
        write_json(tmp_path / "state", {})


def test_errors_of_other_files_and_of_the_package_pass_unchanged(tmp_path):
    """A record that can't be read while a report is written is not a full disk."""
    with pytest.raises(CheckpointError, match=r"nothing\.json' is not valid JSON"), atomic_path(tmp_path / "report"):
        read_json(tmp_path / "nothing.json")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_full_disks_that_other_libraries_meet_are_words_on_the_command_line(number, capsys):
    with pytest.raises(SystemExit), errors_in_words():
        raise OSError(number, os.strerror(number), "/cache/model")
    assert f"Error: [Errno {number}] {os.strerror(number)}: '/cache/model'. Make room" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError), errors_in_words():
        raise FileNotFoundError(errno.ENOENT, "No such file")


KILLED = """
import sys, time
from pathlib import Path
from diffusers_fisher.files import atomic_path
with atomic_path(Path(sys.argv[1], "report.json")) as one, atomic_path(Path(sys.argv[1], "sub", "b.png")) as two:
    one.write_text("half")
    two.write_text("half")
    print("there", flush=True)
    time.sleep(600)
"""


def test_temporary_files_of_killed_runs_are_removed_and_those_of_others_stay(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".report.json.swp").write_text("an editor's")
    with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        hidden = {path.name for path in tmp_path.rglob(".*")}
        assert len(hidden) == 3
        check_writable(tmp_path)
        assert {path.name for path in tmp_path.rglob(".*")} == hidden  # the process lives
        process.kill()
        process.wait()
        check_writable(tmp_path)
    assert [path.name for path in tmp_path.rglob(".*")] == [".report.json.swp"]


def test_a_process_with_the_number_of_a_dead_one_owns_nothing_of_it(tmp_path):
    with atomic_path(tmp_path / "a.json") as temporary:
        temporary.write_text("half")
        check_writable(tmp_path)
        assert temporary.exists()
        before = psutil.Process().create_time() - 60
        os.utime(temporary, (before, before))
        check_writable(tmp_path)
        assert not temporary.exists()
        temporary.write_text("whole")


def test_temporary_files_of_other_machines_are_removed_when_they_are_old(tmp_path):
    file = tmp_path / f".a.json.{'0' * 8}-1-{'0' * 8}.json"
    file.write_text("half")
    check_writable(tmp_path)
    assert file.exists()
    timestamp = time.time() - SILENT_SECONDS - 60
    os.utime(file, (timestamp, timestamp))
    check_writable(tmp_path)
    assert not file.exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 5000, "{'a': 1}", "\ufeff"], ids=["deep", "long", "Python", "mark"]
)
def test_json_of_every_damage_names_its_file(tmp_path, text):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"a\.json' is not valid JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [[1], 3, None, "a"])
def test_json_that_is_no_object_names_its_file(tmp_path, content):
    write_json(tmp_path / "a.json", content)
    with pytest.raises(CheckpointError, match=r"a\.json' holds a \w+; it must hold a JSON object"):
        read_table(tmp_path / "a.json")


ROW = {"position": 0, "name": "a.png", "caption": None, "bits_per_dim": 1.0, "discretisation_error": 0.0,
       "standard_error": None, "dims": 4}  # fmt: skip
METHOD = dict.fromkeys(("space", "density", "prior", "trace", "scheme"), "x")
GROUP = {"method": METHOD, "seconds": 1.0, "records": [ROW, {"position": 1, "name": "b", "error": "no image"}]}
FOREIGN_GROUPS = {
    "of another program": ({"result": 3}, "method"),
    "a list": ([GROUP], "dictionary"),
    "no records": (GROUP | {"records": None}, "records"),
    "a record as text": (GROUP | {"records": ["a"]}, "records"),
    "a position as text": (GROUP | {"records": [ROW | {"position": "0"}]}, "position"),
    "no number": (GROUP | {"records": [{**ROW, "bits_per_dim": "1"}]}, "bits_per_dim"),
    "NaN": (GROUP | {"seconds": float("nan")}, "seconds.*finite"),
}


@pytest.mark.parametrize("name", FOREIGN_GROUPS)
def test_foreign_records_of_likelihoods_are_named(tmp_path, name):
    content, words = FOREIGN_GROUPS[name]
    records = Records(tmp_path, {}, ImageGroup)
    records.write("a", GROUP)
    assert ImageRecords(records).positions == {0, 1}
    (tmp_path / "records" / "b.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"b\.json' is no record of this run: .*{words}.*delete it"):
        ImageRecords(records)


GUIDED = {"prompt": "a", "before": "b.png", "after": "c.png", "best_run": 0, "rewards": [0.0], "held_out": [],
          "shell_distances": [None], "whiteness": [0.5], "seconds": [1.0], "status": "completed",
          "flagged": []}  # fmt: skip


@pytest.mark.parametrize(
    "change", [{"rewards": 3}, {"rewards": []}, {"prompt": None}, {"best_run": -1}, {"seconds": "1"}]
)
def test_foreign_records_of_a_gallery_are_named(tmp_path, change):
    records = Records(tmp_path, {}, GuidedPrompt | FailedPrompt)
    for key, record in (("a", GUIDED), ("b", {"prompt": "a", "failed": "not finite"}), ("c", GUIDED | change)):
        records.write(key, record)
    assert records.read("a")["rewards"] == [0.0] and records.read("b")["failed"]
    with pytest.raises(CheckpointError, match=r"c\.json' is no record of this run: "):
        records.read("c")


def test_settings_of_another_program_are_named(tmp_path):
    Records(tmp_path, {"a": 1}).write("a", {})
    (tmp_path / "settings.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"settings\.json' holds a list"):
        Records(tmp_path, {"a": 1})


INDEX = {"counts": [1], "skipped_images": [], "space": {}, "shape": [1, 2, 2]}
SHARDS = {
    "no captions": {},
    "no JSON": {"captions": "["},
    "no list": {"captions": "3"},
    "deep": {"captions": "[" * 99999},
}


@pytest.mark.parametrize("change", [{"counts": "ab"}, {"counts": [None]}, {"space": 3}, {"skipped_images": 1}])
def test_a_damaged_index_of_latents_is_named(tmp_path, change):
    write_json(tmp_path / "index.json", INDEX | change)
    with pytest.raises(
        CheckpointError, match=r"index\.json' does not hold an index of cached latents .*make the cache"
    ):
        CachedLatents(str(tmp_path))


@pytest.mark.parametrize("name", SHARDS)
def test_damaged_latents_are_named(tmp_path, name):
    write_json(tmp_path / "index.json", INDEX)
    save_tensors(tmp_path / "latents-00000.safetensors", {"moments": torch.zeros(1, 2, 1, 2, 2)}, SHARDS[name])
    with pytest.raises(CheckpointError, match=r"latents-00000\.safetensors' does not hold cached latents"):
        CachedLatents(str(tmp_path))[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("fingerprint.json", '{"schedule": 3}', r"fingerprint\.json' does not hold a fingerprint"),
        ("fingerprint.json", "[]", r"fingerprint\.json' holds a list"),
        ("data.json", "3", r"data\.json' holds a int"),
        ("config.json", "[" * 99999, r"config\.json' is not valid JSON"),
    ],
)
def test_damaged_notes_of_a_training_folder_are_named(tmp_path, name, content, words):
    folder = TrainingFolder(tmp_path, {"seed": 0}, ())
    folder.write_notes({"images": 3}, {"schedule": [0.0, 1.0]})
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=words):
        folder.write_notes({"images": 3}, {"schedule": [0.0, 1.0]})


def test_damaged_lines_of_a_curve_are_cut(tmp_path):
    folder = TrainingFolder(tmp_path, {}, ())
    (tmp_path / "loss.jsonl").write_bytes(b'{"step": 1}\n\xff\n[1]\n3\n' + b"[" * 99999 + b'\n{"step": 2}\n{"step"')
    folder.cut("loss", 2)
    assert (tmp_path / "loss.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("load", [Paths.load, GaussianFisher.load], ids=["paths", "Gaussian"])
@pytest.mark.parametrize(
    "metadata", [{}, {"captions": "[", "covariance": "3"}, {"captions": "[]", "covariance": "{}"}]
)
def test_tensors_of_another_program_are_named(tmp_path, load, metadata):
    tensors = {"mean": torch.zeros(2), "variances": torch.ones(2)}
    save_tensors(tmp_path / "a.safetensors", tensors, {"format": "diffusers_fisher.GaussianFisher", **metadata})
    with pytest.raises(CheckpointError, match=r"a\.safetensors'.* hold"):
        load(tmp_path / "a.safetensors")


def test_every_damage_of_a_header_is_a_checkpoint_error(tmp_path):
    """300 headers with bytes changed, of a safetensors and of a NumPy file."""
    save_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2, 2), "b": torch.zeros(3)}, {"step": "1"})
    numpy.save(tmp_path / "a.npy", numpy.ones((5, 3), "float32"))
    draw = numpy.random.default_rng(0)
    for name, load in (("a.safetensors", load_tensors), ("a.npy", banks.as_bank)):
        original = (tmp_path / name).read_bytes()
        for _ in range(300):
            content = bytearray(original)
            for position in draw.integers(0, 100, 2):
                content[position] = draw.integers(32, 127)
            (tmp_path / name).write_bytes(content)
            try:
                load(tmp_path / name)
            except (CheckpointError, InputError) as error:
                assert name in str(error)


@pytest.mark.parametrize("content", [b"PK\x03\x04", b"\x80\x04]\x94.", b""], ids=["zip", "pickle", "empty"])
def test_banks_of_other_formats_are_refused_and_not_unpickled(tmp_path, content):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.npy' can't be mapped"):
        banks.as_bank(tmp_path / "a.npy")


CONFIGS = {
    "no UTF-8": b"a: caf\xe9",
    "deep": b"[" * 1500,
    "no number": b"a: !!int x",
    "no date": b"a: 2020-13-45",
    "no time": b"a: !!timestamp x",
    "no truth": b"a: !!bool x",
    "empty number": b"a: !!int ''",
    "object": b"a: !!python/object/apply:os.system [ls]",
    "key of numbers": b"? [1, 2]\n: 3",
    "a date as key": b"2020-01-01: 3",
    "its own section": b"&a {a: *a}",
    "a list": b"[1]",
    "control": b"a: \x00",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_configurations_are_named(tmp_path, name):
    (tmp_path / "a.yaml").write_bytes(CONFIGS[name])
    with pytest.raises(InputError, match=r"a\.yaml"):
        load_config(tmp_path / "a.yaml", TraceMatchingConfig)


def test_a_change_that_is_no_value_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(InputError, match="change 'a=!!int x' has a value that is not YAML: ValueError"):
        load_config(tmp_path / "a.yaml", TraceMatchingConfig, ["a=!!int x"])


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("unet/config.json", [], r"unet/config\.json' holds a list"),
        ("model_index.json", {"_class_name": 3}, "can't be loaded as a pipeline"),
        (
            "vae/config.json",
            {"_class_name": "AutoencoderKL", "block_out_channels": 3},
            "because of its component 'vae'",
        ),
        ("tokenizer/tokenizer.json", {"version": "1.0"}, "because of its component 'tokenizer'"),
    ],
)
def test_damaged_parts_of_a_pipeline_are_named(tmp_path, file, content, words):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for part in Path(embedded_checkpoint()).iterdir():
        if part.is_file() or part.name != file.split("/")[0]:
            (folder / part.name).symlink_to(part)
            continue
        (folder / part.name).mkdir()
        for each in part.iterdir():
            (folder / part.name / each.name).symlink_to(each)
    (folder / file).unlink()
    write_json(folder / file, content)
    with pytest.raises((CheckpointError, InputError), match=words):
        load_pipeline(DenoiserSettings(str(folder)))


REWARD = """
from my_helper_of_faults import weight

def redness(images, prompts):
    return weight * images[:, 0].mean((1, 2))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Returns the file of a new module of the current folder, which `sys.path` does not have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry and Path(entry) != tmp_path])
    (tmp_path / "my_helper_of_faults.py").write_text("weight = 2.0\n")
    yield tmp_path / "my_rewards_of_faults.py"
    for name in ("my_rewards_of_faults", "my_helper_of_faults"):
        sys.modules.pop(name, None)


def test_a_reward_of_the_current_folder_is_found_and_the_path_stays(module):
    module.write_text(REWARD)
    before = list(sys.path)
    reward = named_reward("python:my_rewards_of_faults:redness")
    assert reward(torch.ones(2, 3, 4, 4), ["a", "b"]).tolist() == [2.0, 2.0]
    assert sys.path == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys\nx = 1 / 0", r"division by zero \(ZeroDivisionError in .*my_rewards_of_faults\.py:2\)"),
        ("def redness(:", r"invalid syntax .*SyntaxError"),
        ("import nothing_of_this_name", "No module named 'nothing_of_this_name'"),
        ("raise OSError('no network')", r"no network \(OSError in .*my_rewards_of_faults\.py:1\)"),
        ("", "has no attribute 'redness'"),
    ],
)
def test_an_error_in_a_module_of_rewards_names_its_line(module, source, words):
    module.write_text(source)
    before = list(sys.path)
    with pytest.raises(InputError, match=rf"reward python:my_rewards_of_faults:redness can't be imported: .*{words}"):
        named_reward("python:my_rewards_of_faults:redness")
    assert sys.path == before


def test_an_optimiser_that_can_not_be_made_names_both_its_arguments():
    with pytest.raises(InputError, match=r"`optimizer` 'Adam' with `step_size` -1\.0 can't be made: Invalid learning"):
        optimizer_factory("Adam", -1.0)


LIMITED = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = sys.argv[1:]
runpy.run_module("diffusers_fisher.cli", run_name="__main__")
"""
TRAINING = """
seed: 0
target: residual
denoiser: {path: embedded}
data: {path: images, caption_column: text}
output: output
latents: output
optimisation:
  {steps: 2, batch_size: 2, learning_rate: 0.001, weight_decay: 0, warmup_steps: 0, ema_decay: 0.9, save_every: 50}
"""
COMMANDS = {
    "likelihood": ["--data", "images", "--num-inference-steps", "2", "--output", "output"],
    "guide": ["--prompts", "prompts.txt", "--steps", "2", "--guidance-steps", "1", "--output", "output"],
    "transport": ["--runs", "2", "--points", "0,0; 1,1", "--output", "output"],
    "demo": ["--output", "output"],
    "cache-latents": ["--config", "config.yaml"],
}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1000, 6000], ids=["before the work", "after the work"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_that_the_disk_is_full(tmp_path, command, size):
    image_folder(tmp_path / "images")
    (tmp_path / "prompts.txt").write_text("a photo of a coat\n")
    (tmp_path / "config.yaml").write_text(TRAINING)
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), command, *COMMANDS[command]],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr
    assert re.search(r"Error: .*can't be (written|opened): .*File too large", run.stderr), run.stderr
