"""Copies and pickles of our pipelines are the same pipeline; `fisher_pipeline` keeps what was set on the stock one."""

import copy
import pickle

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from diffusers.image_processor import VaeImageProcessor

from diffusers_fisher import DirectFisher, embedded_checkpoint, fisher_pipeline, fisher_scheduler
from pipelines.backbones import BACKBONES

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda pipe: pickle.loads(pickle.dumps(pipe))}


@pytest.mark.parametrize("method", COPIES)
@pytest.mark.parametrize("name", BACKBONES)
def test_a_copy_gives_the_same_images_and_likelihoods(name, method):
    backbone = BACKBONES[name]
    pipe = backbone.ours()
    pipe.scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)
    pipe.latent_statistics = (torch.zeros(backbone.shape), torch.ones(backbone.shape))
    duplicate = COPIES[method](pipe)
    assert type(duplicate) is type(pipe) and type(duplicate.scheduler) is type(pipe.scheduler)
    assert dict(duplicate.config) == dict(pipe.config)
    assert duplicate._progress_bar_config == {"disable": True}
    assert all(torch.equal(*pair) for pair in zip(duplicate.latent_statistics, pipe.latent_statistics, strict=True))
    samples = [backbone.sample(each, generator=torch.Generator().manual_seed(0)) for each in (pipe, duplicate)]
    assert torch.equal(*samples)
    scores = [backbone.score(each, latents=backbone.noise(), estimator=DirectFisher()) for each in (pipe, duplicate)]
    assert torch.equal(scores[0].log_prob, scores[1].log_prob)


def test_a_copy_of_a_converted_pipeline_keeps_the_trace_model_without_its_folder(tmp_path):
    StableDiffusionPipeline.from_pretrained(embedded_checkpoint()).save_pretrained(tmp_path / "stock")
    stock = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    ours = fisher_pipeline(stock)
    for make in (copy.deepcopy, COPIES["pickle"]):
        duplicate = make(ours)
        duplicate.register_to_config(_name_or_path=str(tmp_path / "stock"))  # a folder without a trace model
        weights = [each.trace_model.state_dict() for each in (ours, duplicate)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("name", ["StableDiffusion", "Flux", "DiT", "DDIM"])
def test_settings_of_the_stock_pipeline_are_kept(name):
    stock = BACKBONES[name].make(cls=BACKBONES[name].stock)
    stock.set_progress_bar_config(desc="mine", disable=True)
    stock.register_to_config(_own_setting=3, _name_or_path="somewhere")
    stock.image_processor = VaeImageProcessor(do_normalize=False)
    stock.note = ["mine"]
    before = tiny.snapshot(stock)
    ours = fisher_pipeline(stock)
    assert ours._progress_bar_config == {"desc": "mine", "disable": True}
    assert (ours.config["_own_setting"], ours.config["_name_or_path"]) == (3, "somewhere")
    assert ours.image_processor is stock.image_processor
    assert all(getattr(ours, part) is stock.components[part] for part in stock.components)
    ours.note.append("ours")
    ours.set_progress_bar_config(disable=False)
    assert tiny.snapshot(stock) == before and stock.note == ["mine"]


def test_model_offload_is_kept():
    stock = tiny.stable_diffusion_xl()
    stock.enable_model_cpu_offload(device="cpu")
    ours = fisher_pipeline(stock)
    options = {"prompt": "a", "num_inference_steps": 2, "output_type": "latent"}
    images = [pipe(**options, generator=torch.Generator().manual_seed(0)).images for pipe in (stock, ours, stock)]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert ours._all_hooks and stock._all_hooks
