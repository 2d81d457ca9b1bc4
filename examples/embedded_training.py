"""Parts that the trainings of both embedded checkpoints share: the loop, the latents and the statistics."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fashion_mnist
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_fisher import GaussianFisher, NumericalError
from diffusers_fisher.files import load_tensors, save_tensors
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.settings import settings_class
from diffusers_fisher.training.schedule import Optimisation, batch_indices, learning_rates
from diffusers_fisher.training.state import load_training_state, save_training_state


@settings_class
class Run:
    """Settings that every training has.

    Args:
        seed: seed of every random draw, together with the step.
        data: folder with the IDX files of Fashion-MNIST.
        output: folder for the states, the losses and the finished checkpoint.
        mixed_precision: as `Accelerator` takes it.
        caption_dropout: share of samples whose caption is empty.
    """

    seed: int
    data: str
    output: str
    mixed_precision: str
    caption_dropout: float


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new folder that replaces `path` when the block succeeds. A killed run leaves a whole folder or none."""
    temporary = path.with_name(f".{path.name}")
    for folder in (temporary, path):
        shutil.rmtree(folder, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.replace(path)


def train(
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_of: Callable[[dict[str, torch.nn.Module], torch.Tensor, torch.Generator, slice], torch.Tensor],
    count: int,
    stage: Optimisation,
    config: Run,
    accelerator: Accelerator,
) -> None:
    """Trains `modules` in place. `loss_of(modules, indices, generator, rows)` gives the mean loss over the slice
    `rows` of the global batch. It makes all random draws for the whole batch, so that the number of processes
    changes only the statistics of batch normalisation."""
    path = Path(config.output) / f"{name}_state.safetensors"
    for module in modules.values():
        module.train().to(accelerator.device, memory_format=torch.channels_last)
    parameters = [p for module in modules.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=stage.weight_decay, fused=True)
    average = EMAModel(parameters, decay=stage.ema_decay) if stage.ema_decay else None
    shadow = average.shadow_params if average else []
    start = load_training_state(path, modules, optimizer, shadow)
    if average:
        average.optimization_step = start
    prepared_modules = {key: accelerator.prepare(module) for key, module in modules.items()}
    optimizer = accelerator.prepare(optimizer)
    rates = learning_rates(optimizer.optimizer, stage, start)
    share = stage.batch_size // accelerator.num_processes
    rows = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    log = Path(config.output) / f"{name}_loss.jsonl"
    quiet = not accelerator.is_main_process
    progress = tqdm(range(start, stage.steps), name, stage.steps, initial=start, disable=quiet)
    losses: list[float] = []
    for step in progress:
        indices = batch_indices(count, stage, step, config.seed)
        with accelerator.autocast():
            loss = loss_of(prepared_modules, indices, step_generator(config.seed, name, step), rows)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
        if average:
            average.step(parameters)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise NumericalError(f"{name}: loss is not finite at step {step}; the last good state is '{path}'.")
        if (step + 1) % 100 == 0 and accelerator.is_main_process:
            mean = sum(losses) / len(losses)  # after a resumption these are fewer than 100
            progress.set_postfix(loss=f"{mean:.4f}")
            with log.open("a") as file:
                file.write(json.dumps({"step": step + 1, "loss": mean}) + "\n")
            losses.clear()
        if ((step + 1) % stage.save_every == 0 or step + 1 == stage.steps) and accelerator.is_main_process:
            save_training_state(path, modules, optimizer.optimizer, shadow, step + 1)
    if average:
        average.copy_to(parameters)
    for module in modules.values():
        module.eval()


def load_averages(path: Path, modules: dict[str, torch.nn.Module]) -> int:
    """Sets the parameters of `modules` to the moving averages of a state that `train` wrote, and returns its step."""
    tensors, metadata = load_tensors(path)
    parameters = [parameter for module in modules.values() for parameter in module.parameters()]
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"average.{index}"])
    for module in modules.values():
        module.eval()
    return int(metadata["step"])


@torch.no_grad()
def encode(model: AutoencoderKL, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns the posterior mean and log variance (N, 8, 8, 8) of every image, before scaling."""
    pieces = []
    for piece in tqdm(images.split(500), "encode"):
        pieces.append(model.encode(fashion_mnist.to_rgb(piece).to(device)).latent_dist.parameters.cpu())
    return torch.cat(pieces)


def sample_latents(moments: torch.Tensor, scale: float, noise: torch.Tensor) -> torch.Tensor:
    """Returns scaled latents (N, 4, 8, 8) drawn with `noise` (N, 4, 8, 8) from the posteriors `moments`
    (N, 8, 8, 8)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return scale * (mean + (0.5 * log_variance).exp() * noise)


def save_latent_statistics(folder: Path, moments: torch.Tensor, scale: float) -> None:
    """Writes mean, variance and spectrum (4, 8, 8) of the scaled latents to `latent_statistics.safetensors`.

    The spectrum are the variances of the coefficients of the discrete cosine transform, from one draw of each latent.
    """
    mean, log_variance = moments.double().chunk(2, dim=1)
    total_variance = mean.var(dim=0) + log_variance.exp().mean(dim=0)
    draws = sample_latents(moments, scale, torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
    spectrum = GaussianFisher.fit_diagonal(draws, dct=True).covariance.variances.view(mean.shape[1:])
    statistics = {
        "mean": (scale * mean.mean(dim=0)).float(), "variance": (scale**2 * total_variance).float(),
        "spectrum": spectrum.float(),
    }  # fmt: skip
    description = f"mean, variance and spectrum (4, 8, 8) of scaled latents over the {len(moments):,} training images"
    save_tensors(folder / "latent_statistics.safetensors", statistics, {"description": description})


def folder_size(folder: Path) -> int:
    """Returns the bytes of all files in `folder`."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
