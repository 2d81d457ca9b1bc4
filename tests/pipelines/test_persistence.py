"""Folders that any diffusers reads, with our parts beside: they are saved, loaded, and refused when damaged."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import save_file

from diffusers_fisher import (
    CheckpointError,
    FisherDDIMScheduler,
    FisherEulerDiscreteScheduler,
    InputError,
    StableDiffusionFisherPipeline,
    custom_pipeline_file,
    embedded_checkpoint,
    fisher_pipeline,
    fisher_scheduler,
)
from diffusers_fisher.backbones.parts import load_scheduler_name, load_statistics

STATISTICS = (torch.linspace(-1, 1, 256).view(4, 8, 8), torch.linspace(0.5, 2, 256).view(4, 8, 8))
SCHEDULERS = [
    diffusers.DDIMScheduler,
    diffusers.DPMSolverMultistepScheduler,
    FisherDDIMScheduler,
    FisherEulerDiscreteScheduler,
    fisher_scheduler(diffusers.DDIMParallelScheduler),  # not in the catalog
]


def make(cls=FisherDDIMScheduler, statistics=STATISTICS, **changes):
    scheduler = cls.from_config(tiny.scheduler(**changes).config)
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline, scheduler=scheduler)
    pipe.latent_statistics = statistics
    return pipe


def load(folder, cls=StableDiffusionFisherPipeline, **options):
    return tiny.quiet(cls.from_pretrained(folder, **options))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make().save_pretrained(folder)
    return folder


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a b", num_inference_steps=3, generator=generator, output_type="latent").images


def same_statistics(pipe):
    return all(torch.equal(ours, theirs) for ours, theirs in zip(pipe.latent_statistics, STATISTICS, strict=True))


# There and back


@pytest.mark.parametrize("path", [str, Path])
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_pipeline_comes_back_with_scheduler_and_statistics(tmp_path, cls, path):
    pipe = make(cls, prediction_type="v_prediction")
    pipe.save_pretrained(path(tmp_path))
    loaded_pipe = load(path(tmp_path))
    assert type(loaded_pipe) is StableDiffusionFisherPipeline
    assert type(loaded_pipe.scheduler) is cls
    assert loaded_pipe.scheduler.config.prediction_type == "v_prediction"
    settings = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    assert {key: loaded_pipe.scheduler.config[key] for key in settings} == settings
    assert same_statistics(loaded_pipe)
    assert torch.equal(sample(loaded_pipe), sample(pipe))


@pytest.mark.parametrize("loader", [DiffusionPipeline, StableDiffusionPipeline])
@pytest.mark.parametrize("cls", SCHEDULERS)
def test_stock_diffusers_reads_the_folder(tmp_path, cls, loader):
    pipe = make(cls)
    pipe.save_pretrained(tmp_path)
    stock = load(tmp_path, loader)
    assert type(stock) is StableDiffusionPipeline
    assert type(stock.scheduler) is getattr(diffusers, cls.__name__.removeprefix("Fisher"))
    assert torch.equal(sample(stock), sample(pipe))


def test_nothing_that_stock_diffusers_reads_names_us(checkpoint):
    names = [file.name for file in checkpoint.rglob("*.json") if "isher" in file.read_text(encoding="utf-8")]
    assert names == ["fisher.json"]
    assert json.loads((checkpoint / "fisher.json").read_text()) == {"scheduler": "FisherDDIMScheduler"}
    index = json.loads((checkpoint / "model_index.json").read_text())
    assert (index["_class_name"], index["scheduler"]) == ("StableDiffusionPipeline", ["diffusers", "DDIMScheduler"])


def test_checkpoint_without_our_parts(tmp_path):
    tiny.stable_diffusion().save_pretrained(tmp_path)
    pipe = load(tmp_path)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert pipe.latent_statistics is None
    pipe.latent_statistics = STATISTICS
    assert same_statistics(pipe)


def test_embedded_checkpoint_has_its_statistics():
    mean, variance = load(embedded_checkpoint()).latent_statistics
    assert mean.shape == variance.shape == (4, 8, 8)
    assert bool((variance > 0).all())


def test_statistics_of_a_pipeline_saved_there_before_are_removed(tmp_path):
    make().save_pretrained(tmp_path)
    make(diffusers.DDIMScheduler, statistics=None).save_pretrained(tmp_path)
    pipe = load(tmp_path)
    assert pipe.latent_statistics is None
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


def test_saving_leaves_the_pipeline_as_it_was(tmp_path):
    pipe = make()
    before = tiny.snapshot(pipe)
    pipe.save_pretrained(tmp_path)
    assert tiny.snapshot(pipe) == before


def test_settings_and_options_of_the_stock_save_are_kept(tmp_path):
    pipe = make()
    pipe.register_to_config(requires_safety_checker=True)
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    assert json.loads((tmp_path / "model_index.json").read_text())["requires_safety_checker"] is True
    loaded_pipe = load(tmp_path, variant="fp16")
    assert torch.equal(sample(loaded_pipe), sample(pipe))


@pytest.mark.parametrize("option", [{"push_to_hub": True}, {"safe_serialization": False}], ids=str)
def test_pushing_and_pickling_are_refused(tmp_path, option):
    with pytest.raises(InputError, match="Save to a folder, in safetensors; push the finished folder with hugg"):
        make().save_pretrained(tmp_path / "new", **option)
    assert not (tmp_path / "new").exists()


# Loading


def test_custom_pipeline_is_ours_and_finds_the_statistics(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))
    pipe = load(checkpoint, DiffusionPipeline, custom_pipeline=custom_pipeline_file(), trust_remote_code=True)
    assert type(pipe) is StableDiffusionFisherPipeline
    assert same_statistics(pipe)
    assert torch.equal(sample(pipe), sample(make()))
    latents = torch.zeros(1, 4, 8, 8)
    assert pipe.log_likelihood(latents=latents, num_inference_steps=2, num_probes=1).prior == "moment-matched"


def test_pipeline_made_of_the_components_of_another():
    stock = tiny.stable_diffusion()
    pipe = tiny.quiet(StableDiffusionFisherPipeline(**stock.components, requires_safety_checker=False))
    assert all(getattr(pipe, name) is part for name, part in stock.components.items())
    assert pipe.latent_statistics is None
    assert torch.equal(sample(pipe), sample(stock))


def test_from_pipe_shares_the_components_and_finds_the_statistics(checkpoint):
    stock = load(checkpoint, DiffusionPipeline)
    pipe = tiny.quiet(StableDiffusionFisherPipeline.from_pipe(stock))
    assert type(pipe) is StableDiffusionFisherPipeline
    assert all(getattr(pipe, name) is part for name, part in stock.components.items())
    assert same_statistics(pipe)
    assert torch.equal(sample(pipe), sample(stock))


def test_our_version_of_a_loaded_pipeline_finds_what_its_folder_has(checkpoint, tmp_path):
    pipe = tiny.quiet(fisher_pipeline(load(checkpoint, DiffusionPipeline)))
    assert type(pipe) is StableDiffusionFisherPipeline and same_statistics(pipe)
    embedded_pipe = fisher_pipeline(StableDiffusionPipeline.from_pretrained(embedded_checkpoint()))
    assert embedded_pipe.trace_model.target == "jacobian"
    embedded_pipe.save_pretrained(tmp_path)
    assert StableDiffusionFisherPipeline.from_pretrained(tmp_path).trace_model.target == "jacobian"


def test_stock_pipeline_from_ours_keeps_the_fisher_scheduler():
    pipe = make()
    stock = tiny.quiet(StableDiffusionPipeline.from_pipe(pipe))
    assert type(stock) is StableDiffusionPipeline
    assert stock.scheduler is pipe.scheduler
    assert torch.equal(sample(stock), sample(pipe))


def test_from_pipe_with_the_pipelines_dtype_leaves_the_shared_weights_alone():
    stock = tiny.stable_diffusion()
    stock.to(dtype=torch.bfloat16)
    pipe = StableDiffusionFisherPipeline.from_pipe(stock, dtype=stock.dtype)
    assert pipe.unet is stock.unet
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}


def test_dtype_is_that_of_the_weights_and_statistics_stay_single(checkpoint):
    pipe = load(checkpoint, dtype=torch.bfloat16)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert same_statistics(pipe)
    assert type(pipe.scheduler) is FisherDDIMScheduler


@pytest.mark.parametrize("grad", [True, False], ids=["enable_grad", "no_grad"])
def test_grad_mode_is_as_before_loading(checkpoint, grad):
    with torch.set_grad_enabled(grad):
        load(checkpoint)
        assert torch.is_grad_enabled() is grad


def test_components_that_the_caller_passes_need_no_folder(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "partial")
    shutil.rmtree(folder / "unet")
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    source = make()
    scheduler = diffusers.EulerDiscreteScheduler.from_config(source.scheduler.config)
    pipe = load(folder, unet=source.unet, vae=source.vae, scheduler=scheduler)
    assert (pipe.unet, pipe.vae, pipe.scheduler) == (source.unet, source.vae, scheduler)
    assert same_statistics(pipe)


def test_parts_come_from_the_hub_if_the_repository_has_them(checkpoint, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    downloads, errors = [], []

    def download(repository, name, **options):
        downloads.append((repository, name, options))
        if errors:
            raise errors[0]("not there")
        return str(checkpoint / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    name = load_scheduler_name("someone/checkpoint", revision="v2")
    statistics = load_statistics("someone/checkpoint", revision="v2")
    assert name == "FisherDDIMScheduler"
    assert torch.equal(statistics["variance"], STATISTICS[1])
    expected = [
        ("someone/checkpoint", file, {"revision": "v2"}) for file in ("fisher.json", "latent_statistics.safetensors")
    ]
    assert downloads == expected
    for error in (EntryNotFoundError, LocalEntryNotFoundError):
        errors[:] = [error]
        assert (load_scheduler_name("someone/checkpoint"), load_statistics("someone/checkpoint")) == (None, None)


# Damage


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name, count=30):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-count])


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def without_variance(folder):
    save_file({"mean": STATISTICS[0]}, folder / "latent_statistics.safetensors")


WEIGHTS = "diffusion_pytorch_model.safetensors"
NOT_JSON = r"json' is not valid JSON: .* It may be truncated; write or download the file again"
DAMAGES = {
    "no index": (remove("model_index.json"), "has no model_index.json; pass a folder saved by a diffusers pipeline"),
    "cut index": (truncate("model_index.json"), "model_index." + NOT_JSON),
    "index of another kind": (write("model_index.json", "[]"), r"model_index.json' holds a list; it must hold a JSON"),
    "no folder": (lambda folder: shutil.rmtree(folder / "vae"), "lacks the folder 'vae' that its model_index.json"),
    "no weights": (remove(f"unet/{WEIGHTS}"), "unet' has no weight file; save or download the checkpoint again"),
    "cut weights": (
        truncate(f"unet/{WEIGHTS}"),
        r"unet/.*safetensors' \(\d+ bytes\) can't be read .* may be truncated",
    ),
    "empty weights": (write(f"vae/{WEIGHTS}", ""), r"vae/.*safetensors' \(0 bytes\) can't be read as safetensors"),
    "text in place of weights": (
        write("text_encoder/model.safetensors", "version https://git-lfs.github.com/spec/v1"),
        r"text_encoder/model.safetensors' \(42 bytes\) can't be read as safetensors",
    ),
    "no config": (remove("text_encoder/config.json"), "text_encoder' has no config.json or adapter_config.json; save"),
    "cut config": (truncate("unet/config.json"), "unet/config." + NOT_JSON),
    "no scheduler": (remove("scheduler/scheduler_config.json"), "scheduler' has no scheduler_config.json; save or"),
    "no vocabulary": (remove("tokenizer/tokenizer.json"), "tokenizer' has no tokenizer.json or vocab.json or"),
    "cut vocabulary": (truncate("tokenizer/tokenizer.json"), "tokenizer/tokenizer." + NOT_JSON),
    "no tokenizer settings": (remove("tokenizer/tokenizer_config.json"), "tokenizer' has no tokenizer_config.json"),
    "cut statistics": (
        truncate("latent_statistics.safetensors"),
        r"latent_statistics.safetensors' \(\d+ bytes\) can't be",
    ),
    "no variance": (without_variance, r"latent_statistics.safetensors' holds \['mean'\]; it must hold mean and var"),
    "cut mark": (truncate("fisher.json", 3), "fisher." + NOT_JSON),
    "mark of another kind": (write("fisher.json", "3"), "fisher.json' holds a int; it must hold a JSON object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_a_checkpoint_error_that_names_the_file(checkpoint, tmp_path, damage):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    change, message = DAMAGES[damage]
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    assert torch.is_grad_enabled()


def test_damaged_statistics_are_noticed_by_a_pipeline_that_was_loaded_by_a_stock_class(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "damaged")
    truncate("latent_statistics.safetensors")(folder)
    pipe = StableDiffusionFisherPipeline.from_pipe(load(folder, DiffusionPipeline))
    with pytest.raises(CheckpointError, match=r"latent_statistics.safetensors' .* can't be read as safetensors"):
        pipe.log_likelihood(latents=torch.zeros(1, 4, 8, 8), num_inference_steps=2)


def test_names_that_are_not_folders_go_to_diffusers():
    with pytest.raises(OSError, match="nobody/nothing") as raised_error:
        StableDiffusionFisherPipeline.from_pretrained("nobody/nothing")
    assert not isinstance(raised_error.value, CheckpointError)
