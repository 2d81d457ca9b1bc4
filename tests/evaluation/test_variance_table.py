"""`diffusers-fisher fit-variance` writes a scheduler that `from_pretrained` reads."""

import json

import image_folders
import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from diffusers_fisher import (
    InputError,
    LevelFisher,
    OptimalVarianceDDPMScheduler,
    OptimalVarianceFlowMatchScheduler,
    optimal_variance_scheduler,
)
from diffusers_fisher.data import ImageData
from diffusers_fisher.evaluation.variance_table import VarianceSettings, fit_variance
from diffusers_fisher.jobs.pipelines import DenoiserSettings

TABLE = LevelFisher(torch.tensor([0.1, 1.0]), torch.tensor([0.9, 0.2]))


def settings(folder, **changes):
    data = ImageData(path=str(folder), limit=changes.pop("limit", 3), resolution=changes.pop("resolution", 32))
    return VarianceSettings(DenoiserSettings(path="embedded"), data, **{"num_levels": 4, **changes})


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folders.image_folder(tmp_path_factory.mktemp("images"), 5, (32, 32), corrupt=(1,))


def test_a_table_is_written_that_does_not_depend_on_the_batch(images, tmp_path):
    first = fit_variance(tmp_path / "a", settings(images), batch_size=3)
    second = fit_variance(tmp_path / "b", settings(images), batch_size=2)
    assert first["images"] == 2 and first["images_left_out"] == 1 and len(first["noise_to_signal"]) == 4
    assert first["unexplained_noise_fraction"] == pytest.approx(second["unexplained_noise_fraction"], rel=1e-4)
    assert all(0 < value < 1.5 for value in first["unexplained_noise_fraction"])
    assert json.loads((tmp_path / "a" / "variance.json").read_text())["scheduler"] == "OptimalVarianceDDPMScheduler"
    scheduler = OptimalVarianceDDPMScheduler.from_pretrained(tmp_path / "a")
    assert scheduler.config.unexplained_noise_fraction == pytest.approx(first["unexplained_noise_fraction"])
    assert scheduler.config.beta_schedule == "scaled_linear"  # of the pipeline's own scheduler


def test_unreadable_images_are_left_out_and_several_sizes_are_refused(images, tmp_path):
    everything = fit_variance(tmp_path / "a", settings(images, limit=5), batch_size=5)
    assert (everything["images"], everything["images_left_out"]) == (4, 1)
    image_folders.image_folder(tmp_path / "images", 2, (32, 32))
    Image.new("RGB", (48, 32)).save(tmp_path / "images" / "train-1.png")
    with pytest.raises(InputError, match=r"The images have several sizes: \[\(32, 32\), \(32, 48\)\]. Set"):
        fit_variance(tmp_path / "b", settings(tmp_path / "images", resolution=None), batch_size=2)
    with pytest.raises(InputError, match="`batch_size` is 0; allowed: at least 1"):
        fit_variance(tmp_path / "c", settings(images), batch_size=0)


@pytest.mark.parametrize(
    ("pipe", "expected"),
    [
        (tiny.stable_diffusion(StableDiffusionPipeline), OptimalVarianceDDPMScheduler),
        (tiny.stable_diffusion_3(StableDiffusion3Pipeline), OptimalVarianceFlowMatchScheduler),
    ],
    ids=["diffusion", "flow"],
)
def test_the_scheduler_s_class_follows_the_noise_schedule(pipe, expected):
    scheduler = optimal_variance_scheduler(pipe.scheduler, TABLE)
    assert type(scheduler) is expected
    assert scheduler.config.noise_to_signal == TABLE.noise_to_signal.tolist()
