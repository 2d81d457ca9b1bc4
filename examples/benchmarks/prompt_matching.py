"""Which of ten prompts fits a test image? Log-likelihoods beside the squared-error diffusion classifier.

python examples/benchmarks/prompt_matching.py

Each method takes the same number of denoiser calls a prompt, on the embedded checkpoint:

- "likelihood": `compare_likelihood(method="ode")`, the probability-flow ODE;
- "weighted squared error": `compare_likelihood(method="squared error")`, squared errors weighted to a log-likelihood;
- "diffusion classifier": the plain mean of squared errors at evenly spaced timesteps with the same noise for all
  prompts (Li et al., 2303.16203).

Needs Fashion-MNIST (see examples/fashion_mnist.py). Writes prompt_matching.json. Long on one core; records are kept
in --output and taken up again.
"""

import argparse
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, save
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification

from diffusers_fisher import (
    CoarseGridWarning,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
)
from diffusers_fisher.evaluation.digests import pipeline_digests
from diffusers_fisher.evaluation.records import Records
from diffusers_fisher.guidance import ImageInput
from diffusers_fisher.training.state import step_generator

sys.path.insert(0, str(FOLDER.parent))
import fashion_mnist

IMAGES = 2000
BATCH = 50
CALLS = (10,)  # of the denoiser, a prompt
PROMPTS = [embedded_prompt(label) for label in range(10)]


def likelihood(pipe: Any, latents: torch.Tensor, calls: int, generator: torch.Generator) -> torch.Tensor:
    """Scores (10, B), higher for the prompt that fits."""
    options = {"num_inference_steps": calls - 1, "generator": generator}
    return _counted(pipe.compare_likelihood(None, PROMPTS, latents=latents, method="ode", **options), calls)


def weighted_squared_error(pipe: Any, latents: torch.Tensor, calls: int, generator: torch.Generator) -> torch.Tensor:
    """Scores (10, B), higher for the prompt that fits."""
    options = {"num_levels": calls, "generator": generator}
    return _counted(pipe.compare_likelihood(None, PROMPTS, latents=latents, method="squared error", **options), calls)


@torch.no_grad()
def diffusion_classifier(pipe: Any, latents: torch.Tensor, calls: int, generator: torch.Generator) -> torch.Tensor:
    """Scores (10, B), higher for the prompt that fits."""
    count = pipe.scheduler.config.num_train_timesteps
    timesteps = ((torch.arange(calls) + 0.5) * count / calls).long().tolist()
    noises = [torch.randn(latents.shape, generator=generator) for _ in timesteps]
    scores = []
    for prompt in PROMPTS:
        denoiser = PipelineDenoiser(pipe, prompt=[prompt] * len(latents))
        errors = torch.zeros(len(latents), dtype=torch.float64)
        for timestep, noise in zip(timesteps, noises, strict=True):
            level = denoiser.level(torch.tensor(timestep))
            noised = (level.alpha * latents + level.sigma * noise).float()
            errors += (denoiser(noised, timestep) - noise).double().square().flatten(1).mean(1)
        scores.append(-errors / calls)
    return torch.stack(scores)


METHODS: dict[str, Callable[[Any, torch.Tensor, int, torch.Generator], torch.Tensor]] = {
    "likelihood": likelihood,
    "weighted squared error": weighted_squared_error,
    "diffusion classifier": diffusion_classifier,
}


def _counted(table: Any, calls: int) -> torch.Tensor:
    if table.num_denoiser_calls != calls * len(PROMPTS):
        raise RuntimeError(f"{table.num_denoiser_calls} denoiser calls for {len(PROMPTS)} prompts, not {calls} each.")
    return table.log_prob


def measure(pipe: Any, count: int, folder: Path) -> dict[str, dict[str, list[int]]]:
    """The prompt that each method chooses for every image, by method and calls."""
    images, _ = fashion_mnist.load("test")
    records = Records(folder, {"images": count, **pipeline_digests(pipe)})
    chosen: dict[str, dict[str, list[int]]] = {name: {str(calls): [] for calls in CALLS} for name in METHODS}
    items = [(start, name, calls) for start in range(0, count, BATCH) for calls in CALLS for name in METHODS]
    for start, name, calls in tqdm(items):
        key = f"{start:06d}-{list(METHODS).index(name)}-{calls}"
        if key not in records.done():
            pixels = images[start : min(count, start + BATCH)]
            with torch.no_grad():
                latents = pipe._encoded(fashion_mnist.to_rgb(pixels))
            generator = step_generator(0, name, calls, start)
            records.write(key, {"chosen": METHODS[name](pipe, latents, calls, generator).argmax(0).tolist()})
        chosen[name][str(calls)] += records.read(key)["chosen"]
    return chosen


@torch.no_grad()
def classified(count: int) -> torch.Tensor:
    """What the image classifier that comes with the checkpoint says, (count,)."""
    path = Path(embedded_checkpoint()) / "classifier"
    model, image_input = AutoModelForImageClassification.from_pretrained(path).eval(), ImageInput.from_pretrained(path)
    images = fashion_mnist.to_rgb(fashion_mnist.load("test")[0][:count]) / 2 + 0.5
    return model(pixel_values=image_input(images)).logits.argmax(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--output", type=Path, default=Path("outputs/prompt_matching"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", CoarseGridWarning)  # few calls are the point
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    count = arguments.images
    labels = fashion_mnist.load("test")[1][:count]
    accuracy: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_calls in measure(pipe, count, arguments.output).items():
        accuracy[name] = {}
        for calls, chosen in by_calls.items():
            right = float((torch.tensor(chosen) == labels).double().mean())
            accuracy[name][calls] = {"accuracy": right, "standard_error": (right * (1 - right) / count) ** 0.5}
            print(f"{name}, {calls} calls a prompt: {right:.1%}")
    found = {
        "images": count, "prompts": len(PROMPTS), "trace": "no trace model" if pipe.trace_model is None else
        f"trace model, target {pipe.trace_model.target}", "accuracy": accuracy,
        "image_classifier": float((classified(count) == labels).double().mean()),
    }  # fmt: skip
    save("prompt_matching", found)


if __name__ == "__main__":
    main()
