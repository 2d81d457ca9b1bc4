"""Which of ten prompts fits a test image? Log-likelihoods beside the squared-error diffusion classifier.

python examples/benchmarks/prompt_matching.py [--methods "weighted squared error" "diffusion classifier"]

On the embedded checkpoint with its network in bfloat16:

- "likelihood": `compare_likelihood(method="ode")`, the probability-flow ODE;
- "weighted squared error": `compare_likelihood(method="squared error")`, squared errors weighted to a log-likelihood;
- "diffusion classifier": the plain mean of squared errors at evenly spaced timesteps with the same noise for all
  prompts (Li et al., 2303.16203).

2,000 test images by every method with the same number of denoiser calls a prompt, and all 10,000 by the second with
fewer. Needs Fashion-MNIST (see examples/fashion_mnist.py). Three quarters of an hour on one core; what was
computed is kept in --output and taken up again. prompt_matching.json is written when all methods are through.
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

IMAGES, CALLS = 2000, 10  # by every method; calls of the denoiser, a prompt
ALL_IMAGES, ALL_CALLS = 10000, 6  # by METHOD_FOR_ALL
METHOD_FOR_ALL = "weighted squared error"
BATCH = 250
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
            noised = (level.alpha * latents + level.sigma * noise).to(pipe.unet.dtype)
            errors += (denoiser(noised, timestep).double() - noise).square().flatten(1).mean(1)
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


def chosen(pipe: Any, name: str, count: int, calls: int, folder: Path) -> list[int]:
    """The prompt that a method chooses for every image."""
    images, _ = fashion_mnist.load("test")
    records = Records(folder / name.replace(" ", "_") / str(calls), {"batch": BATCH, **pipeline_digests(pipe)})
    labels: list[int] = []
    for start in tqdm(range(0, count, BATCH), f"{name}, {calls} calls"):
        key = f"{start:06d}"
        if key not in records.done():
            with torch.no_grad():
                latents = pipe._encoded(fashion_mnist.to_rgb(images[start : start + BATCH]).to(pipe.vae.dtype)).float()
            generator = step_generator(0, name, calls, start)
            records.write(key, {"chosen": METHODS[name](pipe, latents, calls, generator).argmax(0).tolist()})
        labels += records.read(key)["chosen"]
    return labels[:count]


def accuracy(labels: list[int]) -> dict[str, Any]:
    """Share of the images whose own prompt was chosen."""
    right = float((torch.tensor(labels) == fashion_mnist.load("test")[1][: len(labels)]).double().mean())
    return {
        "images": len(labels), "accuracy": right, "standard_error": (right * (1 - right) / len(labels)) ** 0.5,
        "image_classifier": classified(len(labels)),
    }  # fmt: skip


@torch.no_grad()
def classified(count: int) -> float:
    """Accuracy of the image classifier that comes with the checkpoint."""
    path = Path(embedded_checkpoint()) / "classifier"
    model, image_input = AutoModelForImageClassification.from_pretrained(path).eval(), ImageInput.from_pretrained(path)
    images, labels = fashion_mnist.load("test")
    pixels = fashion_mnist.to_rgb(images[:count]) / 2 + 0.5
    found = torch.cat([model(pixel_values=image_input(piece)).logits.argmax(1) for piece in pixels.split(500)])
    return float((found == labels[:count]).double().mean())


def pipeline(name: str) -> Any:
    """The embedded checkpoint for a method; only the ODE asks for a trace."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    if name != "likelihood":
        pipe.trace_model = None  # another one does not make the records stale
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("outputs/prompt_matching"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", CoarseGridWarning)  # few calls are the point
    found: dict[str, Any] = {"prompts": len(PROMPTS), "dtype": "bfloat16", "methods": {}}
    for name in arguments.methods:
        pipe = pipeline(name)
        if pipe.trace_model is not None:
            found["trace"] = f"trace model, target {pipe.trace_model.target}"
        sizes = [(IMAGES, CALLS)] + ([(ALL_IMAGES, ALL_CALLS)] if name == METHOD_FOR_ALL else [])
        found["methods"][name] = {
            str(calls): accuracy(chosen(pipe, name, count, calls, arguments.output)) for count, calls in sizes
        }
        print(name, found["methods"][name], flush=True)
    if list(found["methods"]) == list(METHODS):
        save("prompt_matching", found)


if __name__ == "__main__":
    main()
