"""What a saved folder restores: the scheduler itself or an error, adapters, and whatever stock diffusers loads."""

import json
import shutil
import sys
import types

import diffusers
import pytest
import tiny
import torch
from diffusers import SchedulerMixin, StableDiffusionPipeline
from peft import LoraConfig

from diffusers_fisher import (
    CheckpointError,
    FisherDDIMScheduler,
    FisherSchedulerMixin,
    LMLDDIMScheduler,
    StableDiffusionFisherPipeline,
    UnsupportedError,
    fisher_scheduler,
)


class HalfStep(diffusers.DDIMScheduler):
    """A user's scheduler."""

    def step(self, model_output, *args, **kwargs):
        return super().step(0.5 * model_output, *args, **kwargs)


class OverFisher(FisherDDIMScheduler):
    pass


class OverMixin(FisherSchedulerMixin, HalfStep):
    pass


class DDIMScheduler(diffusers.DDIMScheduler):
    """Has the name of a class of diffusers."""


def make(scheduler=None):
    return tiny.stable_diffusion(StableDiffusionFisherPipeline, scheduler=scheduler or tiny.scheduler())


def load(folder, cls=StableDiffusionFisherPipeline, **options):
    return tiny.quiet(cls.from_pretrained(folder, **options))


def sample(pipe):
    generator = torch.Generator().manual_seed(0)
    return pipe("a b", num_inference_steps=2, generator=generator, output_type="latent").images


def local_class():
    class Local(diffusers.DDIMScheduler):
        pass

    return Local


OWN = {
    "made of a class of one's own": lambda: fisher_scheduler(HalfStep),
    "over a Fisher scheduler": lambda: OverFisher,
    "over the mixin": lambda: OverMixin,
    "made of a namesake": lambda: fisher_scheduler(DDIMScheduler),
    "made of another of our classes": lambda: fisher_scheduler(LMLDDIMScheduler),
    "in a function": local_class,
}


@pytest.mark.parametrize("kind", OWN)
def test_a_scheduler_that_a_folder_can_not_restore_is_refused_before_anything_is_written(tmp_path, kind):
    cls = OWN[kind]()
    pipe = make(cls.from_config(tiny.scheduler().config))
    with pytest.raises(UnsupportedError, match=rf"can't restore the scheduler {cls.__name__} of .*scheduler=\.\.\.\)"):
        pipe.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_scheduler_of_a_module_of_ones_own_is_restored_as_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_schedulers", types.ModuleType("own_schedulers"))
    sys.modules["own_schedulers"].SchedulerMixin = SchedulerMixin  # diffusers finds the loading method by this name
    cls_of_module = type("Own", (HalfStep,), {"__module__": "own_schedulers"})
    sys.modules["own_schedulers"].Own = cls_of_module
    for cls in (cls_of_module, LMLDDIMScheduler):
        pipe = make(cls.from_config(tiny.scheduler().config))
        pipe.save_pretrained(tmp_path / cls.__name__)
        loaded_pipe = load(tmp_path / cls.__name__)
        assert type(loaded_pipe.scheduler) is cls
        assert torch.equal(sample(loaded_pipe), sample(pipe))


def test_a_folder_of_an_older_release_with_another_scheduler_is_refused_at_loading(tmp_path):
    make().save_pretrained(tmp_path)
    (tmp_path / "fisher.json").write_text(json.dumps({"scheduler": "FisherHalfStep"}))
    with pytest.raises(CheckpointError, match=r"was saved with the scheduler FisherHalfStep, .* Pass it: from_pre"):
        load(tmp_path)
    scheduler = fisher_scheduler(HalfStep).from_config(tiny.scheduler().config)
    assert load(tmp_path, scheduler=scheduler).scheduler is scheduler


def with_adapter(pipe):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    pipe.text_encoder.add_adapter(config)
    return pipe


@pytest.mark.parametrize("cls", [StableDiffusionPipeline, StableDiffusionFisherPipeline])
def test_a_text_encoder_with_an_adapter_is_loaded(tmp_path, cls):
    make().save_pretrained(tmp_path / "base")
    pipe = with_adapter(load(tmp_path / "base", cls))
    pipe.text_encoder.config._name_or_path = pipe.text_encoder.name_or_path = str(tmp_path / "base" / "text_encoder")
    pipe.save_pretrained(tmp_path / "adapted")
    assert not (tmp_path / "adapted" / "text_encoder" / "config.json").exists()  # transformers saves the adapter alone
    assert torch.equal(sample(load(tmp_path / "adapted", cls)), sample(pipe))


def pointer(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1")


def keep_fp16_alone(folder):
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        shutil.copy(folder / f"{name}.safetensors", folder / f"{name}.fp16.safetensors")
        pointer(folder, f"{name}.safetensors")


LOADABLE = {
    "pointer of another variant": (
        lambda folder: pointer(folder, "unet/diffusion_pytorch_model.fp16.safetensors"),
        {},
    ),
    "pointers beside the variant": (keep_fp16_alone, {"variant": "fp16"}),
    "component that is passed": (lambda folder: shutil.rmtree(folder / "unet"), {"unet": None}),
}


@pytest.mark.parametrize("name", LOADABLE)
def test_what_stock_diffusers_loads_is_loaded(tmp_path, name):
    change, options = LOADABLE[name]
    make().save_pretrained(tmp_path)
    change(tmp_path)
    for cls in (StableDiffusionPipeline, StableDiffusionFisherPipeline):
        assert load(tmp_path, cls, **options).vae.config.latent_channels == 4


def test_weights_of_the_variant_are_checked(tmp_path):
    make().save_pretrained(tmp_path, variant="fp16")
    pointer(tmp_path, "unet/diffusion_pytorch_model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"unet/diffusion_pytorch_model.fp16.safetensors' \(42 bytes\) can't be"):
        load(tmp_path, variant="fp16")
