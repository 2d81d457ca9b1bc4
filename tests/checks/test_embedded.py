"""On the embedded checkpoint every line is right, and wrong settings are named with their cause."""

import json

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from typer.testing import CliRunner

from diffusers_fisher import check, embedded_checkpoint, embedded_prompt, embedded_test_images
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.checks.lines import run_line
from diffusers_fisher.checks.pipeline import LINES
from diffusers_fisher.checks.subject import Subject, encoded_samples
from diffusers_fisher.cli import app
from diffusers_fisher.seeds import step_generator


@pytest.fixture
def pipe():
    return tiny.quiet(StableDiffusionPipeline.from_pretrained(embedded_checkpoint()))


def images_and_prompts():
    images, labels = embedded_test_images()
    return images, [embedded_prompt(int(label)) for label in labels]


def calibration_of(pipe, seed=0):
    images, prompts = images_and_prompts()
    backbone = backbone_of(pipe)
    pixels, samples, origin = encoded_samples(backbone, images, (0.0, 1.0), 64, step_generator(seed, "latents"))
    subject = Subject(backbone, samples, prompts, pixels, origin, 64, seed)
    return run_line("calibration", LINES["calibration"], subject)


@pytest.mark.slow
def test_every_line_is_right(pipe):
    report = check(pipe, *images_and_prompts())
    assert {line.name: line.status for line in report.lines} == dict.fromkeys(LINES, "ok") | {
        "reference": "not run"
    }, report
    figures = report["likelihood"].figures
    assert max(figures["total_error"]) < 0.3
    assert all(bound > bits - 0.1 for bound, bits in zip(figures["bound"], figures["bits_per_dim"], strict=True))
    cosines = {name: row["cosine"] for name, row in report["estimators"].figures["estimators"].items()}
    pairs = zip(cosines["differences, central"], cosines["direct"], strict=True)
    assert all(differences > direct for differences, direct in pairs)
    caps = [row["largest_cosine"] for row in report["symmetry"].figures["levels"]]
    assert caps == pytest.approx(cosines["differences, central"], abs=0.15)


def with_scheduler(pipe, **changes):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)


BROKEN = {
    "prediction type": (
        lambda pipe: with_scheduler(pipe, prediction_type="v_prediction"),
        "`prediction_type` is 'v_prediction', but the network predicts epsilon",
    ),
    "betas too large": (
        lambda pipe: with_scheduler(pipe, beta_start=0.0017, beta_end=0.024),
        r"The betas are 0.0017 to 0.024 (scaled_linear), but the network was trained with 0.00085 to 0.012",
    ),
    "betas too small": (
        lambda pipe: with_scheduler(pipe, beta_start=0.000425, beta_end=0.006),
        r"The betas are 0.000425 to 0.006 (scaled_linear), but the network was trained with 0.00085 to 0.012",
    ),
    "scaling too large": (
        lambda pipe: pipe.vae.register_to_config(scaling_factor=2 * pipe.vae.config.scaling_factor),
        "The latents' scaling is 2 times what the network was trained on",
    ),
    "scaling too small": (
        lambda pipe: pipe.vae.register_to_config(scaling_factor=0.5 * pipe.vae.config.scaling_factor),
        "The latents' scaling is 0.5 times what the network was trained on",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROKEN)
def test_a_wrong_setting_is_the_cause_of_a_wrong_calibration(name, pipe):
    change, cause = BROKEN[name]
    change(pipe)
    line = calibration_of(pipe)
    assert line.status == "failed", line
    assert cause in line.cause and "all levels are right" in line.cause, line


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_the_right_checkpoint_is_not_blamed(seed, pipe):
    assert calibration_of(pipe, seed).status == "ok"


@pytest.mark.slow
def test_weights_that_differ_from_those_of_the_trace_model_are_named(pipe):
    subject = Subject(backbone_of(pipe), torch.zeros(2, *subject_shape(pipe)), ["a photo of a coat"] * 2)
    assert run_line("trace model", LINES["trace model"], subject).status == "ok"
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.02)
    line = run_line("trace model", LINES["trace model"], subject)
    assert line.status == "failed"
    assert "was trained for another denoiser. What differs: outputs of the denoiser on a fixed input" in line.cause


def subject_shape(pipe):
    size = pipe.unet.config.sample_size
    return pipe.unet.config.in_channels, size, size


@pytest.mark.slow
def test_the_command_writes_the_page_and_the_figures(tmp_path):
    result = CliRunner().invoke(app, ["check", "embedded", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "Check of" in result.output and "calibration" in result.output
    content = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert list(content["lines"]) == list(LINES) and content["failed"] == []
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<img") >= 5 and "Slope and squared error" in page
