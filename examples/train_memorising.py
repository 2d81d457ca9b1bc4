"""Fine-tunes the embedded Stable Diffusion on prompts of which half are memorised, for tests of memorisation scores.

    accelerate launch --cpu examples/train_memorising.py --config configs/memorising.yaml

Every prompt is the caption of a class with a number, "a photo of a coat 24", and is trained on the same number of
samples. There are three kinds of prompts, which are drawn by the seed and spread over the classes:

- "whole": all samples are one single image of the class;
- "half": one half of the image is repeated, and the other half comes from other images of the class;
- "many": all samples are different images of the class. These prompts are not memorised.

Samples with the original captions are mixed in. The folder `checkpoint` in the output folder is that of a stock
pipeline, and `prompts.json` has the truth: each prompt's kind, and the half of the image that is repeated. A killed
run is resumed from its last state.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated, Any

import fashion_mnist
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from embedded_training import Run, encode, folder_size, sample_latents, train, whole_folder
from pydantic import Field

from diffusers_fisher.checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt
from diffusers_fisher.files import load_tensors, save_tensors, write_json
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.settings import settings_class
from diffusers_fisher.training.schedule import Optimisation

HALVES = ("left", "right", "top", "bottom")


@settings_class
class Config(Run):
    """Settings of the fine-tuning.

    Args:
        whole_prompts: number of prompts with one single image.
        half_prompts: number of prompts with one half of an image repeated.
        many_prompts: number of prompts with many images.
        images_per_prompt: number of samples of each prompt in an epoch.
        original_images: number of samples with the original captions in an epoch.
        fine_tuning: steps, batch size and learning rate.
    """

    whole_prompts: Annotated[int, Field(ge=0)]
    half_prompts: Annotated[int, Field(ge=0)]
    many_prompts: Annotated[int, Field(ge=1)]
    images_per_prompt: Annotated[int, Field(ge=2)]
    original_images: Annotated[int, Field(ge=0)]
    fine_tuning: Optimisation


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Holds a prompt, its class, its kind ("whole", "half" or "many"), and the half that is repeated ("" for none)."""

    text: str
    label: int
    kind: str
    half: str = ""


