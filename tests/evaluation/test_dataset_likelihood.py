"""Likelihoods of a dataset: there is one record per image, and it does not depend on how processes share the work."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
import time

import datasets
import numpy
import psutil
import pyarrow.parquet
import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from image_folders import CAPTIONS, image_folder, saved_pipeline
from PIL import Image
from trace_cases import GaussianData
from typer.testing import CliRunner

from diffusers_fisher import AutodiffFisher, InputError, StableDiffusionFisherPipeline
from diffusers_fisher.cli import app
from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.evaluation import image_share
from diffusers_fisher.evaluation.dataset_likelihood import evaluate_dataset
from diffusers_fisher.evaluation.dataset_likelihood_report import ImageRecords
from diffusers_fisher.evaluation.dataset_settings import DatasetSettings
from diffusers_fisher.jobs.pipelines import DenoiserSettings
from diffusers_fisher.jobs.records import Records

AGREEMENT = 1e-5  # bits/dim: float32 sums of other orders, through a network
DIFFERENCES = 1e-3  # the same, divided by the step of finite differences; measured 1.4e-4
STEPS = 2
CORRUPT = (3, 7)
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29723")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny pipeline and 12 images, two of which are truncated."""
    folder = tmp_path_factory.mktemp("data")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", corrupt=CORRUPT)
    return folder


@pytest.fixture(scope="module")
def reference(place):
    """A run of one process with four images at once, with which the tests compare other runs."""
    return place / "done", evaluate_dataset(place / "done", settings_of(place), batch_size=4)


def settings_of(place, data=(), **changes):
    images = ImageData(**{"path": str(place / "images"), "caption_column": "text", **dict(data)})
    changes = {"num_inference_steps": STEPS, "estimator": "autodiff", **changes}
    return DatasetSettings(**{"denoiser": DenoiserSettings(str(place / "pipeline")), "data": images, **changes})


