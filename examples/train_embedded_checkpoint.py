"""Trains the checkpoint that diffusers_fisher ships: a small Stable Diffusion on Fashion-MNIST, and a classifier.

    accelerate launch --cpu examples/train_embedded_checkpoint.py --config configs/embedded_checkpoint.yaml

The training has three stages (autoencoder, classifier, diffusion), and a killed run is resumed within its stage. The
state is one safetensors file per stage, and every random draw depends only on the seed and the step. The stock
`StableDiffusionPipeline.from_pretrained` reads the finished folder.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import fashion_mnist
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from embedded_models import (
    make_autoencoder,
    make_classifier,
    make_text_encoder,
    make_tokenizer,
    make_unet,
    save_image_processor,
)
from embedded_training import Run, encode, folder_size, sample_latents, save_latent_statistics, train, whole_folder
from transformers import AutoModelForImageClassification, CLIPTextModel, CLIPTokenizer

from diffusers_fisher.checkpoints import EMBEDDED_CLASSES, embedded_prompt
from diffusers_fisher.files import load_tensors, save_tensors, write_json
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.settings import settings_class
from diffusers_fisher.training.schedule import Optimisation


@settings_class
class Config(Run):
    kl_weight: float
    classifier: Optimisation
    autoencoder: Optimisation
    diffusion: Optimisation


def train_classifier(config: Config, accelerator: Accelerator, folder: Path) -> None:
    images, labels = fashion_mnist.load("train", config.data)

    def loss_of(modules, indices, generator, rows):
        pixels = fashion_mnist.to_rgb(images[indices])
        flip = torch.rand(len(indices), generator=generator) < 0.5
        pixels = torch.where(flip[:, None, None, None], pixels.flip(-1), pixels)
        row, column = torch.randint(-2, 3, (2,), generator=generator).tolist()
        pixels = pixels.roll((row, column), (-2, -1))[rows]
        logits = modules["classifier"](pixel_values=pixels.to(accelerator.device)).logits
        return F.cross_entropy(logits, labels[indices][rows].to(accelerator.device), label_smoothing=0.05)

    torch.manual_seed(config.seed)
    model = make_classifier()
    train("classifier", {"classifier": model}, loss_of, len(images), config.classifier, config, accelerator)
    if accelerator.is_main_process:
        with whole_folder(folder / "classifier") as temporary:
            model.save_pretrained(temporary)
            save_image_processor(temporary)


class Reconstruction(torch.nn.Module):
    """Encoding, noise and decoding as one forward pass, so that several processes average its gradients."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, pixels: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the decoded pixels and the KL of every image in nats."""
        posterior = self.autoencoder.encode(pixels).latent_dist
        return self.autoencoder.decode(posterior.mean + posterior.std * noise).sample, posterior.kl()


def train_autoencoder(config: Config, accelerator: Accelerator, folder: Path) -> None:
    images, _ = fashion_mnist.load("train", config.data)

    def loss_of(modules, indices, generator, rows):
        pixels = fashion_mnist.to_rgb(images[indices][rows]).to(accelerator.device)
        noise = torch.randn(len(indices), 4, 8, 8, generator=generator)[rows].to(accelerator.device)
        outputs, divergence = modules["autoencoder"](pixels, noise)
        return F.mse_loss(outputs.float(), pixels) + config.kl_weight * divergence.mean()

    torch.manual_seed(config.seed + 1)
    model = make_autoencoder()
    modules = {"autoencoder": Reconstruction(model)}
    train("autoencoder", modules, loss_of, len(images), config.autoencoder, config, accelerator)
    if not accelerator.is_main_process:
        return
    moments = encode(model, images, accelerator.device)
    latents = moments.chunk(2, dim=1)[0]
    model.register_to_config(scaling_factor=round(1.0 / latents.std().item(), 6))
    save_tensors(Path(config.output) / "latents.safetensors", {"moments": moments}, {"scaled": "no"})
    with whole_folder(folder / "vae") as temporary:
        model.save_pretrained(temporary)


