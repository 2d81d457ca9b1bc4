"""The command's page, its JSON and its errors."""

import image_folders
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from diffusers_fisher.checks import CheckLine, CheckReport
from diffusers_fisher.checks.report import check_page
from diffusers_fisher.cli import app

RUNNER = CliRunner()
LEVEL = {"slope": 1.0, "slope_error": 0.01, "squared_error": 0.2, "gaussian": 0.3}


def report(**figures):
    lines = [
        CheckLine("failed", "<slope>", "A cause.", "A cure.", figures[name], name.replace("_", " "), 1.5)
        for name in figures
    ]
    return CheckReport("a model", "cpu, torch.float32", lines, torch.zeros(2, 1, 4, 4))


def test_the_page_has_all_lines_figures_and_pictures():
    numbers = {name: [1.0, 2.0] for name in ("bits_per_dim", "total_error", "other", "bound")}
    estimators = {
        "direct": {"cosine": [0.5], "seconds": [0.1], "calls_per_product": 0},
        "autodiff": {"cosine": [], "seconds": [], "refused": "no"},
    }
    page = check_page(report(
        calibration={"levels": [{"log_noise": level, **LEVEL} for level in (-2.0, 0.0, 1.0)]},
        estimators={"noise_to_signal": [0.5], "estimators": estimators},
        likelihood=numbers,
        reference={"images": [{"bits_per_dim": 1.25, "percentile": 3.5, "p_value": 0.07}]},
    )).text()  # fmt: skip
    assert page.count("<img") == 3 and "&lt;slope&gt;" in page and page.count("A cure.") == 4
    assert "image 1: 2.0000 bits/dim" in page and "cosine at 0.5" in page and "<td>direct</td>" in page
    assert "Lines that failed: calibration, estimators, likelihood, reference." in page
    assert '<td class="number">0.07</td>' in page


def test_a_page_of_some_lines_has_what_they_have():
    page = check_page(report(checkpoint={})).text()
    assert "<h2>" not in page and "<td>checkpoint</td>" in page


def check(*arguments):
    return RUNNER.invoke(app, ["check", *map(str, arguments)], env={"COLUMNS": "100", "TERM": "dumb"})


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    result = check(tmp_path, "--output", tmp_path / "check")
    assert result.exit_code == 1
    assert f"Error: '{tmp_path}' can't be loaded as a pipeline" in result.stderr


def test_images_of_several_sizes_are_refused(tmp_path):
    model = image_folders.saved_pipeline(tmp_path / "model")
    folder = image_folders.image_folder(tmp_path / "images", 3)
    Image.new("RGB", (32, 16)).save(folder / "train-0.png")
    result = check(model, "--data", folder, "--output", tmp_path / "check")
    assert result.exit_code == 1
    assert "have 2 sizes, such as (16, 16) and (32, 16)" in result.stderr and "Set `resolution`." in result.stderr


@pytest.mark.slow
def test_the_command_checks_the_images_of_a_folder_with_their_captions(tmp_path):
    model = image_folders.saved_pipeline(tmp_path / "model")
    folder = image_folders.image_folder(tmp_path / "images", 4)
    result = check(model, "--data", folder, "--caption-column", "text", "--output", tmp_path / "check")
    assert result.exit_code == 0, result.output
    assert "There are 4 images, and slopes need 64" in " ".join(result.output.split())
    assert (tmp_path / "check" / "index.html").is_file() and (tmp_path / "check" / "check.json").is_file()