def lines(folder):
    return [json.loads(line) for line in (folder / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()]


def bits(folder):
    return torch.tensor([row["bits_per_dim"] for row in lines(folder) if "error" not in row], dtype=torch.float64)


def command(place, output, *options):
    return [
        "-m", "diffusers_fisher.cli", "likelihood", "--model", str(place / "pipeline"), "--data",
        str(place / "images"), "--caption-column", "text", "--num-inference-steps", str(STEPS), "--output",
        str(output), "--estimator", "autodiff", *options,
    ]  # fmt: skip


def test_a_record_is_what_log_likelihood_gives_for_the_image_alone(place, reference):
    folder, _ = reference
    pipe = tiny.quiet(StableDiffusionFisherPipeline.from_pretrained(place / "pipeline"))
    images = open_images(ImageData(str(place / "images"), caption_column="text"))
    for row in (lines(folder)[position] for position in (0, 5)):
        example, generator = images[row["position"]], torch.Generator().manual_seed(0)
        out = pipe.log_likelihood(
            example.pixels[None], example.caption, num_inference_steps=STEPS, estimator=AutodiffFisher(),
            generator=generator,
        )  # fmt: skip
        assert row["caption"] == example.caption and row["dims"] == out.dims == 256
        assert row["bits_per_dim"] == pytest.approx(float(out.bits_per_dim), abs=AGREEMENT)
        assert row["log_prob"] == pytest.approx(row["prior_log_prob"] + row["trace_log_prob"], abs=1e-9)
        for name in ("total_error", "prior_error", "discretisation_error", "standard_error"):
            assert row[name] == pytest.approx(float(getattr(out, name)), rel=1e-3)
        assert row["trace_error"] == 0 and "trace_check" not in row
        assert row["r"] == pytest.approx(
            out.unexplained_noise_fraction[:, 0].tolist(), abs=1e-4
        )  # six decimals, of float32 networks


def test_there_is_one_line_per_image_in_order_and_unreadable_images_are_named(reference):
    folder, summary = reference
    rows = lines(folder)
    assert [(row["position"], row["name"]) for row in rows] == [(n, f"train-{n}.png") for n in range(12)]
    assert [row["position"] for row in rows if "error" in row] == list(CORRUPT)
    assert "train-3.png" in rows[3]["error"] and "can't be read" in rows[3]["error"]
    assert (summary["images"], summary["evaluated"], summary["left_out"]) == (12, 10, 2)
    assert [entry["name"] for entry in summary["left_out_images"]] == ["train-3.png", "train-7.png"]


def test_the_summary_agrees_with_the_records(reference):
    folder, summary = reference
    assert json.loads((folder / "summary.json").read_text()) == summary
    values, numbers = bits(folder), summary["bits_per_dim"]
    assert numbers["mean"] == pytest.approx(float(values.mean())) and numbers["greatest"] == float(values.max())
    errors = [row["total_error"] / row["dims"] / math.log(2) for row in lines(folder) if "error" not in row]
    assert summary["errors_in_bits_per_dim"]["total_mean"] == pytest.approx(sum(errors) / len(errors))
    assert summary["images_with_a_wrong_trace_model"] == 0
    assert numbers["standard_deviation"] == pytest.approx(float(values.std()))
    assert numbers["quantiles"]["0.25"] == pytest.approx(float(values.quantile(0.25)))
    rows = [row for row in lines(folder) if row.get("caption") == "c"]
    caption_row = next(row for row in summary["by_caption"] if row["caption"] == "c")
    assert caption_row["images"] == len(rows) and caption_row["mean"] == pytest.approx(
        sum(r["bits_per_dim"] for r in rows) / len(rows)
    )
    assert {row["caption"] for row in summary["by_caption"]} == set(CAPTIONS)
    assert summary["method"]["trace"] == "AutodiffFisher, 1 probe per level" and summary["levels"] == STEPS + 1
    assert summary["images_on_a_coarse_grid"] > 0  # two steps are few


def test_the_page_shows_both_ends_and_the_images_left_out(reference):
    folder, _ = reference
    page = (folder / "index.html").read_text(encoding="utf-8")
    rows = sorted((row for row in lines(folder) if "error" not in row), key=lambda row: row["bits_per_dim"])
    captions = re.findall(r"<figcaption>([\d.]+) bits/dim: (\S+), ", page)
    order = [(f"{row['bits_per_dim']:.3f}", row["name"]) for row in rows]
    assert captions == order + order[::-1]
    assert page.count("data:image/png") == 1 + 2 * len(rows)
    assert page.count("<td>train-3.png</td>") == 1 and page.count("<td>train-7.png</td>") == 1
    with Image.open(folder / "histogram.png") as picture:
        assert len(numpy.unique(numpy.asarray(picture.convert("L").resize((64, 32))))) > 10


@pytest.mark.parametrize("batch_size", [1, 16])
def test_batch_sizes_do_not_change_the_numbers(place, reference, tmp_path, batch_size):
    evaluate_dataset(tmp_path / "run", settings_of(place), batch_size)
    assert (bits(tmp_path / "run") - bits(reference[0])).abs().max() < AGREEMENT


def test_batch_sizes_hardly_change_the_numbers_by_differences(place, tmp_path):
    settings = settings_of(place, estimator="auto")
    for name, size in (("alone", 1), ("batch", 4)):
        evaluate_dataset(tmp_path / name, settings, batch_size=size)
    assert (bits(tmp_path / "batch") - bits(tmp_path / "alone")).abs().max() < DIFFERENCES


def test_two_processes_give_the_numbers_of_one(place, reference, tmp_path):
    run = [sys.executable, *TWO_PROCESSES, *command(place, tmp_path / "run")]
    subprocess.run(run, check=True, capture_output=True, timeout=600)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["last_run"]["processes"] == 2 and summary["last_run"]["images"] == 12
    assert (bits(tmp_path / "run") - bits(reference[0])).abs().max() < AGREEMENT
    assert [row["name"] for row in lines(tmp_path / "run")] == [row["name"] for row in lines(reference[0])]


@pytest.mark.parametrize(
    "launcher", [pytest.param((), marks=pytest.mark.slow), TWO_PROCESSES], ids=["one process", "two processes"]
)
def test_a_killed_run_continues_without_losing_or_repeating_a_record(tmp_path, launcher):
    """SIGKILL ends the run after its first file. One process with another batch size computes the rest."""
    image_folder(tmp_path / "images", count=60)
    saved_pipeline(tmp_path / "pipeline")
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, *launcher, *command(tmp_path, run, "--batch-size", "1")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not list((run / "records").glob("0*.json")):
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):  # workers have their own groups
            each.kill()
        process.wait()
    assert not (run / "likelihoods.jsonl").exists()
    before = {path.name: path.read_bytes() for path in (run / "records").glob("0*.json")}
    records = {row["position"]: row for text in before.values() for row in json.loads(text)["records"]}
    assert 0 < len(records) < 60
    summary = evaluate_dataset(run, settings_of(tmp_path))
    assert summary["last_run"]["images"] == 60 - len(records)
    assert all((run / "records" / name).read_bytes() == text for name, text in before.items())
    rows = lines(run)
    assert [row["position"] for row in rows] == list(range(60))
    assert all({**rows[position], "file": row["file"]} == row for position, row in records.items())
    second_summary = evaluate_dataset(run, settings_of(tmp_path))
    assert second_summary["last_run"]["images"] == 0 and second_summary["bits_per_dim"] == summary["bits_per_dim"]