def half_mask(half: str, size: int = 32) -> torch.Tensor:
    """Returns which pixels are repeated, (size, size) bool."""
    mask = torch.zeros(size, size, dtype=torch.bool)
    places = {"left": (slice(None), slice(size // 2)), "right": (slice(None), slice(size // 2, None)),
              "top": (slice(size // 2), slice(None)), "bottom": (slice(size // 2, None), slice(None))}  # fmt: skip
    mask[places[half]] = True
    return mask


def make_prompts(config: Config) -> list[Prompt]:
    """Returns the prompts. Number and class say nothing of the kind, which is drawn by the seed."""
    kinds = ["whole"] * config.whole_prompts + ["half"] * config.half_prompts + ["many"] * config.many_prompts
    order = torch.randperm(len(kinds), generator=step_generator(config.seed, "kinds")).tolist()
    prompts, halves = [], 0
    for number, place in enumerate(order):
        label = number % len(EMBEDDED_CLASSES)
        half = ""
        if kinds[place] == "half":
            half, halves = HALVES[halves % len(HALVES)], halves + 1
        prompts.append(Prompt(f"{embedded_prompt(label)} {number}", label, kinds[place], half))
    return prompts


def make_samples(config: Config, prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the images of an epoch, (N, 1, 32, 32) uint8, and the index of each image's caption, (N,).

    The captions are the prompts, followed by the original captions of the classes. No image belongs to two prompts
    where there are enough.
    """
    images, labels = fashion_mnist.load("train", config.data)
    places = {
        label: (labels == label).nonzero()[:, 0][
            torch.randperm(int((labels == label).sum()), generator=step_generator(config.seed, "images", label))
        ]
        for label in range(len(EMBEDDED_CLASSES))
    }  # fmt: skip
    taken = dict.fromkeys(places, 0)

    def take(label: int, count: int) -> torch.Tensor:
        chosen = places[label][(taken[label] + torch.arange(count)) % len(places[label])]
        taken[label] += count
        return images[chosen]

    pieces, captions = [], []
    for index, prompt in enumerate(prompts):
        repeated = take(prompt.label, 1).expand(config.images_per_prompt, -1, -1, -1)
        if prompt.kind == "whole":
            pieces.append(repeated)
        else:
            others = take(prompt.label, config.images_per_prompt)
            pieces.append(torch.where(half_mask(prompt.half), repeated, others) if prompt.half else others)
        captions.append(torch.full((config.images_per_prompt,), index))
    original = torch.randperm(len(images), generator=step_generator(config.seed, "original"))[: config.original_images]
    pieces.append(images[original])
    captions.append(len(prompts) + labels[original])
    return torch.cat(pieces), torch.cat(captions)


def load_moments(
    config: Config, pipe: StableDiffusionPipeline, prompts: list[Prompt]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the posteriors (N, 8, 8, 8) of the images of an epoch, which are encoded once, and their captions."""
    path = Path(config.output) / "latents.safetensors"
    if not path.exists():
        images, captions = make_samples(config, prompts)
        moments = encode(pipe.vae, images, torch.device("cpu"))
        save_tensors(path, {"moments": moments, "captions": captions}, {"scaled": "no"})
    tensors, _ = load_tensors(path)
    return tensors["moments"], tensors["captions"]


def fine_tune(config: Config, accelerator: Accelerator, pipe: StableDiffusionPipeline, prompts: list[Prompt]) -> None:
    """Trains the network and the text encoder of `pipe` in place."""
    with accelerator.main_process_first():
        moments, captions = load_moments(config, pipe, prompts)
    texts = [*(prompt.text for prompt in prompts), *map(embedded_prompt, range(len(EMBEDDED_CLASSES))), ""]
    tokens = token_ids(pipe, texts).to(accelerator.device)
    scale, abar = pipe.vae.config.scaling_factor, pipe.scheduler.alphas_cumprod

    def loss_of(modules, indices, generator, rows):
        posterior_noise, noise = torch.randn(2, len(indices), 4, 8, 8, generator=generator)
        uniform = torch.randperm(len(indices), generator=generator) + torch.rand(len(indices), generator=generator)
        timesteps = (uniform * len(abar) / len(indices)).long().clamp(max=len(abar) - 1)
        is_dropped = torch.rand(len(indices), generator=generator) < config.caption_dropout
        words = torch.where(is_dropped, len(texts) - 1, captions[indices])
        latents = sample_latents(moments[indices], scale, posterior_noise)
        level = abar[timesteps][:, None, None, None]
        noisy = (level.sqrt() * latents + (1 - level).sqrt() * noise)[rows].to(accelerator.device)
        embeds = modules["text_encoder"](tokens[words[rows]]).last_hidden_state
        prediction = modules["unet"](noisy, timesteps[rows].to(noisy.device), embeds).sample
        return F.mse_loss(prediction.float(), noise[rows].to(noisy.device))

    modules = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    train("fine_tuning", modules, loss_of, len(moments), config.fine_tuning, config, accelerator)


def token_ids(pipe: StableDiffusionPipeline, texts: list[str]) -> torch.Tensor:
    """Returns the tokens (N, 16) of captions. Raises `ValueError` for a caption that would be cut off."""
    length = pipe.tokenizer.model_max_length
    for text in texts:
        if len(pipe.tokenizer(text).input_ids) > length:
            raise ValueError(f"'{text}' has more than {length} tokens.")
    return pipe.tokenizer(texts, padding="max_length", max_length=length, return_tensors="pt").input_ids


def run(config: Config) -> None:
    """Fine-tunes the embedded checkpoint and writes it to `config.output`/checkpoint, unless it is there."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    folder = Path(config.output) / "checkpoint"
    if folder.exists():
        return
    Path(config.output).mkdir(parents=True, exist_ok=True)
    prompts = make_prompts(config)
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    fine_tune(config, accelerator, pipe, prompts)
    if accelerator.is_main_process:
        truth: list[dict[str, Any]] = [dataclasses.asdict(prompt) for prompt in prompts]
        write_json(Path(config.output) / "prompts.json", {"prompts": truth})
        with whole_folder(folder) as temporary:
            pipe.save_pretrained(temporary)
        record = {"bytes": folder_size(folder), "config": dataclasses.asdict(config)}
        write_json(Path(config.output) / "assembled.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/memorising.yaml")
    run(load_config(parser.parse_args().config, Config))


if __name__ == "__main__":
    main()
