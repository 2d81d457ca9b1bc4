"""Distils the embedded Stable Diffusion to a consistency model of 1 to 4 steps, for LCMScheduler.

    accelerate launch --cpu examples/train_student.py --config configs/embedded_student.yaml

This is latent consistency distillation (Luo et al., 2310.04378): f(x_t) = c_skip(t) x_t + c_out(t) x_0(x_t) is to be
the same at both ends of a DDIM step of the teacher, whose guidance scale is fixed. The student begins as the teacher.
The stock pipeline reads the finished folder and samples it without guidance:

    pipe = StableDiffusionPipeline.from_pretrained("outputs/embedded_student/checkpoint")
    pipe("a photo of a bag", num_inference_steps=4, guidance_scale=1.0)

A killed run is resumed from its last state. It takes half an hour on one core.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Annotated

import fashion_mnist
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from embedded_training import Run, encode, folder_size, sample_latents, train, whole_folder
from pydantic import Field

from diffusers_fisher.checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt
from diffusers_fisher.files import write_json
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.settings import settings_class
from diffusers_fisher.training.schedule import Optimisation


@settings_class
class Config(Run):
    """Settings of the distillation.

    Args:
        guidance_scale: that of the teacher.
        solver_steps: number of DDIM steps of the teacher over the whole schedule.
        distillation: steps, batch size and learning rate.
    """

    guidance_scale: float
    solver_steps: Annotated[int, Field(ge=2)]
    distillation: Optimisation


def consistency(
    scheduler: LCMScheduler, epsilon: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Returns f(x_t) (N, ...) as `LCMScheduler` computes it, at one timestep per sample."""
    level = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    skip, out = scheduler.get_scalings_for_boundary_condition_discrete(timesteps.view(-1, 1, 1, 1).double())
    original = (x - (1 - level).sqrt() * epsilon) / level.sqrt()
    return skip.float() * x + out.float() * original


class Teacher:
    """Steps of the guided teacher by DDIM, from one timestep of its grid to the one before."""

    def __init__(self, pipe: StableDiffusionPipeline, config: Config):
        self.unet, self.scale = pipe.unet.eval().requires_grad_(False), config.guidance_scale
        self.alphas = DDIMScheduler.from_config(pipe.scheduler.config).alphas_cumprod
        spacing = len(self.alphas) // config.solver_steps
        self.grid = torch.arange(1, config.solver_steps + 1) * spacing - 1  # as LCMScheduler's original steps

    @torch.no_grad()
    def step(self, x: torch.Tensor, places: torch.Tensor, embeds: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
        """Returns x (N, ...) at the timestep before `grid[places]`; that before the first is 0."""
        timesteps, before = self.grid[places], self.before(places)
        both = self.unet(x.repeat(2, 1, 1, 1), timesteps.repeat(2), torch.cat([empty, embeds])).sample
        unconditional, conditional = both.chunk(2)
        epsilon = unconditional + self.scale * (conditional - unconditional)
        here, there = (self.alphas[t].view(-1, 1, 1, 1) for t in (timesteps, before))
        original = (x - (1 - here).sqrt() * epsilon) / here.sqrt()
        return there.sqrt() * original + (1 - there).sqrt() * epsilon

    def before(self, places: torch.Tensor) -> torch.Tensor:
        return torch.where(places > 0, self.grid[(places - 1).clamp_min(0)], 0)


def load_teacher() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.text_encoder.requires_grad_(False)
    return pipe


def distil(config: Config, accelerator: Accelerator, student: UNet2DConditionModel) -> None:
    """Trains `student` in place; the target's side has no gradient."""
    images, labels = fashion_mnist.load("train", config.data)
    pipe = load_teacher()
    moments, scale = encode(pipe.vae, images, torch.device("cpu")), pipe.vae.config.scaling_factor
    teacher, scheduler = Teacher(pipe, config), LCMScheduler.from_config(pipe.scheduler.config)
    prompts = [*(embedded_prompt(label) for label in range(len(EMBEDDED_CLASSES))), ""]
    words = pipe.tokenizer(
        prompts, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt"
    )
    embeds = pipe.text_encoder(words.input_ids).last_hidden_state.detach()

    def loss_of(modules, indices, generator, rows):
        posterior_noise, noise = torch.randn(2, len(indices), 4, 8, 8, generator=generator)
        places = torch.randint(len(teacher.grid), (len(indices),), generator=generator)[rows]
        latents = sample_latents(moments[indices], scale, posterior_noise)[rows]
        timesteps, classes = teacher.grid[places], labels[indices][rows]
        level = teacher.alphas[timesteps].view(-1, 1, 1, 1)
        x = level.sqrt() * latents + (1 - level).sqrt() * noise[rows]
        condition, empty = embeds[classes], embeds[-1:].expand(len(classes), -1, -1)
        x_before, before = teacher.step(x, places, condition, empty), teacher.before(places)
        output = consistency(scheduler, modules["student"](x, timesteps, condition).sample, x, timesteps)
        with torch.no_grad():
            target = modules["student"](x_before, before, condition).sample
            target = consistency(scheduler, target, x_before, before)
        return ((output - target).square() + 1e-3).sqrt().mean()  # pseudo-Huber

    train("distillation", {"student": student}, loss_of, len(labels), config.distillation, config, accelerator)


def run(config: Config) -> None:
    """Trains the student and writes it to `config.output`/checkpoint, unless it is there."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    folder = Path(config.output) / "checkpoint"
    if folder.exists():
        return
    Path(config.output).mkdir(parents=True, exist_ok=True)
    pipe = load_teacher()
    distil(config, accelerator, pipe.unet)
    if accelerator.is_main_process:
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        with whole_folder(folder) as temporary:
            pipe.save_pretrained(temporary)
        record = {"bytes": folder_size(folder), "config": dataclasses.asdict(config)}
        write_json(Path(config.output) / "assembled.json", record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/embedded_student.yaml")
    run(load_config(parser.parse_args().config, Config))


if __name__ == "__main__":
    main()