@pytest.mark.parametrize(
    ("changes", "words"),
    {
        "steps": ({"num_inference_steps": 3}, "`num_inference_steps` was 2, is 3"),
        "seed": ({"seed": 1}, "`seed` was 0, is 1"),
        "data": ({"data": {"limit": 5}}, "`data.limit` was null, is 5; `images` was"),
        "estimator": ({"estimator": "finite-difference"}, '`estimator` was "autodiff", is "finite-difference"'),
    }.values(),
    ids=["steps", "seed", "data", "estimator"],
)
def test_other_settings_raise_an_error_that_names_them(place, reference, changes, words):
    with pytest.raises(InputError, match=f"holds records of other settings: {words}"):
        evaluate_dataset(reference[0], settings_of(place, **changes))


def test_other_weights_and_other_images_raise_an_error(place, reference, tmp_path):
    pipe = tiny.stable_diffusion()
    with torch.no_grad():
        pipe.unet.conv_out.bias += 1e-3
    pipe.save_pretrained(tmp_path / "pipeline")
    image_folder(tmp_path / "images")
    evaluate_dataset(tmp_path / "run", settings_of(tmp_path))
    tiny.stable_diffusion().save_pretrained(tmp_path / "pipeline")
    with pytest.raises(InputError, match=r"of other settings: `weights` was"):
        evaluate_dataset(tmp_path / "run", settings_of(tmp_path))
    pipe.save_pretrained(tmp_path / "pipeline")
    captions = (tmp_path / "images" / "metadata.jsonl").read_text()
    (tmp_path / "images" / "metadata.jsonl").write_text(captions.replace('"a b"', '"b a"'))
    with pytest.raises(InputError, match=r'of other settings: `images` was "12, .*", is "12, '):
        evaluate_dataset(tmp_path / "run", settings_of(tmp_path))
    image_folder(tmp_path / "images", count=13)
    with pytest.raises(InputError, match=r'of other settings: `images` was "12, .*", is "13, '):
        evaluate_dataset(tmp_path / "run", settings_of(tmp_path))


def test_a_stream_gives_the_same_records(place, reference, tmp_path):
    evaluate_dataset(tmp_path / "run", settings_of(place, data={"streaming": True}), batch_size=4)
    assert lines(tmp_path / "run") == lines(reference[0])


def test_images_of_several_sizes_are_evaluated_and_one_that_does_not_fit_is_named(place, tmp_path):
    image_folder(tmp_path / "images", count=3)
    for name, size in (("train-1.png", (24, 16)), ("train-2.png", (16, 17))):
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "images" / name)
    settings = dataclasses.replace(settings_of(tmp_path), denoiser=DenoiserSettings(str(place / "pipeline")))
    evaluate_dataset(tmp_path / "run", settings)
    rows = lines(tmp_path / "run")
    assert [row.get("dims") for row in rows] == [256, 384, None]
    assert re.search(
        r"'train-2.png' has 16x17 pixels; this pipeline takes multiples of \d+. Set `resolution`", rows[2]["error"]
    )


