"""Digests of pipelines and images change with everything that numbers depend on, and with nothing else."""

import json

import datasets
import numpy
import pytest
import tiny
import torch
from image_folders import image_folder
from PIL import Image
from trace_cases import GaussianData

from diffusers_fisher import StableDiffusionFisherPipeline
from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.jobs.identity import images_digest, pipeline_digests


def make():
    pipe = tiny.stable_diffusion(StableDiffusionFisherPipeline)
    pipe.trace_model = GaussianData((4, 8, 8)).model()
    pipe.latent_statistics = torch.zeros(4, 8, 8), torch.ones(4, 8, 8)
    return pipe


def add(parameter):
    with torch.no_grad():
        parameter.add_(1e-3)


def other_tokenizer(pipe):
    pipe.tokenizer.add_tokens(["ab"])


@pytest.mark.parametrize(
    ("change", "name"),
    {
        "denoiser": (lambda pipe: add(pipe.unet.conv_out.bias), "weights"),
        "text encoder": (lambda pipe: add(next(pipe.text_encoder.parameters())), "weights"),
        "trace model": (lambda pipe: add(next(pipe.trace_model.parameters())), "weights"),
        "mean": (lambda pipe: pipe.latent_statistics[0].add_(0.1), "weights"),
        "variance": (lambda pipe: pipe.latent_statistics[1].mul_(2), "weights"),
        "no statistics": (lambda pipe: setattr(pipe, "latent_statistics", None), "weights"),
        "schedule": (lambda pipe: pipe.scheduler.register_to_config(beta_end=0.02), "configuration"),
        "latent scale": (lambda pipe: pipe.vae.register_to_config(scaling_factor=0.2), "configuration"),
        "latent shift": (lambda pipe: pipe.vae.register_to_config(shift_factor=0.1), "configuration"),
        "tokenizer": (other_tokenizer, "configuration"),
    }.values(),
)
def test_a_change_of_the_pipeline_changes_one_digest(change, name):
    pipe = make()
    before = pipeline_digests(pipe)
    change(pipe)
    after = pipeline_digests(pipe)
    assert {key for key in before if before[key] != after[key]} == {name}


def test_folder_and_calls_of_a_pipeline_do_not_change_its_digests(tmp_path):
    pipe = make()
    pipe.save_pretrained(tmp_path / "a")
    pipe.save_pretrained(tmp_path / "b")
    pipes = [StableDiffusionFisherPipeline.from_pretrained(tmp_path / name) for name in ("a", "b")]
    first, second = (pipeline_digests(each) for each in pipes)
    assert first == second
    tiny.quiet(pipes[0])(["a", "b c d"], num_inference_steps=1, output_type="latent")
    assert pipeline_digests(pipes[0]) == first


def captions(folder, change):
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    lines[2]["text"] = change
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def another_picture(folder, number):
    """Replaces a picture by an uncompressed file, which always has the same size in bytes."""
    pixels = numpy.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=numpy.uint8)
    Image.fromarray(pixels).save(folder / "train-2.png", format="BMP")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: captions(folder, "another"),
        lambda folder: captions(folder, None),
        lambda folder: another_picture(folder, 2),
        lambda folder: image_folder(folder, count=13),
        lambda folder: image_folder(folder, size=(8, 8)),
    ],
    ids=["caption", "no caption", "picture", "count", "sizes"],
)
def test_a_change_of_the_images_changes_their_digest(tmp_path, change, streaming):
    data = ImageData(str(image_folder(tmp_path / "images")), caption_column="text", streaming=streaming)
    another_picture(tmp_path / "images", 1)
    before = images_digest(open_images(data))
    assert before == images_digest(open_images(data))
    assert before.startswith("the first 12, sha256 " if streaming else "12, sha256 ")
    change(tmp_path / "images")
    assert images_digest(open_images(data)) != before


def test_datasets_whose_images_have_no_files_have_different_digests(tmp_path):
    def digest(shade):
        pictures = [Image.new("RGB", (8, 8), (shade, 0, number)) for number in range(3)]
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": pictures}, features=features).save_to_disk(tmp_path / str(shade))
        return images_digest(open_images(ImageData(str(tmp_path / str(shade)))))

    assert digest(1) != digest(2)
