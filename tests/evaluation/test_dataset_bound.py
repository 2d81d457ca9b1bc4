"""Bounds on the likelihoods of a dataset: records, resumption and the report."""

import json
import math

import pytest
import tiny
import torch
from image_folders import image_folder, saved_pipeline
from typer.testing import CliRunner

from diffusers_fisher import FiniteDifferenceFisher, InputError, StableDiffusionFisherPipeline, likelihood_bound
from diffusers_fisher.cli import app
from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.evaluation.dataset_settings import DatasetSettings
from diffusers_fisher.jobs.pipelines import DenoiserSettings

OPTIONS = ("--method", "bound", "--num-inference-steps", "3", "--num-draws", "2", "--caption-column", "text")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    saved_pipeline(folder / "pipeline")
    image_folder(folder / "images", count=4, corrupt=(2,))
    return folder


def run(place, output, *options):
    arguments = ["--model", str(place / "pipeline"), "--data", str(place / "images"), "--output", str(output)]
    return CliRunner().invoke(app, ["likelihood", *arguments, *OPTIONS, *options])


def lines(folder):
    return [json.loads(line) for line in (folder / "likelihoods.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def done(place):
    result = run(place, place / "done")
    assert result.exit_code == 0, result.output
    return place / "done"


def test_a_record_is_the_bound_of_the_image_alone(place, done):
    pipe = tiny.quiet(StableDiffusionFisherPipeline.from_pretrained(place / "pipeline"))
    images = open_images(ImageData(str(place / "images"), caption_column="text"))
    rows = lines(done)
    assert ["error" in row for row in rows] == [False, False, True, False]
    out = likelihood_bound(
        pipe, images[3].pixels[None], images[3].caption, num_inference_steps=3, num_draws=2, num_probes=1,
        estimator=FiniteDifferenceFisher(), generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert rows[3]["bits_per_dim"] == pytest.approx(float(out.bits_per_dim), abs=1e-3)  # see `DIFFERENCES`
    assert rows[3]["bound"] == pytest.approx(rows[3]["bits_per_dim"] * 256 * math.log(2))
    assert rows[3]["discretisation_error"] == 0
    assert 0 <= rows[3]["clamped"] <= 1


def test_the_report_says_that_it_is_a_bound(done):
    summary = json.loads((done / "summary.json").read_text())
    assert summary["levels"] == 6
    assert summary["method"]["scheme"] == "upper bound by a chain of 3 steps with 2 draws per step"
    assert summary["method"]["trace"] == "variance optimal, FiniteDifferenceFisher, probes per state: 1"
    assert "upper bound by a chain of 3 steps" in (done / "index.html").read_text(encoding="utf-8")


def test_batches_do_not_change_the_numbers_and_a_stopped_run_goes_on(place, done, tmp_path):
    """A record that is gone is computed again, alone; the others stay as they are."""
    output = tmp_path / "run"
    assert run(place, output, "--batch-size", "1").exit_code == 0
    before = {row["position"]: row.get("bits_per_dim") for row in lines(output)}
    for row in lines(done):
        assert "error" in row or row["bits_per_dim"] == pytest.approx(before[row["position"]], abs=1e-3)
    files = sorted((output / "records").glob("*.json"))
    files[-1].unlink()
    assert run(place, output).exit_code == 0
    assert {row["position"]: row.get("bits_per_dim") for row in lines(output)} == pytest.approx(before, abs=1e-3)
    other = run(place, output, "--num-draws", "6")
    assert "`num_draws` was 2, is 6" in other.output


def test_the_variances_of_the_papers(place, tmp_path):
    folder = tmp_path / "pipeline"
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline, scheduler=tiny.scheduler(num_train_timesteps=5))
    pipe.save_pretrained(folder)
    arguments = ["--model", str(folder), "--data", str(place / "images"), "--output", str(tmp_path / "run")]
    options = ["--method", "bound", "--variance", "fixed_small"]
    result = CliRunner().invoke(app, ["likelihood", *arguments, *options])
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["levels"] == 5
    assert summary["method"]["trace"] == "variance fixed_small"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "diagonal"}, "`variance` has no use with method 'ode' and variance 'diagonal'"),
        ({"num_draws": 8}, "`num_draws` has no use with method 'ode'"),
        ({"method": "bound", "scheme": "euler"}, "`scheme` has no use with method 'bound'"),
        (
            {"method": "bound", "variance": "fixed_small", "estimator": "autodiff"},
            "`estimator` has no use with method 'bound' and variance 'fixed_small'",
        ),
        ({"method": "bound", "num_draws": 5}, "`num_draws` is 5; allowed: 1, 2, or an even number from 6"),
        ({"method": "bound", "variance": "fixed_large", "num_inference_steps": 5}, "`num_steps` belongs to variance"),
        ({"method": "elbo"}, "`method` is 'elbo'"),
    ],
)
def test_settings_without_use_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        DatasetSettings(DenoiserSettings("embedded"), ImageData("folder"), **options)
