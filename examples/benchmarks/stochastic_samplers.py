"""Stochastic sampling with the optimal variance beside other samplers; writes stochastic_samplers.json.

    python examples/benchmarks/stochastic_samplers.py [--checkpoint sd3] [--count 2000] [--seeds 3]

Unguided samples of the embedded checkpoint at several numbers of steps: how often a classifier sees the prompted
class, the Frechet distance of its features to those of test images, and how far the samples of one class differ. The
distance has a standard error over the seeds, and depends on the number of samples, which is the same for all. The
variances are from the squared errors on training images (`fit_level_fisher`), or from the trace model. A run that was
stopped goes on; all of it takes hours on two cores. Needs Fashion-MNIST (Debian's dataset-fashion-mnist).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from common import FOLDER, machine
from embedded_pipelines import NAMES, embedded_pipeline

from diffusers_fisher import (
    ClassifierReward,
    LevelFisher,
    TraceMatchingFisher,
    embedded_checkpoint,
    embedded_prompt,
    fit_level_fisher,
    optimal_variance_scheduler,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.files import write_json
from diffusers_fisher.likelihood.pipeline import likelihood_samples, unguided_denoiser

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

STEPS, PIECE, TABLE_IMAGES, LEVELS = (5, 10, 25), 100, 256, 40
DDPM = {"clip_sample": False, "timestep_spacing": "trailing"}


def table(pipe: Any) -> LevelFisher:
    """Returns squared errors by level, of training images with their prompts and latents drawn from the encoder."""
    images, labels = fashion_mnist.load("train")
    generator, backbone = torch.Generator().manual_seed(0), backbone_of(pipe)
    pictures = images[:TABLE_IMAGES].float().expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        samples, _, _ = likelihood_samples(backbone, pictures, None, (0, 1), True, generator, None)
    prompts = [embedded_prompt(int(label)) for label in labels[:TABLE_IMAGES]]
    denoiser = unguided_denoiser(backbone, samples, backbone.unguided_scale({}), prompts, {})
    return fit_level_fisher(denoiser, samples, LEVELS, 1, generator)


def samplers(pipe: Any, levels: LevelFisher) -> dict[str, Callable[[], Any]]:
    """Returns makers of schedulers by name."""
    config = pipe.scheduler.config
    if isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        return {
            "optimal variance": lambda: optimal_variance_scheduler(pipe.scheduler, levels),
            "optimal variance, eta 0": lambda: _with_eta(optimal_variance_scheduler(pipe.scheduler, levels), 0.0),
            "flow Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler.from_config(config),
            "flow Euler, stochastic": lambda: diffusers.FlowMatchEulerDiscreteScheduler.from_config(
                config, stochastic_sampling=True
            ),
        }
    base = diffusers.DDPMScheduler.from_config(config, **DDPM)
    table: dict[str, Callable[[], Any]] = {
        "optimal variance": lambda: optimal_variance_scheduler(base, levels),
        "optimal variance, eta 0": lambda: _with_eta(optimal_variance_scheduler(base, levels), 0.0),
        "small variance": lambda: diffusers.DDPMScheduler.from_config(base.config, variance_type="fixed_small"),
        "large variance": lambda: diffusers.DDPMScheduler.from_config(base.config, variance_type="fixed_large"),
        "DDIM": lambda: diffusers.DDIMScheduler.from_config(config, **DDPM),
        "SDE-DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="sde-dpmsolver++", timestep_spacing="trailing"
        ),
    }
    if pipe.trace_model is not None:
        trace = TraceMatchingFisher(pipe.trace_model)
        table["optimal variance, trace model"] = lambda: optimal_variance_scheduler(base, levels).set_estimator(trace)
    return table


def _with_eta(scheduler: Any, eta: float) -> Any:
    return type(scheduler).from_config(scheduler.config, eta=eta)


def features(classifier: ClassifierReward, images: torch.Tensor) -> torch.Tensor:
    """Returns the classifier's pooled features (N, 160) float64 of images in [0, 1]."""
    pieces = []
    with torch.no_grad():
        for part in images.split(250):
            hidden = classifier.model.regnet(pixel_values=classifier.image_input(part)).pooler_output
            pieces.append(hidden.flatten(1).double())
    return torch.cat(pieces)


def frechet_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Returns |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) of two sets of features."""
    covariances = [torch.cov(each.T) for each in (x, y)]
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors @ torch.diag(values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    return float(gap + covariances[0].trace() + covariances[1].trace() - 2 * cross)


def judge(pipe: Any, classifier: ClassifierReward, real: torch.Tensor, steps: int, count: int, seed: int) -> Any:
    """Returns accuracy, distance and spread of `count` samples."""
    labels = torch.arange(count) % 10
    generator, parts = torch.Generator().manual_seed(seed), []
    torch.manual_seed(seed)  # Stable Diffusion 3's call gives its scheduler no generator
    for part in labels.split(PIECE):
        prompts = [embedded_prompt(label) for label in part.tolist()]
        arguments = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "pt"}
        parts.append(pipe(prompts, generator=generator, **arguments).images)
    images = torch.cat(parts)
    with torch.no_grad():
        right = torch.cat([classifier.logits(piece).argmax(1) for piece in images.split(250)]) == labels
    spread = torch.stack([images[labels == label].mean(1).std(0).mean() for label in range(10)]).mean()
    return {
        "accuracy": float(right.double().mean()), "distance": frechet_distance(features(classifier, images), real),
        "spread": float(spread),
    }  # fmt: skip


def summary(rows: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns mean and standard error over the seeds by sampler and steps."""
    groups: dict[tuple[str, int], list[dict[str, float]]] = {}
    for key, row in rows.items():
        name, steps, _ = key.split("|")
        groups.setdefault((name, int(steps)), []).append(row)
    result = []
    for (name, steps), group in groups.items():
        entry: dict[str, Any] = {"sampler": name, "steps": steps, "seeds": len(group)}
        for field in ("accuracy", "distance", "spread"):
            values = torch.tensor([row[field] for row in group], dtype=torch.float64)
            error = float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None
            entry |= {field: float(values.mean()), f"{field}_standard_error": error}
        result.append(entry)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=NAMES, default="sd")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--work", type=Path, default=Path("outputs/stochastic_samplers"))
    arguments = parser.parse_args()
    suffix = "" if arguments.checkpoint == "sd" else f"_{arguments.checkpoint}"
    records = arguments.work / f"rows{suffix}_{arguments.count}.json"
    records.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, Any] = json.loads(records.read_text()) if records.is_file() else {}
    classifier = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target=0)
    images, _ = fashion_mnist.load("test")
    real = features(classifier, images.float().expand(-1, 3, -1, -1) / 255)
    with embedded_pipeline(arguments.checkpoint) as pipe:
        levels, own = table(pipe), pipe.scheduler
        for seed in range(arguments.seeds):
            for steps in arguments.steps:
                for name, make in samplers(pipe, levels).items():
                    key = f"{name}|{steps}|{seed}"
                    if key in rows:
                        continue
                    pipe.scheduler = make()
                    rows[key] = judge(pipe, classifier, real, steps, arguments.count, seed)
                    pipe.scheduler = own
                    print(key, rows[key], flush=True)
                    write_json(records, rows)
    result = {"machine": machine(), "count": arguments.count, "rows": summary(rows)}
    write_json(FOLDER / f"stochastic_samplers{suffix}.json", result)


if __name__ == "__main__":
    main()