def train_diffusion(config: Config, accelerator: Accelerator, folder: Path) -> None:
    _, labels = fashion_mnist.load("train", config.data)
    moments = load_tensors(Path(config.output) / "latents.safetensors")[0]["moments"]
    scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    tokenizer = make_tokenizer()
    prompts = [embedded_prompt(label) for label in range(len(EMBEDDED_CLASSES))]
    prompts.append("")  # stands for a dropped caption
    tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    scheduler = make_scheduler()
    abar = scheduler.alphas_cumprod

    def loss_of(modules, indices, generator, rows):
        shape = (len(indices), 4, 8, 8)
        posterior_noise, noise = torch.randn(2, *shape, generator=generator)
        # Every sample has its own part of the noise range, because the loss varies mostly with t.
        uniform = torch.randperm(len(indices), generator=generator) + torch.rand(len(indices), generator=generator)
        timesteps = (uniform * len(abar) / len(indices)).long().clamp(max=len(abar) - 1)
        is_dropped = torch.rand(len(indices), generator=generator) < config.caption_dropout
        classes = torch.where(is_dropped, len(EMBEDDED_CLASSES), labels[indices])
        latents = sample_latents(moments[indices], scale, posterior_noise)
        level = abar[timesteps][:, None, None, None]
        noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
        embeds = modules["text_encoder"](tokens.input_ids.to(accelerator.device)).last_hidden_state
        noisy = noisy[rows].to(accelerator.device, memory_format=torch.channels_last)
        prediction = modules["unet"](noisy, timesteps[rows].to(noisy.device), embeds[classes[rows]]).sample
        return F.mse_loss(prediction.float(), noise[rows].to(noisy.device))

    torch.manual_seed(config.seed + 2)
    modules = {"unet": make_unet(), "text_encoder": make_text_encoder(tokenizer)}
    train("diffusion", modules, loss_of, len(moments), config.diffusion, config, accelerator)
    if not accelerator.is_main_process:
        return
    modules["unet"].save_pretrained(folder / "unet")
    modules["text_encoder"].save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    with whole_folder(folder / "scheduler") as temporary:
        scheduler.save_pretrained(temporary)


def make_scheduler() -> DDIMScheduler:
    """Makes the schedule of Stable Diffusion."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def assemble(config: Config, folder: Path) -> None:
    """Writes the pipeline index, the latents' mean and variance, and 64 test images (7 or 6 of each class)."""
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_config(folder)  # the weights lie there already
    AutoModelForImageClassification.from_pretrained(folder / "classifier")  # must be readable by itself
    moments = load_tensors(Path(config.output) / "latents.safetensors")[0]["moments"]
    save_latent_statistics(folder, moments, pipe.vae.config.scaling_factor)
    images, labels = fashion_mnist.load("test", config.data)
    indices = torch.cat([(labels == label).nonzero()[: 7 if label < 4 else 6, 0] for label in range(10)])
    held_out = {"images": images[indices], "labels": labels[indices], "indices": indices}
    save_tensors(folder / "test_images.safetensors", held_out, {"description": "Fashion-MNIST test images, uint8"})
    record = {"bytes": folder_size(folder), "config": dataclasses.asdict(config)}
    write_json(Path(config.output) / "assembled.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/embedded_checkpoint.yaml")
    run(load_config(parser.parse_args().config, Config))


def run(config: Config) -> None:
    """Trains the stages that are not finished in the folder `config.output`, and assembles the checkpoint."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    folder = Path(config.output) / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    for folder_name, stage in (
        ("vae", train_autoencoder),
        ("classifier", train_classifier),
        ("scheduler", train_diffusion),
    ):
        if not (folder / folder_name).exists():
            stage(config, accelerator, folder)
        accelerator.wait_for_everyone()
        accelerator.free_memory()
    if accelerator.is_main_process:
        assemble(config, folder)


if __name__ == "__main__":
    main()