def with_captions(folder, column, changes):
    """Makes an image folder and replaces the entries of some rows in its metadata."""
    image_folder(folder, count=4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, caption in changes.items():
        rows[number][column] = caption
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_refused_first_image_stops_neither_a_new_run_nor_a_resumed_run(tmp_path, batch_size):
    """The first image has no class label, which this pipeline needs."""
    saved_pipeline(tmp_path / "pipeline", tiny.dit)
    with_captions(tmp_path / "images", "label", {0: None})
    settings, run = settings_of(tmp_path, data={"caption_column": "label"}), tmp_path / "run"
    assert evaluate_dataset(run, settings, batch_size)["evaluated"] == 3
    rows = lines(run)
    assert ["error" in row for row in rows] == [True, False, False, False]
    assert rows[0]["error"].startswith("Image 'train-0.png': ")
    first = run / "records" / "000000000.json"  # a run that was killed before this image has no record of it
    content = json.loads(first.read_text())
    content["records"] = [row for row in content["records"] if row["position"] > 0]
    (run / "records" / "000000001.json").write_text(json.dumps(content))
    first.unlink()
    assert evaluate_dataset(run, settings, batch_size)["last_run"]["images"] == 1
    assert lines(run) == rows


def test_a_run_whose_images_are_all_refused_stops_early(tmp_path, monkeypatch):
    monkeypatch.setattr(image_share, "ATTEMPTS", 3)
    saved_pipeline(tmp_path / "pipeline", tiny.unconditional)
    image_folder(tmp_path / "images")
    words = r"Not one of 3 images could be evaluated\. The last: Image 'train-2\.png': .* takes no `prompt`"
    with pytest.raises(InputError, match=words):
        evaluate_dataset(tmp_path / "run", settings_of(tmp_path, data={"resolution": 8}), batch_size=2)
    assert not list(tmp_path.glob("run/records/*"))


def test_images_without_a_caption_are_counted(place, tmp_path):
    with_captions(tmp_path / "images", "text", {1: None, 2: None})
    data = {"path": str(tmp_path / "images")}
    summary = evaluate_dataset(tmp_path / "run", settings_of(place, data=data))
    assert (summary["evaluated"], summary["without_caption"]) == (4, 2)
    assert "2 images have no caption and were given the empty prompt" in (tmp_path / "run/index.html").read_text()
    empty = evaluate_dataset(tmp_path / "empty", settings_of(place, data={**data, "caption_column": None}))
    assert empty["without_caption"] == 0  # without a caption column no caption is absent
    for number in (1, 2):
        assert lines(tmp_path / "run")[number]["bits_per_dim"] == pytest.approx(
            lines(tmp_path / "empty")[number]["bits_per_dim"], abs=AGREEMENT
        )


def test_retry_failed_evaluates_the_failed_images_again(place, tmp_path):
    """A repaired image gets its likelihood, a truncated one keeps its error, and no other image is computed again."""
    shutil.copytree(place / "images", tmp_path / "images")
    settings, folder = settings_of(place, {"path": str(tmp_path / "images")}), tmp_path / "run"
    evaluate_dataset(folder, settings, batch_size=4)
    before = lines(folder)
    source, first, second = (tmp_path / "images" / before[position]["name"] for position in (CORRUPT[0] + 1, *CORRUPT))
    shutil.copy(
        source, second
    )  # the later image, so that the file of its record begins with the position of the earlier one
    with pytest.raises(InputError, match="`images` was"):
        evaluate_dataset(folder, settings, batch_size=4)
    for _ in range(2):  # in the second round one image still fails
        summary = evaluate_dataset(folder, settings, batch_size=4, retry_failed=True)
        after = lines(folder)
        assert summary["evaluated"] == len(before) - 1
        assert [row["name"] for row in summary["left_out_images"]] == [first.name]
        assert "error" not in after[CORRUPT[1]] and "error" in after[CORRUPT[0]]
        assert [row for row in after if row["position"] != CORRUPT[1]] == [
            row for row in before if row["position"] != CORRUPT[1]
        ]
    assert summary["last_run"]["images"] == 1
    evaluate_dataset(folder, settings, batch_size=4)  # the settings have the images as they are now
    shutil.copy(first.with_name("train-1.png"), first.with_name("train-2.png"))
    with pytest.raises(InputError, match=r"Image 'train-2.png' has changed since its likelihood was recorded in"):
        evaluate_dataset(folder, settings, batch_size=4, retry_failed=True)
    with pytest.raises(InputError, match=r"`images` was .* Some files of the data have changed; .* --retry-failed"):
        evaluate_dataset(folder, settings, batch_size=4)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), ValueError("too large for the network")])
