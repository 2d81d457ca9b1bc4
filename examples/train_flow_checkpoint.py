"""Trains the second checkpoint that diffusers_fisher ships: a small Stable Diffusion 3 on Fashion-MNIST.

    accelerate launch --cpu examples/train_flow_checkpoint.py --config configs/embedded_checkpoint_sd3.yaml

The autoencoder is that of the first checkpoint. A killed run is resumed from its last state, and every random
draw depends only on the seed and the step. The stock `StableDiffusion3Pipeline.from_pretrained(folder,
text_encoder_3=None, tokenizer_3=None)` reads the finished folder `checkpoint` in the output folder. The index has both
components as null, but diffusers requires them, for they are not among the `_optional_components` of this pipeline.
`--snapshot FOLDER` writes such a folder from the last state of a training that still runs.
"""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Annotated

import fashion_mnist
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from embedded_models import make_autoencoder, make_pooled_text_encoders, make_tokenizer, make_transformer
from embedded_training import (
    Run,
    encode,
    folder_size,
    load_averages,
    sample_latents,
    save_latent_statistics,
    train,
    whole_folder,
)
from pydantic import Field
from torch.overrides import TorchFunctionMode

from diffusers_fisher.checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt
from diffusers_fisher.files import load_tensors, read_json, save_tensors, write_json
from diffusers_fisher.jobs.config import load_config
from diffusers_fisher.settings import Fraction, settings_class
from diffusers_fisher.training.schedule import Optimisation

