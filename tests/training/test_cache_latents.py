"""The cache of latents: shards, kills, unreadable images and wrong settings."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import trace_runs
from image_folders import image_folder
from PIL import Image

from diffusers_fisher import CheckpointError, InputError
from diffusers_fisher.data import CachedLatents, open_images
from diffusers_fisher.files import read_table
from diffusers_fisher.jobs.pipelines import load_pipeline
from diffusers_fisher.training import cache_latents as module
from diffusers_fisher.training.cache_latents import cache_latents
from diffusers_fisher.training.samples import SampleSpace


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_SIZE", 4)


def config_of(folder, **changes):
    return trace_runs.config_of(folder, latents=str(folder / "latents"), **changes)


def names(config):
    images = open_images(config.data)
    return [images.name(index) for index in range(len(images))]


def read_cache(config):
    latents = CachedLatents(config.latents)
    moments, captions = zip(*(latents[index] for index in range(len(latents))), strict=True)
    return torch.stack(moments), list(captions)


def test_a_shard_of_unreadable_images_is_empty(tmp_path):
    numbers = [int(name.removeprefix("train-").removesuffix(".png")) for name in names(config_of(tmp_path))]
    config = config_of(tmp_path, corrupt=numbers[4:8])
    assert cache_latents(config, batch_size=3) == 8
    assert read_table(Path(config.latents) / "index.json")["counts"] == [4, 0, 4]
    assert CachedLatents(config.latents).skipped_images == names(config)[4:8]
    images = open_images(config.data)
    examples = [images[position] for position in (0, 1, 2, 3, 8, 9, 10, 11)]
    space = SampleSpace(load_pipeline(config.denoiser), latents=False)
    moments, captions = read_cache(config)
    # Batches of another size round otherwise.
    assert torch.allclose(moments, space.moments(torch.stack([each.pixels for each in examples])), atol=1e-5)
    assert captions == [each.caption for each in examples]


def test_data_without_readable_images_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"None of the 12 images of '.*images' can be read"):
        cache_latents(config_of(tmp_path, corrupt=range(12)))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stopped_cache_resumes(tmp_path, monkeypatch, failure):
    config = config_of(tmp_path)
    save, file_names = module.save_tensors, []

    def stopping(path, *args):
        if len(file_names) == 2:
            raise failure
        file_names.append(path.name)
        save(path, *args)

    monkeypatch.setattr(module, "save_tensors", stopping)
    with pytest.raises((KeyboardInterrupt, CheckpointError)) as raised_error:
        cache_latents(config)
    if isinstance(failure, OSError):
        assert raised_error.match(
            r"latents-00002.safetensors' can't be written: .*No space left.*whole shards are kept"
        )
    with pytest.raises(InputError, match="no finished cache"):
        CachedLatents(config.latents)
    file_names.clear()
    assert cache_latents(config) == 12
    assert file_names == ["latents-00002.safetensors"]
    monkeypatch.undo()
    whole_config = dataclasses.replace(config, latents=str(tmp_path / "whole"))
    assert cache_latents(whole_config) == 12
    assert (
        torch.equal(read_cache(config)[0], read_cache(whole_config)[0])
        and read_cache(config)[1] == read_cache(whole_config)[1]
    )


@pytest.mark.parametrize("position", [1, 3, 7], ids=["in a batch", "in a shard", "in the data"])
def test_images_of_several_sizes_are_refused(tmp_path, position):
    config = config_of(tmp_path)
    name = names(config)[position]
    Image.new("RGB", (24, 24), "red").save(tmp_path / "images" / name)
    with pytest.raises(InputError, match=rf"'{name}' has size \(3, 24, 24\), the first \(3, 16, 16\).*resolution"):
        cache_latents(config, batch_size=2)


@pytest.mark.parametrize("mistake", [{"path": "/nonexistent"}, {"resolution": 15}])
def test_a_corrected_config_takes_the_folder_of_a_wrong_one(tmp_path, mistake):
    config = config_of(tmp_path)
    with pytest.raises(InputError, match=r"can't be opened|multiples of"):
        cache_latents(dataclasses.replace(config, data=dataclasses.replace(config.data, **mistake)))
    assert cache_latents(config) == 12
    with pytest.raises(InputError, match=r"other settings: `data\.limit` was null, is 5"):
        cache_latents(dataclasses.replace(config, data=dataclasses.replace(config.data, limit=5)))


def test_images_added_to_the_folder_are_noticed(tmp_path, monkeypatch):
    """Both an unfinished cache and a finished one notice them; shards of an unfinished one would mix old and new."""
    config = config_of(tmp_path)
    write = module._write_index
    monkeypatch.setattr(module, "_write_index", lambda *args: pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception):
        cache_latents(config)
    monkeypatch.setattr(module, "_write_index", write)
    words = r"latents' was made of other data: `images` was 12, is 13"
    image_folder(tmp_path / "images", count=13)
    with pytest.raises(InputError, match=words):
        cache_latents(config)
    (tmp_path / "images" / "train-12.png").unlink()
    image_folder(tmp_path / "images")
    assert cache_latents(config) == 12
    image_folder(tmp_path / "images", count=13)
    with pytest.raises(InputError, match=words):
        cache_latents(config)
    (tmp_path / "latents" / "data.json").unlink()  # older caches lack this note
    assert cache_latents(config) == 12


def test_two_processes_take_turns_with_the_shards(tmp_path):
    """torch's own launcher starts them, which does not say that processes compute on CPUs."""
    config = config_of(tmp_path)
    script = tmp_path / "cache.py"
    script.write_text(
        "import os\n"
        "from diffusers_fisher.training import cache_latents as module\n"
        "module.SHARD_SIZE = 2\n"
        "save = module.save_tensors\n"
        "def save_and_note(path, *arguments):\n"
        f"    open(f'{tmp_path}/by-{{os.environ[\"RANK\"]}}', 'a').write(path.name + '\\n')\n"
        "    save(path, *arguments)\n"
        "module.save_tensors = save_and_note\n"
        "module.main()\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29731"]
    command = [*launcher, str(script), "--config", str(tmp_path / "config.yaml")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    for rank in (0, 1):
        file_names = (tmp_path / f"by-{rank}").read_text().split()
        assert file_names == [f"latents-{number:05d}.safetensors" for number in range(rank, 6, 2)]
    assert len(read_cache(config)[1]) == 12


def test_compiled_denoisers_share_the_cache_and_are_not_compiled_for_it(tmp_path, monkeypatch):
    config = config_of(tmp_path)
    cache_latents(config)
    before = read_cache(config)
    folder = tmp_path / "latents"
    (folder / "index.json").unlink()
    (folder / "latents-00001.safetensors").unlink()
    settings = json.loads((folder / "config.json").read_text())
    del settings["denoiser"]["compile"]  # notes of older caches lack this setting
    (folder / "config.json").write_text(json.dumps(settings))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: pytest.fail("compiled"))
    cache_latents(dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, compile=True)))
    assert torch.equal(read_cache(config)[0], before[0])


def test_pixels_are_cached_too(tmp_path):
    config = config_of(tmp_path, make=tiny.unconditional, data={"resolution": 8, "caption_column": None})
    assert cache_latents(config) == 12
    assert read_cache(config)[0].shape == (12, 2, 3, 8, 8)
