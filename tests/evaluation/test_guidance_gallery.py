"""Guidance of many prompts: its files, runs that continue after a kill, shares of processes, and errors."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import tiny
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusers_fisher import (
    ClassifierReward,
    DirectFisher,
    InputError,
    LDMFisherPipeline,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    embedded_checkpoint,
)
from diffusers_fisher.cli import app
from diffusers_fisher.evaluation import guidance_gallery_report, prompt_guide
from diffusers_fisher.evaluation.guidance_gallery import GallerySettings, Memory, run_gallery
from diffusers_fisher.jobs.pipelines import DenoiserSettings, load_pipeline, place_pipeline

PROMPTS = ["a photo of a sneaker", "a photo of a bag", "a photo of a coat"]
SETTINGS = GallerySettings(
    held_out="classifier:embedded:sneaker",
    num_guidance_steps=2,
    num_inference_steps=2,
    guidance_scale=2.0,
    seed=5,
    estimator="direct",  # the differences of the default estimator would amplify the rounding of other batches
)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A finished run, with a batch that is not full."""
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "prompts.txt").write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:]]) + "\n")
    return folder, run_gallery(folder / "out", folder / "prompts.txt", SETTINGS, Memory(2))


def size(path):
    with Image.open(path) as picture:
        return picture.size


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in sorted((folder / "records").iterdir())}


def test_every_prompt_has_its_record_and_pictures(finished_run):
    folder, summary = finished_run
    run_records = records(folder / "out")
    assert [record["prompt"] for record in run_records.values()] == PROMPTS
    assert [record["seed"] for record in run_records.values()] == [5, 6, 7]
    for record in run_records.values():
        assert (
            len(record["rewards"])
            == len(record["held_out"])
            == len(record["shell_distances"])
            == len(record["whiteness"])
            == 3
        )
        assert record["rewards"][record["best_run"]] == max(record["rewards"])
        for name in ("before", "after"):
            assert size(folder / "out" / record[name]) == (32, 32)
    assert summary["prompts"] == 3
    before, after = summary["means"]["reward"]
    assert before == pytest.approx(sum(record["rewards"][0] for record in run_records.values()) / 3)
    assert after == pytest.approx(sum(max(record["rewards"]) for record in run_records.values()) / 3)
    assert after > before


def test_gallery_shows_every_prompt(finished_run):
    page = (finished_run[0] / "out" / "index.html").read_text()
    assert all(prompt in page for prompt in PROMPTS)
    assert page.count("<img") == 2 + 2 * 3
    assert "held out" in page
    assert page.count("</figcaption>") >= 2 * 3 and ", whiteness 0." in page and "whiteness of the noise" in page
    assert size(finished_run[0] / "out" / "gallery.png")[0] > 500


def test_result_does_not_depend_on_the_batches(finished_run):
    """The first image is that of the stock pipeline with the seed of this prompt."""
    folder, _ = finished_run
    pipe = load_pipeline(DenoiserSettings("embedded"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        PROMPTS[1], generator=torch.Generator().manual_seed(6), num_inference_steps=2, guidance_scale=2.0,
        output_type="pt",
    ).images[0]  # fmt: skip
    with Image.open(folder / "out" / "pictures" / "00001_before.png") as picture:
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(32, 32, 3).permute(2, 0, 1)
    assert int(((255 * image).round() - pixels).abs().max()) <= 1  # float32 may round the other way


def test_finished_run_recomputes_nothing(finished_run, monkeypatch):
    folder, summary = finished_run
    monkeypatch.setattr(prompt_guide, "load_pipeline", lambda *_: pytest.fail("the pipeline was loaded again"))
    memory = Memory(3, checkpoint_decoder=True)  # the run may continue with it, because it changes no result
    assert run_gallery(folder / "out", folder / "prompts.txt", SETTINGS, memory) == summary


def test_a_prompt_whose_numbers_are_not_finite_changes_no_other_record(finished_run, tmp_path, monkeypatch, caplog):
    make = prompt_guide.named_reward

    def nan_reward(name):
        """Returns a reward that is NaN for bags."""
        reward = make(name)
        return lambda images, prompts: torch.where(
            torch.tensor([prompt == PROMPTS[1] for prompt in prompts]), torch.nan, reward(images, prompts)
        )

    monkeypatch.setattr(prompt_guide, "named_reward", nan_reward)
    summary = run_gallery(tmp_path / "out", finished_run[0] / "prompts.txt", SETTINGS, Memory(3))
    results, expected = records(tmp_path / "out"), records(finished_run[0] / "out")
    for key in ("00000", "00002"):  # float32, in other batches
        assert results[key]["rewards"] == pytest.approx(expected[key]["rewards"], rel=1e-4)
    assert results["00001"]["prompt"] == PROMPTS[1] and "is not finite" in results["00001"]["failed"]
    assert (summary["prompts"], summary["failed"]) == (3, 1)
    assert "1 of 3 prompts failed: the gallery says why, and --retry-failed" in caplog.text
    assert "Without a result: a photo of a bag. The reward" in (tmp_path / "out" / "index.html").read_text()
    monkeypatch.setattr(prompt_guide, "named_reward", make)
    for retry_failed in (False, True):
        summary = run_gallery(tmp_path / "out", finished_run[0] / "prompts.txt", SETTINGS, Memory(3), retry_failed)
        assert summary["failed"] == (0 if retry_failed else 1)
    assert records(tmp_path / "out")["00001"]["rewards"] == pytest.approx(expected["00001"]["rewards"], rel=1e-4)


def run_prompt(folder, memory=None, **changes):
    """Returns the record of a short run for one prompt."""
    (folder / "prompts.txt").write_text("a photo of a bag")
    changes = {"held_out": None, "num_guidance_steps": 1, **changes}
    run_gallery(
        folder / "out",
        folder / "prompts.txt",
        dataclasses.replace(SETTINGS, **changes),
        memory or Memory(),
    )
    return records(folder / "out")["00000"]


def guide_by_hand(**options):
    """Returns a pipeline, and the output of its `guide` for the same prompt."""
    pipe = load_pipeline(DenoiserSettings("embedded"))
    reward = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target="ankle boot")
    out = pipe.guide(
        "a photo of a bag", reward, num_guidance_steps=1, num_inference_steps=2, guidance_scale=2.0, output_type="pt",
        generator=torch.Generator().manual_seed(5), **{"estimator": DirectFisher()} | options,
    )  # fmt: skip
    return pipe, out


