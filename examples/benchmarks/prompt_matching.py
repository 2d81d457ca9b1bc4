"""Which of ten prompts fits a test image? Compares log-likelihoods with the squared-error diffusion classifier.

python examples/benchmarks/prompt_matching.py [--methods "weighted squared error" "diffusion classifier"]

The benchmark compares the two methods of examples/likelihood/which_prompt.py:

- "likelihood": `compare_likelihood(method="ode")`, the probability-flow ODE;
- "weighted squared error": `compare_likelihood(method="squared error")`, squared errors weighted to a log-likelihood;

with a third method:

- "diffusion classifier": the plain mean of squared errors at evenly spaced timesteps with the same noise for all
  prompts (Li et al., 2303.16203).

Every method runs on 2,000 test images with the same number of denoiser calls per prompt, and the second also on all
10,000 with fewer calls. The benchmark needs Fashion-MNIST (see examples/fashion_mnist.py) and takes three quarters of
an hour on one core. Results are kept in --output, and a second run continues from them. prompt_matching.json is
written when all methods are done; methods that are not named keep their figures there.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, save

from diffusers_fisher import CoarseGridWarning, PipelineDenoiser

sys.path.insert(0, str(FOLDER.parent / "likelihood"))
import which_prompt
from which_prompt import PROMPTS, Score

IMAGES, CALLS = 2000, 10  # images for every method; denoiser calls per prompt
ALL_IMAGES, ALL_CALLS = 10000, 4  # images for METHOD_FOR_ALL, and its calls
METHOD_FOR_ALL = "weighted squared error"


@torch.no_grad()
def diffusion_classifier(pipe: Any, latents: torch.Tensor, calls: int, generator: torch.Generator) -> torch.Tensor:
    """Returns scores (10, B), higher for the prompt that fits."""
    count = pipe.scheduler.config.num_train_timesteps
    timesteps = ((torch.arange(calls) + 0.5) * count / calls).long().tolist()
    noises = [torch.randn(latents.shape, generator=generator) for _ in timesteps]
    scores = []
    for prompt in PROMPTS:
        denoiser = PipelineDenoiser(pipe, prompt=[prompt] * len(latents))
        errors = torch.zeros(len(latents), dtype=torch.float64)
        for timestep, noise in zip(timesteps, noises, strict=True):
            level = denoiser.level(torch.tensor(timestep))
            noisy_latents = (level.alpha * latents + level.sigma * noise).to(pipe.unet.dtype)
            errors += (denoiser(noisy_latents, timestep).double() - noise).square().flatten(1).mean(1)
        scores.append(-errors / calls)
    return torch.stack(scores)


METHODS: dict[str, Score] = {**which_prompt.METHODS, "diffusion classifier": diffusion_classifier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--output", type=Path, default=Path("outputs/prompt_matching"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", CoarseGridWarning)  # few calls are intended
    result: dict[str, Any] = {"prompts": len(PROMPTS), "dtype": "bfloat16", "methods": {}}
    for name in arguments.methods:
        pipe = which_prompt.pipeline(name)
        if pipe.trace_model is not None:
            result["trace"] = f"trace model, target {pipe.trace_model.target}"
        sizes = [(IMAGES, CALLS)] + ([(ALL_IMAGES, ALL_CALLS)] if name == METHOD_FOR_ALL else [])
        result["methods"][name] = {
            str(calls): which_prompt.accuracy(
                which_prompt.chosen(pipe, name, METHODS[name], count, calls, arguments.output)
            )
            for count, calls in sizes
        }
        print(name, result["methods"][name], flush=True)
    file = FOLDER / "prompt_matching.json"
    earlier = json.loads(file.read_text())["methods"] if file.exists() else {}
    methods = {**earlier, **result["methods"]}
    if set(methods) == set(METHODS):
        save("prompt_matching", {**result, "methods": {name: methods[name] for name in METHODS}})


if __name__ == "__main__":
    main()
