"""The command: its output, the options that it passes on, and its errors."""

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import diffusers_fisher
from diffusers_fisher import CheckpointError, demo
from diffusers_fisher.cli import app
from diffusers_fisher.evaluation import guidance_gallery
from diffusers_fisher.training import cache_latents, trace_matching

RUNNER = CliRunner()


def test_version_is_printed():
    result = RUNNER.invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"{diffusers_fisher.__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], []], ids=["--help", "nothing"])
def test_help_names_the_commands(arguments):
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code in ((0,) if arguments else (0, 2))  # click 8.2 began to call a bare command an error
    assert "Likelihood and reward guidance" in result.output
    assert "demo" in result.output


def test_help_of_demo_names_its_options_and_defaults():
    output = RUNNER.invoke(app, ["demo", "--help"], env={"COLUMNS": "100", "TERM": "dumb"}).output
    assert "--output" in output
    assert "outputs/demo" in output
    assert "--seed" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demmo"], "No such command 'demmo'"),
        (["demo", "--seed", "one"], "Invalid value for '--seed'"),
        (["demo", "--steps", "3"], "No such option"),
        (["guide", "--prompts", "p", "--estimator", "exact"], "Invalid value for '--estimator'"),
        (["likelihood", "--data", "d", "--dtype", "int8"], "Invalid value for '--dtype'"),
    ],
)
def test_mistakes_raise_an_error(arguments, message):
    result = RUNNER.invoke(app, arguments, env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == 2
    assert message in result.stderr


def test_demo_gets_its_options(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(demo, "run_demo", lambda **arguments: calls.append(arguments))
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path), "--seed", "3"])
    assert result.exit_code == 0
    assert calls == [{"output": tmp_path, "seed": 3}]


@pytest.mark.parametrize("subfolder", ["", "inside", "inside/further"])
def test_unwritable_folder_is_an_error_before_any_work(tmp_path, monkeypatch, subfolder):
    """The folder lies below a regular file, where not even root can write."""
    monkeypatch.setattr(demo, "embedded_checkpoint", lambda: pytest.fail("the work began"))
    blocked = tmp_path / "file"
    blocked.write_text("content")
    result = RUNNER.invoke(app, ["demo", "--output", str(blocked / subfolder)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith(f"Error: The folder '{blocked / subfolder}' can't be written: ")
    assert result.stderr.endswith("Name another folder.\n")
    assert blocked.read_text() == "content"


def test_errors_of_the_package_are_messages_without_a_traceback(tmp_path, monkeypatch):
    def raise_error():
        raise CheckpointError("A file is truncated; install the package again.")

    monkeypatch.setattr(demo, "embedded_checkpoint", raise_error)
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path)])
    assert (result.exit_code, result.stderr) == (1, "Error: A file is truncated; install the package again.\n")


def test_guide_gets_its_options(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        guidance_gallery, "run_gallery", lambda **arguments: calls.append(arguments) or {"failed": 0, "prompts": 2}
    )
    options = {
        "checkpoint": "there", "reward": "clip", "held_out": "siglip", "estimator": "autodiff", "guidance_steps": 3,
        "step_size": 0.5, "steps": 7, "guidance_scale": 2.5, "dtype": "bfloat16", "seed": 4, "negative_prompt": "grey",
        "optimizer": "Adam", "patience": 6, "batch_size": 8, "cheap_steps": 5, "full_iterations": 1,
        "unguided_iterations": 2, "candidates": 4, "noise_projection": "soft",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags = ["--likelihood", "--checkpoint-decoder", "--offload"]
    prompts = tmp_path / "prompts.txt"
    result = RUNNER.invoke(app, ["guide", "--prompts", str(prompts), "--output", str(tmp_path), *words, *flags])
    assert (result.exit_code, result.output) == (0, "")
    parameter_names = {
        "guidance_steps": "num_guidance_steps", "steps": "num_inference_steps",
        "cheap_steps": "num_guidance_inference_steps", "full_iterations": "num_full_iterations",
        "unguided_iterations": "num_unguided_iterations", "candidates": "num_candidates",
    }  # fmt: skip
    settings = {parameter_names.get(name, name): value for name, value in options.items() if name != "batch_size"}
    expected = guidance_gallery.GallerySettings(**settings, likelihood=True)
    memory = guidance_gallery.Memory(8, True, True)
    names = ("output", "prompts_file", "settings", "memory", "retry_failed")
    assert [calls[0][name] for name in names] == [tmp_path, prompts, expected, memory, False]
    RUNNER.invoke(app, ["guide", "--prompts", str(prompts), "--no-checkpoint-decoder", "--retry-failed"])
    defaults = guidance_gallery.GallerySettings(), guidance_gallery.Memory()
    assert [calls[1][name] for name in names[1:]] == [prompts, *defaults, True]


@pytest.mark.parametrize(("num_failed", "code"), [(1, 0), (2, 1)])
def test_guide_fails_if_every_prompt_failed(tmp_path, monkeypatch, num_failed, code):
    monkeypatch.setattr(guidance_gallery, "run_gallery", lambda **_: {"failed": num_failed, "prompts": 2})
    result = RUNNER.invoke(app, ["guide", "--prompts", str(tmp_path / "prompts.txt")])
    assert result.exit_code == code


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "run_demo", lambda **_: 1 / 0)
    result = RUNNER.invoke(app, ["demo", "--output", str(tmp_path)])
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("command", "module", "function", "options"),
    [
        ("train", trace_matching, "train_file", {}),
        ("cache-latents", cache_latents, "cache_latents_of_file", {"batch_size": 4}),
    ],
)
def test_training_gets_its_options(monkeypatch, command, module, function, options):
    calls = []
    monkeypatch.setattr(module, function, lambda **arguments: calls.append(arguments))
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    changes = ["seed=1", "optimisation.steps=2"]
    RUNNER.invoke(app, [command, "--config", "a.yaml", "--set", changes[0], "--set", changes[1], *words])
    assert calls == [{"config": Path("a.yaml"), "changes": changes, **options}]


@pytest.mark.parametrize("command", ["train", "cache-latents"])
def test_an_error_of_a_training_configuration_names_the_file_and_the_key(tmp_path, command):
    path = tmp_path / "config.yaml"
    path.write_text("seed: one\n")
    result = RUNNER.invoke(app, [command, "--config", str(path), "--set", "on_path=2"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {path}: `seed` is 'one' (str); allowed: a valid integer.")
    assert "`on_path` is 2; allowed: less than or equal to 1." in result.stderr


@pytest.mark.parametrize("module", ["trace_matching", "cache_latents"])
def test_modules_of_training_print_errors_without_a_traceback(module):
    command = [sys.executable, "-m", f"diffusers_fisher.training.{module}", "--config", "none.yaml"]
    result = subprocess.run([*command, "--set", "seed=1", "output=x"], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: Config file 'none.yaml' can't be read: ")
