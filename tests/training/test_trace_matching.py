"""Training of trace models: its files, and that neither kills nor the number of processes change the result."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import trace_runs
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline

from diffusers_fisher import (
    FisherError,
    FisherTraceModel,
    InputError,
    NumericalError,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
)
from diffusers_fisher.files import load_tensors
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.training import trace_matching
from diffusers_fisher.training.cache_latents import cache_latents
from diffusers_fisher.training.trace_config import TraceMatchingConfig
from diffusers_fisher.training.trace_matching import train


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parameters(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def rewrite_metadata(folder: Path, changes) -> None:
    """Changes rows of an image folder's metadata by `changes(number, row)`."""
    path = folder / "metadata.jsonl"
    rows = [row | changes(number, row) for number, row in enumerate(lines(path))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def launch_command(config: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--cpu", *options, "-m",
        "diffusers_fisher.training.trace_matching", "--config", str(config),
    ]  # fmt: skip


@pytest.mark.parametrize("target", ["residual", "jacobian", "norm"])
def test_a_run_writes_model_curves_plot_and_report(tmp_path, target):
    config = trace_runs.config_of(tmp_path, target=target)
    model = train(config)
    run = Path(config.output)
    loaded_model = FisherTraceModel.from_pretrained(run / "trace_model")
    assert loaded_model.target == target and torch.equal(parameters(loaded_model), parameters(model))
    assert [line["step"] for line in lines(run / "loss.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines(run / "validation.jsonl")] == [4, 6]
    assert (run / "validation.png").stat().st_size > 10_000
    report = json.loads((run / "report.json").read_text())
    assert report["target"] == target and report["skipped_images"] == []
    assert len(report["validation"]["mean"]["model"]) == 3
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == [
        "step-000000004.safetensors", "step-000000006.safetensors",
    ]  # fmt: skip
    pipe = StableDiffusionFisherPipeline.from_pretrained(config.denoiser.path)
    pipe.set_progress_bar_config(disable=True)
    images = torch.rand(2, 3, 16, 16)
    out = pipe.log_likelihood(images, "a b", estimator=TraceMatchingFisher(loaded_model), step_halving=False)
    assert torch.isfinite(out.log_prob).all() and target in out.trace
    other_pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    other_pipe.unet = tiny.unet()
    with pytest.raises(InputError, match="weights"):
        other_pipe.log_likelihood(torch.rand(2, 3, 16, 16), "a b", estimator=TraceMatchingFisher(loaded_model))


def test_training_learns(tmp_path):
    """The untrained model knows the Gaussian of the data; squared errors of an untrained network are far from it."""
    longer = {"steps": 120, "save_every": 60, "log_every": 20, "warmup_steps": 5}
    config = trace_runs.config_of(tmp_path, optimisation=longer, validation={"every": 60, "samples": 8})
    train(config)
    losses = [line["loss"] for line in lines(Path(config.output) / "loss.jsonl")]
    assert losses[-1] < losses[0] - 0.1
    calibration = FisherTraceModel.from_pretrained(Path(config.output) / "trace_model").config["calibration"]
    assert calibration["samples"] == 8 and calibration["error"] > 0


def test_squared_weight_changes_the_parameters(tmp_path):
    """The gradient differs from that of the other loss, so the parameters differ."""
    config = trace_runs.config_of(tmp_path)
    weighted_config = dataclasses.replace(config, output=str(tmp_path / "weighted"), squared_weight=100.0)
    assert not torch.equal(parameters(train(config)), parameters(train(weighted_config)))


def test_features_that_a_denoiser_lacks_are_refused(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path, model={"features": True})
    compiled_denoiser = dataclasses.replace(config.denoiser, compile=True)
    with pytest.raises(InputError, match=r"leave out `denoiser\.compile` or `model\.features`"):
        train(dataclasses.replace(config, denoiser=compiled_denoiser))
    monkeypatch.setattr("diffusers_fisher.features.OUTPUT_NORMS", ())
    with pytest.raises(InputError, match=r"`model\.features` needs the denoiser's last hidden layer, but for"):
        train(config)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_killed_run_resumes_to_the_same_parameters_and_curves(tmp_path):
    """A run that is killed in the middle and resumed by the same command equals an unbroken run bit for bit."""
    settings = trace_runs.settings(
        tmp_path, target="jacobian", model={"features": True},
        optimisation={"steps": 40, "save_every": 4, "log_every": 2},
    )  # fmt: skip
    config = trace_runs.write_config(tmp_path, settings)
    process = subprocess.Popen(
        launch_command(config), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    run = tmp_path / "run"
    for _ in range(600):
        if (run / "checkpoints").is_dir() and len(list((run / "checkpoints").glob("step-*"))) == 2:
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "trace_model").exists()
    with (run / "loss.jsonl").open("a") as file:
        file.write('{"step": 59, "lo')  # what a kill in the middle of a line leaves
    model = train(load_config(config, TraceMatchingConfig))
    reference_model = train(load_config(config, TraceMatchingConfig, [f"output={tmp_path / 'unbroken'}"]))
    assert torch.equal(parameters(model), parameters(reference_model))
    assert lines(run / "loss.jsonl") == lines(tmp_path / "unbroken" / "loss.jsonl")
    assert lines(run / "validation.jsonl") == lines(tmp_path / "unbroken" / "validation.jsonl")


@pytest.mark.parametrize(("target", "accumulation", "features"), [("residual", 1, True), ("jacobian", 2, False)])
def test_two_processes_give_the_parameters_of_one(tmp_path, target, accumulation, features):
    """Only the order of float32 sums differs: after 20 steps by less than 1e-4 of the parameters' norm."""
    settings = trace_runs.settings(
        tmp_path,
        target=target,
        corrupt=(2,),
        model={"features": features},
        optimisation={"steps": 20, "save_every": 20, "gradient_accumulation": accumulation},
    )
    config = trace_runs.write_config(tmp_path, settings)
    subprocess.run(launch_command(config, "--num_processes", "2"), check=True, capture_output=True, timeout=300)
    single_config = load_config(
        config, TraceMatchingConfig, [f"output={tmp_path / 'alone'}", "optimisation.gradient_accumulation=1"]
    )
    train(single_config)
    states = [
        load_tensors(path / "checkpoints" / "step-000000020.safetensors")[0]
        for path in (tmp_path / "run", tmp_path / "alone")
    ]
    two, one = (
        torch.cat([state[key].flatten() for key in sorted(state) if key.startswith("module.")]) for state in states
    )
    start = torch.cat(
        [
            value.flatten()
            for _, value in sorted(
                trace_matching.TraceMatching(
                    dataclasses.replace(single_config, output=str(tmp_path / "fresh")),
                    trace_matching.Accelerator(cpu=True),
                )
                .model.state_dict()
                .items()
            )
        ]
    )
    assert (one - start).norm() > 1e-2 * one.norm()  # training moved the parameters
    assert (two - one).norm() <= 1e-4 * one.norm()
    reports = [json.loads((tmp_path / run / "report.json").read_text()) for run in ("run", "alone")]
    assert [report["skipped_images"] for report in reports] == [["train-2.png"]] * 2


def test_cached_latents_and_images_train_to_the_same_parameters(tmp_path):
    """The cache holds the encoded images; batches of another size round otherwise (1e-5)."""
    config = trace_runs.config_of(tmp_path, latents=str(tmp_path / "latents"))
    assert cache_latents(config, batch_size=5) == 12
    cache_model = train(config)
    image_model = train(dataclasses.replace(config, latents=None, output=str(tmp_path / "direct")))
    assert torch.allclose(parameters(cache_model), parameters(image_model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns when it traces and compiles
def test_a_compiled_denoiser_trains_to_nearly_the_same_parameters(tmp_path):
    from torch._functorch import config as compiler

    config = trace_runs.config_of(tmp_path, target="jacobian")
    eager = parameters(train(config))
    compiled_denoiser = dataclasses.replace(config.denoiser, compile=True)
    with compiler.patch(donated_buffer=compiler.donated_buffer):  # training sets it
        fused_parameters = parameters(
            train(dataclasses.replace(config, denoiser=compiled_denoiser, output=str(tmp_path / "compiled")))
        )
    assert 0 < (fused_parameters - eager).norm() < 1e-3 * eager.norm()  # fused kernels round otherwise


def test_corrupt_images_are_skipped_counted_and_named(tmp_path, caplog):
    config = trace_runs.config_of(tmp_path, corrupt=(2, 5), latents=str(tmp_path / "latents"))
    train(dataclasses.replace(config, latents=None))
    report = json.loads((Path(config.output) / "report.json").read_text())
    assert report["skipped_images"] == ["train-2.png", "train-5.png"]
    assert cache_latents(config) == 10
    index = json.loads((tmp_path / "latents" / "index.json").read_text())
    assert index["skipped_images"] == ["train-2.png", "train-5.png"] and index["counts"] == [10]


def test_a_stream_trains_and_resumes(tmp_path):
    config = trace_runs.config_of(tmp_path, data={"streaming": True}, corrupt=(7,))
    reference_model = train(config)
    half = dataclasses.replace(config, output=str(tmp_path / "half"))
    run = trace_matching.TraceMatching(half, trace_matching.Accelerator())
    run.folder.keep = 9
    run.run()
    for path in (tmp_path / "half" / "checkpoints").glob("step-*[46].safetensors"):
        path.unlink()
    model = train(half)
    assert torch.equal(parameters(model), parameters(reference_model))


@pytest.mark.parametrize(
    "make, changes",
    {
        "pixels": (tiny.unconditional, {"data": {"resolution": 8, "caption_column": None}}),
        "class labels": (tiny.dit, {"data": {"caption_column": "label"}}),
        "packed tokens": (
            lambda: tiny.flux(texts=True),
            {"target": "jacobian", "model": {"pooled": True}, "prior_samples": 4, "path_images": 4},
        ),
        "flow": (lambda: tiny.stable_diffusion_3(texts=True), {"target": "jacobian", "product": "finite_difference"}),
        "diagonal": (tiny.stable_diffusion, {"model": {"output": "diagonal", "basis": "dct", "prior": "channel"}}),
        "pooled": (tiny.stable_diffusion_xl, {"model": {"pooled": True}}),
        "forward": (tiny.stable_diffusion, {"target": "jacobian", "product": "forward", "trackers": ["tensorboard"]}),
    }.values(),
    ids=["pixels", "class labels", "packed tokens", "flow", "diagonal", "pooled", "forward"],
)  # fmt: skip
def test_every_kind_of_pipeline_and_model(tmp_path, make, changes):
    optimisation = {"steps": 2, "save_every": 2}
    config = trace_runs.config_of(tmp_path, make=make, optimisation=optimisation, **changes)
    model = train(config)
    pipe = DiffusionPipeline.from_pretrained(config.denoiser.path)
    model.check_fingerprint(pipe)
    assert torch.isfinite(parameters(model)).all()


def unknown_prediction():
    return tiny.stable_diffusion(scheduler=tiny.scheduler(prediction_type="foo"))


def unknown_scheduler():
    return tiny.stable_diffusion(scheduler=CMStochasticIterativeScheduler())


@pytest.mark.parametrize(
    "changes, words",
    {
        "target": ({"target": "trace"}, r"`target` is 'trace'; allowed: 'residual', 'jacobian' or 'norm'"),
        "no data": ({"data": None}, "neither `data` nor `latents`"),
        "data path": ({"data": {"path": "/nonexistent"}}, "'/nonexistent'.* can't be opened"),
        "denoiser path": ({"denoiser": {"path": "/nonexistent"}}, "'/nonexistent' can't be loaded as a pipeline"),
        "no cache": ({"latents": "/nonexistent"}, "no finished cache"),
        "too few images": ({"optimisation": {"batch_size": 10}}, "12 samples; 3 are held out and a batch takes 10"),
        "batch and pieces": (
            {"optimisation": {"gradient_accumulation": 3}},
            "batch_size` is 4; allowed: multiples of 3",
        ),
        "log and save": (
            {"optimisation": {"log_every": 3}},
            "`save_every` is 2, `log_every` 3; allowed: multiples of `log_every`",
        ),
        "ema": ({"optimisation": {"ema_decay": 1.0}}, r"`optimisation\.ema_decay` is 1\.0; allowed: less than 1"),
        "norm diagonal": ({"target": "norm", "model": {"output": "diagonal"}}, "Target 'norm' gives the trace alone"),
        "size": ({"data": {"resolution": 15}}, "15x15 pixels; this pipeline takes multiples of"),
        "unknown key": ({"optimisation": {"lr": 1.0}}, r"`optimisation\.lr` is an unknown key; allowed: batch_size, "),
        "patches": ({"model": {"patch_size": 3}}, "multiples of the trace model's `patch_size`, 3"),
        "warm-up": (
            {"optimisation": {"warmup_steps": -1}},
            r"warmup_steps` is -1; allowed: greater than or equal to 0",
        ),
        "negative weight": (
            {"squared_weight": -1.0},
            r"`squared_weight` is -1\.0; allowed with target 'residual': from 0",
        ),
        "weight of a squared error": (
            {"target": "norm", "squared_weight": 1.0},
            r"`squared_weight` is 1\.0; allowed with target 'norm': from 0 to 0",
        ),
        "long warm-up": (
            {"optimisation": {"warmup_steps": 6}},
            r"warmup_steps` is 6; allowed: from 0 to below `steps` \(6\)",
        ),
        "unknown tracker": ({"trackers": ["tensorboards"]}, "trackers has 'tensorboards'; installed here: "),
        "tracker not installed": ({"trackers": ["clearml"]}, "trackers has 'clearml'; installed here: "),
        "prediction type": ({"make": unknown_prediction}, "`prediction_type` of DDIMScheduler is 'foo'"),
        "scheduler": ({"make": unknown_scheduler}, "Noise levels of CMStochasticIterativeScheduler are not known"),
    }.values(),
)
def test_bad_configs_fail_before_the_first_step(tmp_path, changes, words):
    with pytest.raises(FisherError, match=words):
        train(trace_runs.config_of(tmp_path, **changes))
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_folder_of_another_run_is_refused_and_kept(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    train(config)
    with pytest.raises(InputError, match=r"other settings: `seed` was 0, is 1"):
        train(dataclasses.replace(config, seed=1))
    assert (Path(config.output) / "trace_model" / "config.json").exists()


def test_latents_of_another_autoencoder_are_refused(tmp_path):
    config = trace_runs.config_of(tmp_path, latents=str(tmp_path / "latents"))
    cache_latents(config)
    other = trace_runs.saved_pipeline(
        tmp_path / "other", lambda: tiny.stable_diffusion(vae=tiny.vae(scaling_factor=0.5))
    )
    with pytest.raises(
        InputError, match=r"another autoencoder: .*`scaling_factor` was 0\.18215, is 0\.5; .*Make the cache"
    ):
        train(dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, path=other)))


def test_nan_stops_with_the_last_good_checkpoint_kept(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path)
    draw = trace_matching.draw_trace_batch

    def nan_draw(scheduler, shape, batch_size, step, *args, **kwargs):
        batch = draw(scheduler, shape, batch_size, step, *args, **kwargs)
        return batch if step < 5 else dataclasses.replace(batch, noise=batch.noise * float("nan"))

    monkeypatch.setattr(trace_matching, "draw_trace_batch", nan_draw)
    with pytest.raises(NumericalError, match=r"last good checkpoint is .*step-000000004"):
        train(config)
    monkeypatch.undo()
    model = train(config)
    reference_model = train(dataclasses.replace(config, output=str(tmp_path / "unbroken")))
    assert torch.equal(parameters(model), parameters(reference_model))


@pytest.mark.parametrize("missing", [(0, 2), range(4)], ids=["some", "all"])
def test_missing_captions_are_empty_prompts(tmp_path, missing):
    """Two of the four captions are missing, in every other image, so batches mix images with and without captions."""
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    rewrite_metadata(tmp_path / "images", lambda number, row: {"text": None} if number % 4 in missing else {})
    captions = trace_matching.TraceMatching(config, trace_matching.Accelerator()).data.held_out().captions
    assert None in captions
    assert torch.isfinite(parameters(train(config))).all()


def test_wrong_captions_of_any_held_out_sample_fail_before_the_first_step(tmp_path):
    config = trace_runs.config_of(tmp_path, make=tiny.dit, data={"caption_column": "label"})
    last = trace_matching.open_images(config.data).name(11)
    rewrite_metadata(tmp_path / "images", lambda _, row: {"label": 9999} if row["file_name"] == last else {})
    with pytest.raises(InputError, match=r"`class_labels` is \[.*9999\]; allowed: numbers from 0"):
        train(config)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["embedded", "stable_diffusion_1_5", "stable_diffusion_2_1", "stable_diffusion_xl", "stable_diffusion_3"]
)
def test_shipped_configs_are_read_and_may_be_run_on_eight_processes(name):
    path = Path(__file__).parents[2] / "configs" / f"trace_{name}.yaml"
    config = load_config(path, TraceMatchingConfig)
    config.check(num_processes=8)
    assert config.data is not None and config.latents is not None
