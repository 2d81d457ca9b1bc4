"""The embedded checkpoint has its stated content, works in stock diffusers and transformers, and damage is noticed."""

import os
import shutil
from pathlib import Path

import fashion_mnist
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline
from transformers import AutoModelForImageClassification, CLIPTokenizer

from diffusers_fisher import (
    EMBEDDED_CLASSES,
    AutodiffFisher,
    CheckpointError,
    ClassifierReward,
    InputError,
    StableDiffusion3FisherPipeline,
    StableDiffusionFisherPipeline,
    checkpoints,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.files import load_tensors
from diffusers_fisher.jobs.pipelines import DenoiserSettings, load_pipeline

FOLDER = Path(embedded_checkpoint())
SECOND_FOLDER = FOLDER.with_name("fashion_mnist_sd3")
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def classifier():
    return ClassifierReward.from_pretrained(FOLDER / "classifier", target=0)


def test_sizes_are_within_their_limits(pipe):
    assert 10e6 < sum((FOLDER / name).stat().st_size for name in FILES) <= 30e6
    assert 1e6 < sum(parameter.numel() for parameter in pipe.unet.parameters()) <= 6e6
    assert not [name for name in FILES if not name.endswith((".json", ".safetensors"))]


def test_it_is_a_stock_stable_diffusion_pipeline(pipe):
    assert type(pipe) is StableDiffusionPipeline
    assert type(pipe.scheduler) is DDIMScheduler
    config = pipe.scheduler.config
    assert (config.prediction_type, config.beta_schedule) == ("epsilon", "scaled_linear")
    assert (config.beta_start, config.beta_end, config.num_train_timesteps) == (0.00085, 0.012, 1000)
    assert not config.clip_sample
    assert pipe.safety_checker is None
    latents = pipe("", num_inference_steps=1, output_type="latent").images
    assert latents.shape == (1, 4, 8, 8)
    assert {module.dtype for module in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert not any(module.training for module in (pipe.unet, pipe.vae, pipe.text_encoder))


def test_samples_show_the_class_of_their_prompt(pipe, classifier):
    prompts = [embedded_prompt(label) for label in range(10)]
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=15, guidance_scale=2.0, generator=generator, output_type="pt").images
    assert images.shape == (10, 3, 32, 32)
    with torch.no_grad():
        classes = classifier.logits(images).argmax(1)
    # 97% of a thousand samples of 25 steps show the class of their prompt; by chance one in ten would.
    assert int((classes == torch.arange(10)).sum()) >= 8


def test_the_trace_model_is_the_default_of_likelihoods_and_agrees_with_probes():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    assert (FOLDER / "trace_model" / "diffusion_pytorch_model.safetensors").stat().st_size <= 5e6
    assert pipe.trace_model.target == "jacobian"
    images, labels = (tensor[:12] for tensor in embedded_test_images())
    arguments = {"prompt": [embedded_prompt(label) for label in labels.tolist()], "num_inference_steps": 20}
    out = pipe.log_likelihood(images, **arguments)
    assert out.trace == "TraceMatchingFisher (target jacobian), no probes"
    assert out.num_denoiser_calls == 21 + 12  # the trace model is checked at 12 levels
    assert out.trace_check.count("agrees") >= 11  # one of 140 test images disagrees by chance
    assert 0.02 < float(out.to_bits(out.trace_error).median()) < 0.05  # its calibration
    generator = torch.Generator().manual_seed(0)
    probes = pipe.log_likelihood(images, estimator=AutodiffFisher(), num_probes=4, generator=generator, **arguments)
    difference = (out.bits_per_dim - probes.bits_per_dim).double()
    # Bits/dim: the mean is off by some 0.02, that of 12 images by 4 probes by 0.01 more; single images by 0.1 or less.
    assert difference.mean().abs() < 0.08
    assert difference.abs().max() < 0.4


def test_classes_and_captions_are_those_of_the_training():
    assert EMBEDDED_CLASSES == (
        "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
    )  # fmt: skip
    assert embedded_prompt(0) == "a photo of a t-shirt"
    assert embedded_prompt(9) == "a photo of an ankle boot"
    assert len({embedded_prompt(label) for label in range(10)}) == 10
    with pytest.raises(IndexError):
        embedded_prompt(10)


def test_every_word_of_the_captions_is_one_token(pipe):
    tokenizer = pipe.tokenizer
    assert type(tokenizer) is CLIPTokenizer
    assert len(tokenizer) < 600
    assert pipe.text_encoder.config.vocab_size == len(tokenizer)
    assert tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings == 16
    rows = set()
    for label in range(10):
        prompt = embedded_prompt(label)
        words = prompt.replace("-", " - ").split()
        pieces = tokenizer.tokenize(prompt)
        assert pieces == [word + "</w>" for word in words]
        ids = tokenizer(prompt, padding="max_length", max_length=16).input_ids
        # The start, the words and the end; CLIP pads by repeating the end.
        assert ids[: len(words) + 2] == [562, *tokenizer.convert_tokens_to_ids(pieces), 563]
        assert set(ids[len(words) + 2 :]) == {563}
        rows.add(tuple(ids))
    assert len(rows) == 10
    assert tokenizer.unk_token_id not in tokenizer.convert_tokens_to_ids(tokenizer.tokenize("zebra crossing, 3 é"))


def test_held_out_images_are_grey_and_of_all_classes():
    images, labels = embedded_test_images()
    assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.float32)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])
    assert labels.bincount().tolist() == [7, 7, 7, 7, 6, 6, 6, 6, 6, 6]
    border = images.clone()
    border[:, :, 2:-2, 2:-2] = 0
    assert not border.any()  # padded from 28x28
    assert float(images.flatten(1).std(1).min()) > 0.1
    assert len(images.flatten(1).unique(dim=0)) == 64