def test_negative_prompt_and_optimiser_are_passed_to_guide(tmp_path):
    changes = {"negative_prompt": "a photo of a coat", "optimizer": "Adam", "step_size": 0.05}
    _, out = guide_by_hand(**changes)
    record = run_prompt(tmp_path, memory=Memory(checkpoint_decoder=True), **changes)
    # float32; the decoder's activations are computed twice
    assert record["rewards"] == pytest.approx(out.rewards[:, 0].tolist(), rel=1e-5)
    assert record["rewards"] != pytest.approx(
        guide_by_hand(optimizer="Adam", step_size=0.05)[1].rewards[:, 0], rel=1e-3
    )
    for name, value in {"negative_prompt": None, "optimizer": "SGD"}.items():
        with pytest.raises(InputError, match=f"holds records of other settings: `{name}` was"):
            run_prompt(tmp_path, **changes | {name: value})


def test_the_default_estimator_is_that_of_guide(tmp_path):
    record = run_prompt(tmp_path, estimator=GallerySettings().estimator)
    assert record["rewards"] == pytest.approx(guide_by_hand(estimator=None)[1].rewards[:, 0].tolist(), rel=1e-5)
    assert record["rewards"] != pytest.approx(guide_by_hand()[1].rewards[:, 0].tolist(), rel=1e-3)


def test_patience_ends_a_prompt_and_needs_batches_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(prompt_guide, "named_reward", lambda name: lambda images, prompts: 0 * images.sum((1, 2, 3)))
    record = run_prompt(tmp_path, num_guidance_steps=5, patience=2)
    assert record["status"] == "stopped after 2 runs without a new best"
    assert len(record["rewards"]) == 3
    with pytest.raises(InputError, match="`patience` counts runs of a whole batch, so with `batch_size` 2 results"):
        run_prompt(tmp_path, memory=Memory(2), patience=2)
    (tmp_path / "new").mkdir()
    with pytest.raises(InputError, match="`patience` is 0; allowed: at least 1 run"):
        run_prompt(tmp_path / "new", patience=0)
    assert not list((tmp_path / "new" / "out" / "records").iterdir())


def test_held_out_rewards_that_are_not_finite_are_null_and_no_prompt_fails(tmp_path, monkeypatch):
    make = prompt_guide.named_reward
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))

    def nan_reward(name):
        """Returns a held-out reward that is NaN for bags."""
        reward = make(name)
        if name != SETTINGS.held_out:
            return reward
        return lambda images, prompts: torch.where(
            torch.tensor([prompt == PROMPTS[1] for prompt in prompts]), torch.nan, reward(images, prompts)
        )

    monkeypatch.setattr(prompt_guide, "named_reward", nan_reward)
    summary = run_gallery(tmp_path / "out", tmp_path / "prompts.txt", SETTINGS, Memory(2))
    sneaker, bag = records(tmp_path / "out").values()
    assert bag["held_out"] == [None] * 3 and bag["status"] == "completed"
    assert None not in sneaker["held_out"]
    assert (summary["failed"], summary["means"]["held-out reward"][0]) == (0, sneaker["held_out"][0])
    assert "held out not finite" in (tmp_path / "out" / "index.html").read_text()


