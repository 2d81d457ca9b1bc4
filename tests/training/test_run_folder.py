"""The folder of a run: which run may resume in it, and the effects of full disks, damaged files, unreadable images."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import trace_runs
from image_folders import image_folder, saved_pipeline
from torch._functorch import config as compiler

from diffusers_fisher import CheckpointError, InputError
from diffusers_fisher.training import checkpoints, trace_matching
from diffusers_fisher.training.cache_latents import cache_latents
from diffusers_fisher.training.trace_matching import train


def parameters(model):
    return torch.cat([value.flatten() for value in model.state_dict().values()])


def reference_parameters(config):
    return parameters(train(dataclasses.replace(config, output=f"{config.output}-unbroken")))


def stop_at(monkeypatch, step, failure=KeyboardInterrupt):
    """Makes training stop at the beginning of `step`."""
    draw = trace_matching.draw_trace_batch

    def stopping(scheduler, shape, batch_size, current_step, *args, **kwargs):
        if current_step == step:
            raise failure
        return draw(scheduler, shape, batch_size, current_step, *args, **kwargs)

    monkeypatch.setattr(trace_matching, "draw_trace_batch", stopping)


@pytest.mark.parametrize(
    "section, mistake, words",
    [
        ("data", {"path": "/nonexistent"}, "can't be opened"),
        ("data", {"resolution": 15}, "multiples of"),
        ("denoiser", {"path": "/nonexistent"}, "can't be loaded"),
    ],
)
def test_a_corrected_config_takes_the_folder_of_a_wrong_one(tmp_path, section, mistake, words):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    with pytest.raises(InputError, match=words):
        train(dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **mistake)}))
    train(config)
    assert (Path(config.output) / "trace_model").is_dir()


def test_a_run_without_the_newer_notes_resumes_with_a_compiled_denoiser(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    run = Path(config.output)
    settings = json.loads((run / "config.json").read_text())
    del settings["denoiser"]["compile"]
    (run / "config.json").write_text(json.dumps(settings))
    (run / "fingerprint.json").unlink()
    (run / "skipped.json").unlink()
    compiled_networks = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled_networks.append(type(network).__name__))
    with compiler.patch(donated_buffer=compiler.donated_buffer):  # training sets it
        model = train(dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, compile=True)))
    assert compiled_networks == ["UNet2DConditionModel"]
    assert torch.equal(parameters(model), reference_parameters(config))
    assert (run / "fingerprint.json").is_file()


def test_another_denoiser_at_the_same_path_is_refused(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    train(config)
    train(config)
    shutil.rmtree(config.denoiser.path)
    saved_pipeline(Path(config.denoiser.path), lambda: tiny.stable_diffusion(unet=tiny.unet()))  # another seed
    with pytest.raises(InputError, match=r"holds a run of another denoiser: weights of the denoiser"):
        train(config)


def test_another_denoiser_takes_the_folder_before_the_first_checkpoint(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path, target="jacobian", optimisation={"steps": 2})
    stop_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    shutil.rmtree(config.denoiser.path)
    saved_pipeline(Path(config.denoiser.path), lambda: tiny.stable_diffusion(unet=tiny.unet()))  # another seed
    result = parameters(train(config))
    assert torch.equal(result, reference_parameters(config))  # the run integrates its own paths


def test_settings_may_be_corrected_before_the_first_checkpoint(tmp_path, monkeypatch):
    """The memory may be too small for the first step. Files of the old settings are then made again."""
    config = trace_runs.config_of(tmp_path, target="jacobian")
    stop_at(monkeypatch, 1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config)
    run = Path(config.output)
    paths = run / "paths.safetensors"
    before = paths.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert paths.stat().st_mtime_ns == before  # equal settings: the paths stay
    smaller = dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, batch_size=2))
    monkeypatch.undo()
    result = parameters(train(smaller))
    assert paths.stat().st_mtime_ns > before
    assert torch.equal(result, reference_parameters(smaller))
    assert (run / "loss.jsonl").read_text() == (tmp_path / "run-unbroken" / "loss.jsonl").read_text()
    with pytest.raises(InputError, match=r"other settings: `optimisation\.batch_size` was 2, is 4"):
        train(config)


def test_changeable_settings_leave_the_paths(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path, target="jacobian")
    stop_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    paths = Path(config.output) / "paths.safetensors"
    before = paths.stat().st_mtime_ns
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, save_every=1)))
    assert paths.stat().st_mtime_ns == before


def test_a_finished_model_without_its_checkpoints_is_kept(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    train(config)
    shutil.rmtree(Path(config.output) / "checkpoints")
    with pytest.raises(InputError, match=r"other settings: `seed` was 0, is 1"):
        train(dataclasses.replace(config, seed=1))


def test_images_added_to_the_folder_are_noticed(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    image_folder(tmp_path / "images", count=13)
    with pytest.raises(
        InputError, match=r"run' was made of other data: `images` was 12, is 13; `last` was .*Images were added"
    ):
        train(config)
    (Path(config.output) / "data.json").unlink()  # older folders lack this note
    train(config)
    assert json.loads((Path(config.output) / "data.json").read_text())["images"] == 13


def test_images_may_be_added_before_the_first_checkpoint(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path, target="jacobian")
    stop_at(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    image_folder(tmp_path / "images", count=13)
    assert torch.equal(parameters(train(config)), reference_parameters(config))


def test_images_exchanged_for_others_of_the_same_number_are_noticed(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    train(config)
    last = trace_matching.open_images(config.data).name(11)
    metadata = tmp_path / "images" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace(f'"{last}"', '"train-z.png"'))
    (tmp_path / "images" / last).rename(tmp_path / "images" / "train-z.png")
    with pytest.raises(InputError, match=rf'other data: `last` was "{last}", is "train-z\.png"'):
        train(config)


def test_captions_that_changed_are_noticed(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    train(config)
    metadata = tmp_path / "images" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"a b"', '"b a"'))
    with pytest.raises(InputError, match=r"other data: `rows` was .*Images were added"):
        train(config)


def test_a_new_cache_of_other_images_is_noticed(tmp_path):
    config = trace_runs.config_of(tmp_path, latents=str(tmp_path / "latents"), optimisation={"steps": 2})
    cache_latents(config)
    train(config)
    shutil.rmtree(config.latents)
    image_folder(tmp_path / "images", count=13)
    cache_latents(config)
    with pytest.raises(InputError, match=r"other data: `images` was 12, is 13; .*`latents` was 12, is 13"):
        train(config)


def test_the_model_is_saved_before_the_last_validation(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path, validation={"every": 9})

    def too_large(*args):
        raise torch.OutOfMemoryError("validation")

    monkeypatch.setattr(trace_matching, "validate", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        train(config)
    loaded_model = trace_matching.FisherTraceModel.from_pretrained(Path(config.output) / "trace_model")
    monkeypatch.undo()
    assert torch.equal(parameters(loaded_model), parameters(train(config)))


def test_a_finished_run_started_again_writes_no_entry_twice(tmp_path):
    config = trace_runs.config_of(tmp_path)
    train(config)
    curve = Path(config.output) / "validation.jsonl"
    before = curve.read_text()
    train(config)
    assert curve.read_text() == before


def test_names_of_unreadable_images_are_reported_after_a_resumption(tmp_path, monkeypatch):
    """One image is held out. The names stay when the images can be read later, since others had replaced them."""
    config = trace_runs.config_of(tmp_path)
    images = trace_matching.open_images(config.data)
    numbers = [int(images.name(index).removeprefix("train-").removesuffix(".png")) for index in (1, 11)]
    image_folder(tmp_path / "images", corrupt=numbers)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    image_folder(tmp_path / "images")
    train(config)
    report = json.loads((Path(config.output) / "report.json").read_text())
    assert report["skipped_images"] == sorted(f"train-{number}.png" for number in numbers)


def test_names_of_images_that_a_cache_lacks_are_reported(tmp_path):
    config = trace_runs.config_of(tmp_path, corrupt=(2,), latents=str(tmp_path / "latents"))
    cache_latents(config)
    train(config)
    assert json.loads((Path(config.output) / "report.json").read_text())["skipped_images"] == ["train-2.png"]


def test_a_full_disk_stops_with_the_last_good_checkpoint_named(tmp_path, monkeypatch):
    config = trace_runs.config_of(tmp_path)
    save = checkpoints.save_training_state

    def full(path, modules, optimizer, averages, step):
        if step == 4:
            raise OSError(28, "No space left on device")
        save(path, modules, optimizer, averages, step)

    monkeypatch.setattr(checkpoints, "save_training_state", full)
    words = r"step-000000004\S* can't be written: .*No space left on device; the last good checkpoint is .*000000002"
    with pytest.raises(CheckpointError, match=words):
        train(config)
    monkeypatch.undo()
    assert torch.equal(parameters(train(config)), reference_parameters(config))


@pytest.mark.parametrize(
    "owner, name, file",
    [
        (trace_matching, "plot_validation", "validation.png"),
        (checkpoints, "open", "loss.jsonl"),
        (checkpoints, "write_text", "loss.jsonl"),
        (trace_matching.FisherTraceModel, "save_pretrained", "trace_model"),
        (trace_matching, "write_json", "report.json"),
    ],
    ids=["plot", "curve", "cut", "model", "report"],
)
def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch, owner, name, file):
    config = trace_runs.config_of(tmp_path)
    if name == "write_text":
        train(config)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(owner, name, full, raising=name != "open")
    with pytest.raises(CheckpointError, match=rf"{file}' can't be written: .*No space left on device; .*checkpoint"):
        train(config)


def test_a_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path, monkeypatch, caplog):
    config = trace_runs.config_of(tmp_path)
    stop_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    monkeypatch.undo()
    newest = Path(config.output) / "checkpoints" / "step-000000004.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    model = train(config)
    assert "step-000000004" in caplog.text and "The checkpoint before it is used" in caplog.text
    assert torch.equal(parameters(model), reference_parameters(config))


def test_damaged_checkpoints_alone_are_an_error(tmp_path):
    config = trace_runs.config_of(tmp_path, optimisation={"steps": 2})
    train(config)
    (path,) = (Path(config.output) / "checkpoints").iterdir()
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-000000002"):
        train(config)
