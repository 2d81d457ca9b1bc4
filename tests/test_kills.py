"""Sixty kills at random moments: the same command again ends with the results of a run that nobody killed."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
import trace_runs
from image_folders import image_folder, saved_pipeline
from safetensors.torch import load_file

KILLS = 20  # per command
START = (0.0, 12.0)  # seconds from the process's start to its kill: importing alone takes several


def likelihood(place, output):
    return [
        "-m", "diffusers_fisher.cli", "likelihood", "--model", str(place / "pipeline"), "--data",
        str(place / "images"), "--num-inference-steps", "2", "--batch-size", "1", "--output", str(output),
    ]  # fmt: skip


def likelihood_results(output):
    rows = [json.loads(line) for line in (output / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    times = {"process_seconds", "images_per_process_second", "last_run"}
    return rows, {key: value for key, value in summary.items() if key not in times}


def gallery(place, output):
    return [
        "-m", "diffusers_fisher.cli", "guide", "--prompts", str(place / "prompts.txt"), "--output", str(output),
        "--guidance-steps", "1", "--steps", "2",
    ]  # fmt: skip


def gallery_results(output):
    records = sorted((output / "records").glob("*.json"))
    contents = [json.loads(file.read_text(encoding="utf-8")) for file in records]
    pictures = [file.read_bytes() for file in sorted((output / "pictures").glob("*.png"))]
    return [{key: value for key, value in record.items() if key != "seconds"} for record in contents], pictures


def training(place, output):
    return [
        "-m", "diffusers_fisher.training.trace_matching", "--config", str(place / "config.yaml"), "--set",
        f"output={output}",
    ]  # fmt: skip


def training_results(output):
    weights = load_file(output / "trace_model" / "diffusion_pytorch_model.safetensors")
    return {name: tensor.tolist() for name, tensor in weights.items()}, (output / "loss.jsonl").read_text()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", count=40)
    (folder / "prompts.txt").write_text("a photo of a coat\n" * 8)
    (folder / "training").mkdir()
    trace_runs.write_config(
        folder, trace_runs.settings(folder / "training", optimisation={"steps": 60, "save_every": 2})
    )
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize(
    ("command", "results"),
    [(likelihood, likelihood_results), (gallery, gallery_results), (training, training_results)],
    ids=["likelihood", "gallery", "training"],
)
def test_kills_at_any_moment_lose_nothing(place, tmp_path, command, results):
    subprocess.run([sys.executable, *command(place, tmp_path / "unbroken")], check=True, capture_output=True)
    draw, kills, begin = random.Random(0), 0, time.monotonic()
    for attempt in range(10 * KILLS):
        output = tmp_path / f"killed-{attempt}"
        while True:
            process = subprocess.Popen(
                [sys.executable, *command(place, output)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
            try:
                _, errors = process.communicate(timeout=draw.uniform(*START) if kills < KILLS else None)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0, errors.decode()
            break
        assert results(output) == results(tmp_path / "unbroken")
        leftovers = [file.name for file in output.rglob(".*")]  # temporary files and the lock of killed processes
        assert not leftovers
        if kills >= KILLS:
            break
    assert kills == KILLS
    print(f"{kills} kills in {time.monotonic() - begin:.0f} s")