def test_likelihoods_are_those_of_the_pipeline_and_are_on_the_page(tmp_path):
    record = run_prompt(tmp_path, likelihood=True)
    pipe, out = guide_by_hand()
    expected = pipe.log_likelihood(torch.cat([out.initial_images, out.images]), "a photo of a bag")
    assert list(record["bits_per_dim"]) == list(record["bits_per_dim_error"]) == ["before", "after"]
    # float32 twice through the same operations
    assert list(record["bits_per_dim"].values()) == pytest.approx(expected.bits_per_dim.tolist(), abs=1e-4)
    assert list(record["bits_per_dim_error"].values()) == pytest.approx(expected.total_error_bits.tolist(), abs=1e-4)
    page = (tmp_path / "out" / "index.html").read_text()
    assert "<td>bits/dim</td>" in page
    for moment, bits in record["bits_per_dim"].items():
        assert f"{bits:.4g} ± {record['bits_per_dim_error'][moment]:.4g} bits/dim" in page
    titles = [axes.get_title() for axes in guidance_gallery_report.gallery(tmp_path / "out", [record]).axes]
    assert (
        titles[1]
        == f"after\n{record['bits_per_dim']['after']:.4g} ± {record['bits_per_dim_error']['after']:.4g} bits/dim"
    )
    with pytest.raises(InputError, match="`likelihood` was true, is false"):
        run_prompt(tmp_path)


def test_a_pipeline_without_likelihood_raises_an_error_before_any_guidance(tmp_path, monkeypatch):
    load = prompt_guide.load_pipeline

    def load_changed(settings):
        """Returns a pipeline with the trace model of another denoiser, which guidance does not need."""
        pipe = load(settings)
        for parameter in pipe.unet.parameters():
            parameter.data += 0.1
        pipe.guide = lambda *args, **kwargs: pytest.fail("guidance began")
        return pipe

    monkeypatch.setattr(prompt_guide, "load_pipeline", load_changed)
    with pytest.raises(InputError, match="another denoiser"):
        run_prompt(tmp_path, likelihood=True)


def test_the_page_names_images_that_the_safety_checker_blackens(tmp_path, monkeypatch):
    load = prompt_guide.load_pipeline

    def load_strict(settings):
        pipe = load(settings)
        pipe.register_modules(safety_checker=tiny.safety_checker(-1.0), feature_extractor=tiny.feature_extractor())
        return pipe

    monkeypatch.setattr(prompt_guide, "load_pipeline", load_strict)
    assert run_prompt(tmp_path)["flagged"] == ["before", "after"]
    words = "Black, because the safety checker flagged it: the image before and after."
    assert words in (tmp_path / "out" / "index.html").read_text()


def test_offload_needs_an_accelerator_and_an_order_of_the_networks(tmp_path):
    with pytest.raises(InputError, match=r"`offload` needs an accelerator .* none was found; leave it out"):
        run_prompt(tmp_path, memory=Memory(offload=True))
    cpu = torch.device("cpu")
    with pytest.raises(UnsupportedError, match=r"LDMFisherPipeline can't be offloaded: .*Leave `offload` out"):
        place_pipeline(tiny.latent_unconditional(LDMFisherPipeline), cpu, offload=True)
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    place_pipeline(pipe, cpu, offload=True)
    assert pipe._all_hooks


def test_curves_by_seconds_are_means_of_the_best_so_far():
    first = {"rewards": [0.0, 2.0, 1.0], "held_out": [5.0, 4.0, 9.0], "seconds": [1.0, 1.0, 2.0]}
    second = {"rewards": [1.0, 3.0], "held_out": [None, 6.0], "seconds": [3.0, 3.0]}  # stopped early
    figure = guidance_gallery_report.by_seconds([first, second])
    (reward,), (held_out,) = (axes.lines for axes in figure.axes)
    assert reward.get_xydata().tolist() == [[2.0, 0.5], [4.0, 2.5], [5.0, 2.5]]
    assert held_out.get_xydata().tolist() == [[2.0, 5.0], [4.0, 5.0], [5.0, 5.0]]
    assert [axes.get_ylabel() for axes in figure.axes] == ["best reward", "held-out reward at the best"]


def test_other_prompts_or_settings_raise_an_error(finished_run):
    folder, _ = finished_run
    other = folder / "other.txt"
    other.write_text("a photo of a dress\n")
    with pytest.raises(InputError, match=r"holds records of other settings: `prompts` was \"3, sha256 .*, is \"1, "):
        run_gallery(folder / "out", other, SETTINGS)
    with pytest.raises(InputError, match=r"`step_size` was 0\.2, is 0\.5"):
        run_gallery(folder / "out", folder / "prompts.txt", dataclasses.replace(SETTINGS, step_size=0.5))