@pytest.mark.skipif(not Path(fashion_mnist.DEFAULT_FOLDER).is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_held_out_images_are_those_of_the_test_set():
    images, labels = fashion_mnist.load("test")
    tensors, _ = load_tensors(FOLDER / "test_images.safetensors")
    assert torch.equal(tensors["images"], images[tensors["indices"]])
    assert torch.equal(tensors["labels"], labels[tensors["indices"]])


def test_classifier_is_a_stock_model_and_mostly_right(classifier):
    model = AutoModelForImageClassification.from_pretrained(FOLDER / "classifier")
    assert [model.config.id2label[number] for number in range(10)] == list(EMBEDDED_CLASSES)
    images, labels = embedded_test_images()
    with torch.no_grad():
        right = classifier.logits(images).argmax(1) == labels
    assert classifier.image_input.size == (32, 32)
    assert int(right.sum()) >= 53  # 93% of the test images are classified right: 59 expected, with a deviation of 2


@torch.no_grad()
def test_autoencoder_keeps_the_held_out_images(pipe, classifier):
    images, labels = embedded_test_images()
    outputs = pipe.vae.decode(pipe.vae.encode(2 * images - 1).latent_dist.mode()).sample.clamp(-1, 1) / 2 + 0.5
    error = (outputs - images)[:, :, 2:-2, 2:-2].square().mean()
    assert float(-10 * error.log10()) > 26  # dB; what the checkpoint must reach on all test images
    assert int((classifier.logits(outputs).argmax(1) == labels).sum()) >= 51  # 91%, likewise


@torch.no_grad()
def test_latent_statistics_are_those_of_scaled_latents(pipe):
    statistics, _ = load_tensors(FOLDER / "latent_statistics.safetensors")
    mean, variance = statistics["mean"], statistics["variance"]
    assert mean.shape == variance.shape == (4, 8, 8)
    assert bool((variance > 0).all())
    images, _ = embedded_test_images()
    posterior = pipe.vae.encode(2 * images - 1).latent_dist
    latents = pipe.vae.config.scaling_factor * posterior.sample(torch.Generator().manual_seed(0))
    # Mean over 256 strongly dependent elements of a squared standard normal, and of a ratio of variances: 1 on
    # average. Latents without the scaling factor would give 0.8 of the variance, a wrong mean tens of squares.
    assert 0.4 < float(((latents.mean(0) - mean).square() / (variance / 64)).mean()) < 2.5
    assert 0.85 < float((latents.var(0) / variance).mean()) < 1.15
    # The scaling factor gives the posterior's means unit variance, to which its own is added (0.1). Images differ
    # from the training set's by less than the tolerance.
    posterior_variance = (pipe.vae.config.scaling_factor * posterior.std).square().mean()
    total = (variance + mean.square()).mean() - mean.mean().square()
    assert float(total - posterior_variance) == pytest.approx(1, abs=0.02)


def test_statistics_reach_the_pipeline():
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    statistics, _ = load_tensors(FOLDER / "latent_statistics.safetensors")
    assert torch.equal(pipe.latent_statistics[0], statistics["mean"])
    assert torch.equal(pipe.latent_statistics[1], statistics["variance"])


def test_unknown_names_are_refused_with_the_allowed_ones():
    assert embedded_checkpoint("sd") == embedded_checkpoint()
    with pytest.raises(InputError, match=r"`name` is 'sd2'; allowed: 'sd', 'sd3'\."):
        embedded_checkpoint("sd2")


def test_missing_files_of_the_second_checkpoint_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_FOLDER", tmp_path / "fashion_mnist")
    with pytest.raises(
        CheckpointError, match=r"fashion_mnist_sd3' lacks \['latent_statistics.safetensors', 'model_ind"
    ):
        embedded_checkpoint("sd3")


def test_the_second_checkpoint_is_a_stock_stable_diffusion_3():
    folder = embedded_checkpoint("sd3")
    assert folder == str(SECOND_FOLDER)
    stock = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    stock.set_progress_bar_config(disable=True)
    latents = stock("", num_inference_steps=1, output_type="latent").images
    assert latents.shape == (1, 4, 8, 8)
    assert bool(torch.isfinite(latents).all())
    pipe = load_pipeline(DenoiserSettings("embedded:sd3"))
    assert isinstance(pipe, StableDiffusion3FisherPipeline)
    assert pipe.text_encoder_3 is None
    assert pipe.latent_statistics is not None


@pytest.fixture
def checkpoint_copy(tmp_path, monkeypatch):
    """Puts a copy of the checkpoint in the place of the embedded one, and returns it."""
    copy = tmp_path / "fashion_mnist"
    shutil.copytree(FOLDER, copy, copy_function=os.symlink)
    monkeypatch.setattr(checkpoints, "_FOLDER", copy)
    assert embedded_checkpoint() == str(copy)
    return copy


def truncate(path):
    content = path.read_bytes()[:-20]
    path.unlink()  # the link, not what it points to
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(checkpoint_copy, name):
    (checkpoint_copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"embedded checkpoint '.*' lacks \['{name}'\]; install the package"):
        embedded_checkpoint()


@pytest.mark.parametrize("name", FILES)
def test_truncated_file_is_named(checkpoint_copy, name):
    truncate(checkpoint_copy / name)
    with pytest.raises(CheckpointError, match=rf"Checkpoint file '.*{name}'.* It may be truncated; write or download"):
        embedded_checkpoint()


@pytest.mark.parametrize("function", [embedded_test_images, embedded_checkpoint])
def test_damage_raises_before_anything_is_loaded(checkpoint_copy, function):
    truncate(checkpoint_copy / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model.safetensors' \(\d+ bytes\) can't be read"):
        function()


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "model_index.json"])
@pytest.mark.parametrize("damage", [Path.unlink, truncate], ids=["missing", "truncated"])
def test_damaged_folder_is_refused_by_the_pipeline(checkpoint_copy, name, damage):
    damage(checkpoint_copy / name)
    with pytest.raises(CheckpointError, match=str(checkpoint_copy)):
        StableDiffusionFisherPipeline.from_pretrained(checkpoint_copy)