def test_an_image_that_the_network_refuses_is_named_and_changes_no_other_record(
    place, reference, tmp_path, monkeypatch, error
):
    """The memory runs out, or diffusers raises an error, for the images of one caption in every batch."""
    encode = StableDiffusionPipeline.encode_prompt

    def limited(pipe, prompt, *arguments, **options):
        if CAPTIONS[1] in prompt:
            raise error
        return encode(pipe, prompt, *arguments, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", limited)
    evaluate_dataset(tmp_path / "run", settings_of(place), batch_size=4)
    name = "StableDiffusionFisherPipeline"
    message = f"The call's arguments don't suit `encode_prompt` of {name}: ValueError: {error}"
    for row, expected in zip(lines(tmp_path / "run"), lines(reference[0]), strict=True):
        if expected.get("caption") == CAPTIONS[1]:
            assert row["error"] == f"Image '{row['name']}': {message if isinstance(error, ValueError) else error}"
        elif "error" not in expected:
            assert row["bits_per_dim"] == pytest.approx(expected["bits_per_dim"], abs=AGREEMENT)


def test_the_report_names_files_that_are_no_images_and_several_sizes(place, tmp_path, capsys):
    image_folder(tmp_path / "images", count=2)
    Image.new("RGB", (32, 16)).save(tmp_path / "images" / "train-1.png")
    (tmp_path / "images" / "notes.txt").write_text("about them")
    summary = evaluate_dataset(tmp_path / "run", settings_of(place, {"path": str(tmp_path / "images")}))
    assert summary["files_not_read"] == {"count": 1, "names": ["notes.txt"]} and summary["several_sizes"]
    page, output = (tmp_path / "run" / "index.html").read_text(encoding="utf-8"), capsys.readouterr().out
    for text in (page, output):
        assert "1 files of the folder are not among the images" in text and "notes.txt" in text
        assert "are of several sizes" in text and "The grid is coarse for 2 images" in text


def test_an_empty_stream_raises_an_error(place, tmp_path):
    features = datasets.Features({"image": datasets.Image()})
    (tmp_path / "images").mkdir()
    pyarrow.parquet.ParquetWriter(tmp_path / "images" / "train.parquet", features.arrow_schema).close()
    data = {"path": str(tmp_path / "images"), "caption_column": None, "streaming": True}
    with pytest.raises(InputError, match=r"The data '.*images' \(split 'train'\) has no images"):
        evaluate_dataset(tmp_path / "run", settings_of(place, data=data))


def test_records_of_many_processes_are_read_once_each(tmp_path, monkeypatch):
    """A hundred processes have three images each, and their positions alternate."""
    records = Records(tmp_path, {})
    for process in range(100):
        rows = [{"position": process + 100 * number} for number in range(3)]
        records.write(f"{process:03d}", {"method": None, "seconds": 1.0, "records": rows})
    image_records, read_record, count = ImageRecords(records), Records.read, []
    monkeypatch.setattr(Records, "read", lambda self, key: count.append(key) or read_record(self, key))
    assert [row["position"] for row in image_records] == list(range(300))
    assert len(count) == 100


def test_an_image_without_a_finite_likelihood_is_named_and_changes_no_other_record(place, reference, tmp_path):
    """The embedding of one word is NaN. Images with this caption can't be evaluated, and all other images can."""
    pipe = tiny.stable_diffusion()
    token = pipe.tokenizer("f").input_ids[1]
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[token] = torch.nan
    pipe.save_pretrained(tmp_path / "pipeline")
    settings = dataclasses.replace(settings_of(place), denoiser=DenoiserSettings(str(tmp_path / "pipeline")))
    summary = evaluate_dataset(tmp_path / "run", settings)
    rows, expected = lines(tmp_path / "run"), lines(reference[0])
    failures = [row["position"] for row in rows if "not finite" in row.get("error", "")]
    assert failures == [n for n in range(12) if CAPTIONS[n % 4] == "f" and n not in CORRUPT] == [11]
    assert summary["left_out"] == 3
    for row, other in zip(rows, expected, strict=True):
        if "error" not in row:
            assert row["bits_per_dim"] == pytest.approx(other["bits_per_dim"], abs=AGREEMENT)


def test_a_folder_without_any_result_takes_other_settings(place, tmp_path):
    image_folder(tmp_path / "images", size=(17, 17), count=3)
    settings = dataclasses.replace(settings_of(tmp_path), denoiser=DenoiserSettings(str(place / "pipeline")))
    with pytest.raises(InputError, match=r"Not one image could be evaluated\. The first: .* 17x17 pixels"):
        evaluate_dataset(tmp_path / "run", settings)
    resized = dataclasses.replace(settings, data=dataclasses.replace(settings.data, resolution=16))
    assert evaluate_dataset(tmp_path / "run", resized)["evaluated"] == 3


def test_the_pipelines_own_trace_model_is_the_default(place, tmp_path):
    """The prior comes from the statistics of the checkpoint, and no number depends on a seed."""
    pipe = tiny.quiet(
        StableDiffusionFisherPipeline(**StableDiffusionPipeline.from_pretrained(place / "pipeline").components)
    )
    pipe.trace_model = GaussianData((4, 8, 8)).model()
    pipe.trace_model.set_fingerprint(pipe)
    pipe.latent_statistics = torch.full((4, 8, 8), 0.1), torch.full((4, 8, 8), 0.5)
    pipe.save_pretrained(tmp_path / "pipeline")
    for seed in (0, 1):
        denoiser = DenoiserSettings(str(tmp_path / "pipeline"))
        settings = settings_of(place, denoiser=denoiser, seed=seed, estimator="auto")
        summary = evaluate_dataset(tmp_path / f"run-{seed}", settings)
    assert summary["method"]["trace"].startswith("TraceMatchingFisher")
    assert summary["method"]["prior"] == "moment-matched"
    assert json.loads((tmp_path / "run-0" / "settings.json").read_text())["estimator"] == "trace-model"
    example = open_images(ImageData(str(place / "images"), caption_column="text"))[0]
    expected = pipe.log_likelihood(example.pixels[None], example.caption, num_inference_steps=STEPS)
    assert lines(tmp_path / "run-0")[0]["bits_per_dim"] == pytest.approx(float(expected.bits_per_dim), abs=AGREEMENT)
    assert torch.equal(bits(tmp_path / "run-0"), bits(tmp_path / "run-1"))
    # The model of Gaussian data knows nothing of the random network.
    rows = [row for row in lines(tmp_path / "run-1") if "error" not in row]
    wrong = [row for row in rows if row["trace_check"] == "disagrees"]
    assert len(wrong) == summary["images_with_a_wrong_trace_model"] > 0
    assert all(row["total_error"] > row["trace_error"] > 0 for row in rows)
    page = (tmp_path / "run-1" / "index.html").read_text(encoding="utf-8")
    assert f"disagrees with differences of its denoiser for {len(wrong)} images" in page


@pytest.mark.parametrize(
    ("make", "data", "changes"),
    {
        "pixels": (tiny.unconditional, {"caption_column": None, "resolution": 8}, {"bins": 256}),
        "class labels": (tiny.dit, {"caption_column": "label"}, {"num_probes": 1}),
        "one class label": (tiny.dit, {"caption_column": None}, {"prompt": "1", "num_probes": 1}),
        "prompt": (tiny.one_channel, {"caption_column": None, "resolution": 8}, {"prompt": "a b", "num_probes": 0}),
    }.values(),
    ids=["pixels", "class labels", "one class label", "prompt"],
)
def test_batches_do_not_change_the_numbers_for_any_kind_of_condition(tmp_path, make, data, changes):
    saved_pipeline(tmp_path / "pipeline", make)
    image_folder(tmp_path / "images", count=3)
    evaluate_dataset(tmp_path / "run", settings_of(tmp_path, data=data, **changes), batch_size=3)
    evaluate_dataset(tmp_path / "alone", settings_of(tmp_path, data=data, **changes), batch_size=1)
    assert (bits(tmp_path / "run") - bits(tmp_path / "alone")).abs().max() < AGREEMENT
    rows = lines(tmp_path / "run")
    captions = {"label": [0, 1, 2]}.get(data["caption_column"], [changes.get("prompt")] * 3)
    assert [row["caption"] for row in rows] == captions
    assert (rows[0]["standard_error"] > 0) == (changes.get("num_probes") != 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    {
        "estimator": ({"estimator": "best"}, "`estimator` is 'best'; allowed: 'auto', 'trace-model'"),
        "no trace model": ({"estimator": "trace-model"}, "the pipeline has none; allowed: 'autodiff'"),
        "scheme": ({"scheme": "heun"}, "`scheme` is 'heun'"),
        "steps": ({"num_inference_steps": 1}, "`num_inference_steps` is 1; allowed: .* 2"),
        "probes": ({"num_probes": -1}, "`num_probes` is -1; allowed: .* 0"),
        "both": ({"prompt": "a"}, "are both set; allowed: one of them"),
        "pipeline": ({"denoiser": DenoiserSettings("/nonexistent")}, "'/nonexistent' can't be loaded"),
        "data": ({"data": {"path": "/nonexistent"}}, "'/nonexistent'.* can't be opened"),
        "captions": ({"data": {"caption_column": "label"}}, "`prompt` is .*; allowed: a string"),
        "bins": ({"bins": 256}, "`bins` is 256, but"),
        "resolution": ({"data": {"resolution": 12}}, "`resolution` is 12; allowed for this pipeline: multiples of 8"),
    }.values(),
)
def test_settings_that_can_not_run_raise_an_error_and_leave_no_record(place, tmp_path, changes, words):
    with pytest.raises(InputError, match=words):
        evaluate_dataset(tmp_path / "run", settings_of(place, **changes))
    assert not list(tmp_path.glob("run/records/*"))


def test_output_in_the_folder_of_the_data_raises_an_error(place):
    with pytest.raises(InputError, match=r"lies in the folder of the data, .* its pictures would become data"):
        evaluate_dataset(place / "images" / "run", settings_of(place))
    assert not (place / "images" / "run").exists()


def test_captions_for_an_unconditional_pipeline_raise_an_error(tmp_path):
    saved_pipeline(tmp_path / "pipeline", tiny.unconditional)
    image_folder(tmp_path / "images", count=2)
    with pytest.raises(InputError, match="is unconditional; it takes no `prompt`"):
        evaluate_dataset(tmp_path / "run", settings_of(tmp_path, data={"resolution": 8}))


def test_the_command_passes_its_options_on_and_prints_errors(place, reference, tmp_path):
    arguments = command(place, tmp_path / "run", "--limit", "3", "--num-probes", "1", "--seed", "5")[2:]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "3 of 3 images" in result.output and "index.html" in result.output
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    names = ("data.limit", "num_probes", "seed", "estimator")
    assert tuple(settings[name] for name in names) == (3, 1, 5, "autodiff")
    result = CliRunner().invoke(app, command(place, reference[0], "--seed", "5")[2:])
    assert result.exit_code == 1 and "Error: " in result.stderr and "`seed` was 0, is 5" in result.stderr
    assert numpy.isfinite(bits(reference[0]).numpy()).all()