def arguments(folder, *more):
    return [
        "guide", "--prompts", str(folder / "prompts.txt"), "--output", str(folder / "out"), "--guidance-steps", "2",
        "--steps", "2", "--guidance-scale", "2", "--seed", "5", "--held-out", "classifier:embedded:sneaker",
        "--estimator", SETTINGS.estimator, *more,
    ]  # fmt: skip


def command(folder, environment=None):
    run = [sys.executable, "-c", "from diffusers_fisher.cli import app; app()", *arguments(folder)]
    return subprocess.Popen(run, env={**os.environ, **(environment or {})}, stdout=subprocess.PIPE, text=True)


def test_a_kill_loses_no_finished_prompt(finished_run, tmp_path):
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
    after, reference = records(tmp_path / "out"), records(finished_run[0] / "out")
    assert {key: after[key] for key in before} == before  # the seconds too, so nothing was computed again
    for key, record in after.items():
        # other batches, in float32
        torch.testing.assert_close(
            torch.tensor(record["rewards"]), torch.tensor(reference[key]["rewards"]), rtol=1e-3, atol=1e-3
        )


def test_processes_share_the_prompts(finished_run, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port = probe_socket.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
    }
    workers = [command(tmp_path, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    outputs = [worker.communicate(timeout=300)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert "0 of this process's 2 done" in outputs[0]
    assert outputs[1] == ""  # only the main process prints
    assert [record["prompt"] for record in records(tmp_path / "out").values()] == PROMPTS
    assert (tmp_path / "out" / "index.html").is_file()


BAD = {
    "no file": (None, {}, InputError, r"prompts\.txt' can't be read"),
    "empty": ("\n \n", {}, InputError, r"prompts\.txt' are empty; give one prompt per line"),
    "estimator": (
        "a",
        {"estimator": "exact"},
        InputError,
        "`estimator` is 'exact'; allowed: 'one-step', 'direct', 'finite-diff",
    ),
    "optimizer": ("a", {"optimizer": "Adman"}, InputError, "`optimizer` is 'Adman'; allowed"),
    "dtype": ("a", {"dtype": "int8"}, InputError, "`dtype` is 'int8'; allowed: 'float32', "),
    "reward": ("a", {"reward": "beauty"}, InputError, "The reward is 'beauty'; allowed"),
    "checkpoint": ("a", {"checkpoint": "EMPTY"}, InputError, "can't be loaded as a pipeline"),
}


@pytest.mark.parametrize("kind", BAD)
def test_mistakes_raise_an_error_and_leave_no_record(tmp_path, kind):
    text, changes, error, message = BAD[kind]
    if text is not None:
        (tmp_path / "prompts.txt").write_text(text)
    changes = {name: str(tmp_path) if value == "EMPTY" else value for name, value in changes.items()}
    with pytest.raises(error, match=message):
        settings = dataclasses.replace(SETTINGS, **changes)
        run_gallery(tmp_path / "out", tmp_path / "prompts.txt", settings)
    assert not list((tmp_path / "out").glob("records/*"))


def test_batch_size_zero_and_an_unwritable_folder_raise_an_error(tmp_path):
    (tmp_path / "prompts.txt").write_text("a")
    with pytest.raises(InputError, match="`batch_size` is 0; allowed: greater than or equal to 1"):
        run_gallery(tmp_path / "out", tmp_path / "prompts.txt", SETTINGS, Memory(0))
    result = CliRunner().invoke(app, arguments(tmp_path, "--output", str(tmp_path / "prompts.txt" / "inside")))
    assert result.exit_code == 1
    assert "can't be written" in result.output


def test_cheap_runs_candidates_and_white_noise(tmp_path):
    (tmp_path / "prompts.txt").write_text(PROMPTS[0])
    settings = dataclasses.replace(
        SETTINGS, num_inference_steps=3, num_guidance_inference_steps=2, num_full_iterations=1,
        num_unguided_iterations=1, num_candidates=2, noise_projection="soft",
    )  # fmt: skip
    run_gallery(tmp_path / "out", tmp_path / "prompts.txt", settings)
    (record,) = records(tmp_path / "out").values()
    # Two candidates, two runs without guidance, one with it, and two full runs.
    assert len(record["rewards"]) == len(record["whiteness"]) == 7 and record["best_run"] >= 5
    assert record["whiteness"][-1] > 0.01
    assert (
        "by runs of 2 sampling steps; the images after are those of full runs"
        in (tmp_path / "out" / "index.html").read_text()
    )
    with pytest.raises(InputError, match="`noise_projection` is 'white'"):
        dataclasses.replace(SETTINGS, noise_projection="white")