EMPTY_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`: the number of zero tokens that stand for the missing T5 encoder."""


@settings_class
class Config(Run):
    """Settings of the training.

    Args:
        uniform_share: share of the noise levels that are uniform in (0, 1). The others are logit-normal.
        logit_mean: mean of log(s / (1 - s)) of the logit-normal levels s.
        logit_std: standard deviation of the same.
        diffusion: steps, batch size and learning rate.
    """

    uniform_share: Fraction
    logit_mean: float
    logit_std: Annotated[float, Field(gt=0)]
    diffusion: Optimisation


class RepeatedLastToken(TorchFunctionMode):
    """Makes the last key of every attention count as `count` equal keys.

    Equal context tokens stay equal through all layers, since a context has no positions. So one zero token in this
    mode gives exactly the function that the network is with `count` of them, many times faster.
    """

    def __init__(self, count: int):
        super().__init__()
        self.logit = math.log(count)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key = args[:2]
            logits = query.new_zeros(query.shape[-2], key.shape[-2])
            logits[:, -1] = self.logit
            kwargs = {**kwargs, "attn_mask": logits}
        return func(*args, **kwargs)


def load_autoencoder() -> AutoencoderKL:
    """Returns the first checkpoint's autoencoder, with the shift that `StableDiffusion3Pipeline` adds."""
    folder = Path(embedded_checkpoint()) / "vae"
    model = make_autoencoder()  # rather than `from_pretrained`, which keeps the folder's name in the configuration
    model.load_state_dict(load_tensors(folder / "diffusion_pytorch_model.safetensors")[0])
    model.register_to_config(scaling_factor=read_json(folder / "config.json")["scaling_factor"], shift_factor=0.0)
    return model.eval()


def load_moments(config: Config, accelerator: Accelerator) -> torch.Tensor:
    """Returns the posteriors (N, 8, 8, 8) of the training images, which are encoded once."""
    path = Path(config.output) / "latents.safetensors"
    if accelerator.is_main_process and not path.exists():
        images, _ = fashion_mnist.load("train", config.data)
        moments = encode(load_autoencoder().to(accelerator.device), images, accelerator.device)
        save_tensors(path, {"moments": moments}, {"scaled": "no"})
    accelerator.wait_for_everyone()
    return load_tensors(path)[0]["moments"]


def make_modules(seed: int) -> dict[str, torch.nn.Module]:
    """Returns the networks that are trained, by their names in the pipeline, with weights that depend on the seed."""
    torch.manual_seed(seed)
    first, second = make_pooled_text_encoders(make_tokenizer())
    return {"transformer": make_transformer(), "text_encoder": first, "text_encoder_2": second}


def noise_levels(count: int, config: Config, generator: torch.Generator) -> torch.Tensor:
    """Returns levels s (count,) between 0 (data) and 1 (noise). Every uniform and every logit-normal level has its own
    part of the distribution, because the loss varies mostly with s."""
    uniform = round(config.uniform_share * count)
    levels = []
    for size in (uniform, count - uniform):
        strata = torch.randperm(size, generator=generator) + torch.rand(size, generator=generator)
        levels.append(strata / max(size, 1))
    levels[1] = torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(levels[1]))
    return torch.cat(levels)[torch.randperm(count, generator=generator)]


def encode_prompts(
    modules: dict[str, torch.nn.Module], tokens: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the prompt embeddings (N, 17, width), with one zero token for T5, and the pooled embeddings (N, 160)."""
    outputs = [modules[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    padded = F.pad(embeds, (0, width - embeds.shape[-1], 0, 1))
    return padded, torch.cat([output.text_embeds for output in outputs], dim=-1)


def train_diffusion(config: Config, accelerator: Accelerator, modules: dict[str, torch.nn.Module]) -> None:
    """Trains `modules` in place by flow matching: x = (1 - s) latents + s noise, target noise - latents."""
    _, labels = fashion_mnist.load("train", config.data)
    moments = load_moments(config, accelerator)
    scale = load_autoencoder().config.scaling_factor
    width = modules["transformer"].config.joint_attention_dim
    tokenizer = make_tokenizer()
    prompts = [embedded_prompt(label) for label in range(len(EMBEDDED_CLASSES))]
    prompts.append("")  # stands for a dropped caption
    tokens = tokenizer(prompts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")

    def loss_of(modules, indices, generator, rows):
        posterior_noise, noise = torch.randn(2, len(indices), 4, 8, 8, generator=generator)
        levels = noise_levels(len(indices), config, generator)
        is_dropped = torch.rand(len(indices), generator=generator) < config.caption_dropout
        classes = torch.where(is_dropped, len(EMBEDDED_CLASSES), labels[indices])[rows]
        latents = sample_latents(moments[indices], scale, posterior_noise)
        s = levels[:, None, None, None]
        noisy = ((1 - s) * latents + s * noise)[rows].to(accelerator.device)
        embeds, pooled = encode_prompts(modules, tokens.input_ids.to(accelerator.device), width)
        timesteps = (1000 * levels[rows]).to(accelerator.device)
        with RepeatedLastToken(EMPTY_TOKENS):
            prediction = modules["transformer"](noisy, embeds[classes], pooled[classes], timesteps).sample
        return F.mse_loss(prediction.float(), (noise - latents)[rows].to(accelerator.device))

    train("diffusion", modules, loss_of, len(moments), config.diffusion, config, accelerator)


def save_checkpoint(config: Config, modules: dict[str, torch.nn.Module], folder: Path) -> None:
    """Writes the pipeline and the statistics of the latents."""
    pipe = StableDiffusion3Pipeline(
        **modules,
        vae=load_autoencoder(),
        tokenizer=make_tokenizer(),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    moments = load_tensors(Path(config.output) / "latents.safetensors")[0]["moments"]
    with whole_folder(folder) as temporary:
        pipe.save_pretrained(temporary)
        save_latent_statistics(temporary, moments, pipe.vae.config.scaling_factor)


def run(config: Config) -> None:
    """Trains the networks and writes the checkpoint to the folder `config.output`, unless a checkpoint is there."""
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    folder = Path(config.output) / "checkpoint"
    if folder.exists():
        return
    Path(config.output).mkdir(parents=True, exist_ok=True)
    modules = make_modules(config.seed)
    train_diffusion(config, accelerator, modules)
    if accelerator.is_main_process:
        save_checkpoint(config, modules, folder)
        record = {"bytes": folder_size(folder), "config": dataclasses.asdict(config)}
        write_json(Path(config.output) / "assembled.json", record)


def snapshot(config: Config, folder: Path) -> int:
    """Writes a checkpoint from the averages of the last state of a training, and returns the state's step."""
    modules = make_modules(config.seed)
    step = load_averages(Path(config.output) / "diffusion_state.safetensors", modules)
    save_checkpoint(config, modules, folder)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/embedded_checkpoint_sd3.yaml")
    parser.add_argument("--snapshot", type=Path, help="folder for a checkpoint from the last state, without training")
    arguments = parser.parse_args()
    config = load_config(arguments.config, Config)
    if arguments.snapshot:
        print(f"{arguments.snapshot}: step {snapshot(config, arguments.snapshot)} of {config.diffusion.steps}")
    else:
        run(config)


if __name__ == "__main__":
    main()
