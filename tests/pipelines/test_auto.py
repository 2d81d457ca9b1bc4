"""AutoFisherPipeline picks the class by the checkpoint, and says what remains for a class without a Fisher version."""

import json

import diffusers
import pytest
import tiny
import torch

from diffusers_fisher import (
    AutoFisherPipeline,
    CheckpointError,
    FisherDDIMScheduler,
    FisherPipelineMixin,
    InputError,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    backbone_of,
    embedded_checkpoint,
    fisher_pipeline,
    log_likelihood,
)
from diffusers_fisher.backbones.any_pipeline import AnyPipelineBackbone

DOORS = (
    r"log_likelihood\(pipe, latents=...\), guide\(pipe, ...\) and PipelineDenoiser\(pipe, ...\) know it by what its"
)
LAST_DOOR = (
    r"Its call takes no `latents`, so only one way remains: differentiate its sampling runs: set pipe.scheduler"
)


@pytest.fixture(scope="module")
def unknown(tmp_path_factory):
    """Folder of a pipeline without a Fisher class."""
    folder = tmp_path_factory.mktemp("unknown")
    parts = {**tiny.stable_diffusion().components, "safety_checker": None}
    diffusers.StableDiffusionPAGPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def rename(folder, name):
    """Writes the class `name` into the folder's index."""
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))


def test_known_family_gets_its_class_with_all_arguments():
    scheduler = FisherDDIMScheduler.from_config(tiny.scheduler().config)
    pipe = AutoFisherPipeline.from_pretrained(embedded_checkpoint(), scheduler=scheduler, dtype=torch.bfloat16)
    assert type(pipe) is StableDiffusionFisherPipeline
    assert pipe.dtype == torch.bfloat16
    assert pipe.scheduler is scheduler
    assert pipe.trace_model is not None


def test_unknown_family_is_loaded_as_the_stock_class_and_used_by_what_its_call_says(unknown):
    message = (
        "There is no Fisher version of StableDiffusionPAGPipeline, so the pipeline is of the stock class. " + DOORS
    )
    with pytest.warns(UserWarning, match=message):
        pipe = AutoFisherPipeline.from_pretrained(unknown, dtype=torch.float32)
    assert type(pipe) is diffusers.StableDiffusionPAGPipeline
    assert type(backbone_of(pipe)) is AnyPipelineBackbone
    tiny.quiet(pipe)
    scores = log_likelihood(pipe, latents=torch.zeros(1, 4, 8, 8), prompt="a b", num_inference_steps=2, trace_checks=0)
    assert scores.bits_per_dim.isfinite().all()
    with pytest.warns(UserWarning, match=message):
        assert AutoFisherPipeline.from_pipe(pipe) is pipe
    with pytest.raises(
        UnsupportedError, match=r"no Fisher version of StableDiffusionPAGPipeline; supported: .*" + DOORS
    ):
        fisher_pipeline(pipe)


def test_pipelines_at_hand_become_fisher_pipelines():
    pipe = tiny.stable_diffusion()
    ours = AutoFisherPipeline.from_pipe(pipe)
    assert isinstance(ours, FisherPipelineMixin)
    assert ours.unet is pipe.unet
    assert AutoFisherPipeline.from_pipe(ours) is ours


def test_the_refusal_lists_the_door_that_remains(tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()  # so that loading would fail
    rename(tmp_path, "StableDiffusionImg2ImgPipeline")
    with pytest.raises(UnsupportedError, match=r"no Fisher version of StableDiffusionImg2ImgPipeline; .*" + LAST_DOOR):
        AutoFisherPipeline.from_pretrained(tmp_path)
    parts = {**pipe.components, "safety_checker": None}
    img2img = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(UnsupportedError, match=LAST_DOOR):
        AutoFisherPipeline.from_pipe(img2img)


def test_other_folders_and_objects_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no model_index.json; pass a folder saved by a diffusers pipeline"):
        AutoFisherPipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    rename(tmp_path, "SomebodysPipeline")
    with pytest.raises(UnsupportedError, match=r"is of the class SomebodysPipeline, which diffusers .* does not have"):
        AutoFisherPipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"`pipe` is"):
        AutoFisherPipeline.from_pipe("a folder")
    with pytest.raises(UnsupportedError, match=r"Call AutoFisherPipeline.from_pretrained"):
        AutoFisherPipeline()
