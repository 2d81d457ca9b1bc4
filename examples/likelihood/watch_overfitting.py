"""Does an adapter overfit? A LoRA is trained on a handful of images, and held-out images tell when to stop.

    python examples/likelihood/watch_overfitting.py

The LoRA of the embedded checkpoint learns the first test images (no test image was in the checkpoint's own training).
A `HeldOutLikelihood` in the training loop prints bits/dim of these images and of others, by the same random directions
at every step: the former become likelier and the latter less likely. --output gets a picture and the figures as JSON.
The example needs peft (`pip install 'diffusers_fisher[dev]'`) and takes two to three minutes on one slow core.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from diffusers_fisher import (
    HeldOutLikelihood,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.figures import make_figure
from diffusers_fisher.files import write_json
from diffusers_fisher.likelihood.held_out import HeldOutRecord

RANK, RATE, DRAWS = 16, 1e-3, 4  # rank of the LoRA, learning rate, noises per image and step
LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def train(steps: int, every: int, num_training: int, num_held_out: int, **options: Any) -> list[HeldOutRecord]:
    """Trains a LoRA on the first `num_training` test images, and returns the likelihoods at every `every` steps.

    Args:
        num_held_out: number of test images, after the training images, that are held out.
        **options: options of `HeldOutLikelihood`.
    """
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = embedded_test_images()
    prompts = [embedded_prompt(int(label)) for label in labels]
    end = num_training + num_held_out
    callback = HeldOutLikelihood(
        images[num_training:end], prompts[num_training:end], pipe=pipe, every=every,
        training_images=images[:num_training], training_prompts=prompts[:num_training], sample_latents=True, **options,
    )  # fmt: skip
    mean, deviation = backbone_of(pipe).posterior_of(images[:num_training])
    with torch.no_grad():
        hidden = pipe.encode_prompt(prompts[:num_training], "cpu", 1, False)[0].repeat(DRAWS, 1, 1)
    torch.manual_seed(0)
    pipe.unet.requires_grad_(False)
    pipe.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    weights = [parameter for parameter in pipe.unet.parameters() if parameter.requires_grad]
    optimizer, generator = torch.optim.AdamW(weights, RATE), torch.Generator().manual_seed(0)
    pipe.unet.train()
    for step in range(steps + 1):
        callback(step, pipe)
        clean, spread = (tensor.repeat(DRAWS, 1, 1, 1) for tensor in (mean, deviation))
        clean = clean + spread * torch.randn(clean.shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(clean),), generator=generator)
        noised = pipe.scheduler.add_noise(clean, noise, timesteps)
        loss = (pipe.unet(noised, timesteps, hidden).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return callback.history


def figures(records: list[HeldOutRecord]) -> dict[str, Any]:
    """Returns bits/dim by step, with the errors of the changes since the first step."""
    rows: dict[str, Any] = {"steps": [record.step for record in records]}
    for name in ("held_out", "training"):
        sets = [getattr(record, name) for record in records]
        rows[name] = {
            "bits_per_dim": [each.mean for each in sets], "change": [each.mean_change for each in sets],
            "standard_error_of_change": [each.change_error for each in sets],
        }  # fmt: skip
    return rows


def draw(rows: dict[str, Any], path: Path) -> None:
    """Draws the changes since the first step, with bars of one standard error over the images."""
    figure, (axes,) = make_figure(5.5, 3.5)
    for name, label in (("held_out", "held-out images"), ("training", "training images")):
        changes, errors = rows[name]["change"], rows[name]["standard_error_of_change"]
        errors = [error if math.isfinite(error) else 0.0 for error in errors]
        axes.errorbar(rows["steps"], changes, errors, label=label, marker="o", capsize=3)
    axes.axhline(0, color="0.7", linewidth=1, zorder=0)
    axes.set(xlabel="training step of the LoRA", ylabel="change of bits/dim (lower is likelier)")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--training-images", type=int, default=8)
    parser.add_argument("--held-out-images", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("outputs/watch_overfitting"))
    arguments = parser.parse_args()
    records = train(arguments.steps, arguments.every, arguments.training_images, arguments.held_out_images)
    rows = figures(records)
    write_json(arguments.output / "watch_overfitting.json", rows)
    draw(rows, arguments.output / "watch_overfitting.png")


if __name__ == "__main__":
    main()
