"""Guidance of many prompts: what is written, that a kill loses nothing, that processes share, what is refused."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusers_fisher import InputError
from diffusers_fisher.cli import app
from diffusers_fisher.evaluation import guidance_gallery
from diffusers_fisher.evaluation.guidance_gallery import GallerySettings, run_gallery
from diffusers_fisher.training.trace_config import DenoiserSettings, load_pipeline

PROMPTS = ["a photo of a sneaker", "a photo of a bag", "a photo of a coat"]
SETTINGS = GallerySettings(
    held_out="classifier:embedded:sneaker", num_guidance_steps=2, num_inference_steps=2, guidance_scale=2.0, seed=5
)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished run, with a batch that is not full."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "prompts.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    return folder, run_gallery(folder / "out", folder / "prompts.txt", SETTINGS, batch_size=2)


def size(path):
    with Image.open(path) as picture:
        return picture.size


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "records").iterdir())}


def test_every_prompt_has_its_record_and_pictures(done):
    folder, summary = done
    found = records(folder / "out")
    assert [record["prompt"] for record in found.values()] == PROMPTS
    assert [record["seed"] for record in found.values()] == [5, 6, 7]
    for record in found.values():
        assert len(record["rewards"]) == len(record["held_out"]) == len(record["shell_distances"]) == 3
        assert record["rewards"][record["best_run"]] == max(record["rewards"])
        for name in ("before", "after"):
            assert size(folder / "out" / record[name]) == (32, 32)
    assert summary["prompts"] == 3
    before, after = summary["means"]["reward"]
    assert before == pytest.approx(sum(record["rewards"][0] for record in found.values()) / 3)
    assert after == pytest.approx(sum(max(record["rewards"]) for record in found.values()) / 3)
    assert after > before


def test_gallery_shows_every_prompt(done):
    page = (done[0] / "out" / "index.html").read_text()
    assert all(prompt in page for prompt in PROMPTS)
    assert page.count("<img") == 1 + 2 * 3
    assert "held out" in page
    assert size(done[0] / "out" / "gallery.png")[0] > 500


def test_result_does_not_depend_on_the_batches(done):
    """The first image is the stock pipeline's of that seed alone."""
    folder, _ = done
    pipe = load_pipeline(DenoiserSettings("embedded"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        PROMPTS[1], generator=torch.Generator().manual_seed(6), num_inference_steps=2, guidance_scale=2.0,
        output_type="pt",
    ).images[0]  # fmt: skip
    with Image.open(folder / "out" / "pictures" / "00001_before.png") as picture:
        written = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    assert int(((255 * image).round() - written).abs().max()) <= 1  # float32 may round the other way


def test_finished_run_recomputes_nothing(done, monkeypatch):
    folder, summary = done
    monkeypatch.setattr(guidance_gallery, "load_pipeline", lambda *_: pytest.fail("work was done twice"))
    assert run_gallery(folder / "out", folder / "prompts.txt", SETTINGS) == summary


def test_a_prompt_whose_numbers_are_not_finite_spoils_no_other(done, tmp_path, monkeypatch):
    make = guidance_gallery.named_reward

    def blind(name):
        """A reward that has no opinion on bags."""
        reward = make(name)
        return lambda images, prompts: torch.where(
            torch.tensor([prompt == PROMPTS[1] for prompt in prompts]), torch.nan, reward(images, prompts)
        )

    monkeypatch.setattr(guidance_gallery, "named_reward", blind)
    summary = run_gallery(tmp_path / "out", done[0] / "prompts.txt", SETTINGS, batch_size=3)
    found, expected = records(tmp_path / "out"), records(done[0] / "out")
    for key in ("00000", "00002"):  # float32, in other batches
        assert found[key]["rewards"] == pytest.approx(expected[key]["rewards"], rel=1e-4)
    assert found["00001"]["prompt"] == PROMPTS[1] and "is not finite" in found["00001"]["failed"]
    assert (summary["prompts"], summary["failed"]) == (3, 1)
    assert "Without a result: a photo of a bag. The reward" in (tmp_path / "out" / "index.html").read_text()


def test_other_prompts_or_settings_are_refused(done):
    folder, _ = done
    other = folder / "other.txt"
    other.write_text("a photo of a dress\n")
    with pytest.raises(InputError, match=r"holds records of other settings: `prompts` was \"3, sha256 .*, is \"1, "):
        run_gallery(folder / "out", other, SETTINGS)
    with pytest.raises(InputError, match=r"`step_size` was 0\.2, is 0\.5"):
        run_gallery(
            folder / "out", folder / "prompts.txt", guidance_gallery.dataclasses.replace(SETTINGS, step_size=0.5)
        )


def arguments(folder, *more):
    return [
        "guide", "--prompts", str(folder / "prompts.txt"), "--output", str(folder / "out"), "--guidance-steps", "2",
        "--steps", "2", "--guidance-scale", "2", "--seed", "5", "--held-out", "classifier:embedded:sneaker", *more,
    ]  # fmt: skip


def command(folder, environment=None):
    run = [sys.executable, "-c", "from diffusers_fisher.cli import app; app()", *arguments(folder)]
    return subprocess.Popen(run, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True)


def test_kill_loses_nothing_that_was_done(done, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    writer = command(tmp_path)
    try:
        while not (tmp_path / "out" / "records" / "00000.json").exists():
            assert writer.poll() is None, writer.stdout.read()
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
    before = records(tmp_path / "out")
    result = CliRunner().invoke(app, arguments(tmp_path))
    assert result.exit_code == 0, result.output
    assert f"{len(before)} of this process's 3 done" in result.output
    after, reference = records(tmp_path / "out"), records(done[0] / "out")
    assert {key: after[key] for key in before} == before  # seconds too: nothing was computed anew
    for key, record in after.items():
        # other batches, in float32
        torch.testing.assert_close(
            torch.tensor(record["rewards"]), torch.tensor(reference[key]["rewards"]), rtol=1e-3, atol=1e-3
        )


@pytest.mark.slow
def test_processes_share_the_prompts(done, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    workers = [command(tmp_path, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert "0 of this process's 2 done" in outputs[0]
    assert outputs[1] == ""  # the main process alone speaks
    assert [record["prompt"] for record in records(tmp_path / "out").values()] == PROMPTS
    assert (tmp_path / "out" / "index.html").is_file()


BAD = {
    "no file": (None, {}, InputError, r"prompts\.txt' can't be read"),
    "empty": ("\n \n", {}, InputError, r"prompts\.txt' are empty; give one prompt a line"),
    "estimator": ("a", {"estimator": "exact"}, InputError, "The estimator is 'exact'; allowed: direct, finite-diff"),
    "dtype": ("a", {"dtype": "int8"}, InputError, "`dtype` is 'int8'; allowed: float32"),
    "reward": ("a", {"reward": "beauty"}, InputError, "The reward is 'beauty'; allowed"),
    "checkpoint": ("a", {"checkpoint": "EMPTY"}, InputError, "can't be loaded as a pipeline"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_are_refused_and_bind_nobody(tmp_path, kind):
    text, changes, error, message = BAD[kind]
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
    changes = {name: str(tmp_path) if value == "EMPTY" else value for name, value in changes.items()}
    settings = guidance_gallery.dataclasses.replace(SETTINGS, **changes)
    with pytest.raises(error, match=message):
        run_gallery(tmp_path / "out", tmp_path / "prompts.txt", settings)
    assert not list((tmp_path / "out").glob("records/*"))


def test_batch_size_and_unwritable_folder(tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(InputError, match="`batch_size` is 0; allowed: at least 1"):
        run_gallery(tmp_path / "out", tmp_path / "prompts.txt", SETTINGS, batch_size=0)
    result = CliRunner().invoke(app, arguments(tmp_path, "--output", str(tmp_path / "prompts.txt" / "inside")))
    assert result.exit_code == 1
    assert "can't be written" in result.output
