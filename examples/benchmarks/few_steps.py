"""Which estimator guides runs of few steps, and runs that add noise; writes few_steps.json.

    python examples/benchmarks/few_steps.py [--checkpoint sd3] [--gains]

For runs of 1 to 25 steps by schedulers that are deterministic, that add some noise at every step, or that replace all
of it (LCM): the cosine of every estimator's gradient at the noise with the exact one, on the embedded checkpoint. With
--gains also the reward after ten guidance steps, and the time beside exact gradients.
"""

import argparse
import time
from typing import Any

import diffusers
import torch
from common import save
from embedded_pipelines import NAMES, embedded_pipeline
from fisher_accuracy import cosine

from diffusers_fisher import (
    AutodiffFisher,
    ClassifierReward,
    DirectFisher,
    FiniteDifferenceFisher,
    OneStepFisher,
    PipelineDenoiser,
    embedded_checkpoint,
    embedded_prompt,
    fisher_scheduler,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.guidance.checks import checked_reward

BATCH, SCALE, ITERATIONS = 10, 2.0, 10
FROM_THE_END = {"timestep_spacing": "trailing"}  # else a single step begins at the lowest noise
RUNS: dict[str, list[tuple[str, str, dict[str, Any], int]]] = {
    "sd": [
        *(("DDIM", "DDIMScheduler", {"clip_sample": False, **FROM_THE_END}, steps) for steps in (1, 2, 4, 25)),
        *(("DPM-Solver++", "DPMSolverMultistepScheduler", {}, steps) for steps in (1, 2, 4)),
        *(("LCM", "LCMScheduler", {}, steps) for steps in (1, 2, 4, 8)),
        *(("TCD", "TCDScheduler", {}, steps) for steps in (2, 4)),
        *(("Euler ancestral", "EulerAncestralDiscreteScheduler", {}, steps) for steps in (4, 25)),
        ("DDPM", "DDPMScheduler", {"clip_sample": False}, 25),
        ("SDE-DPM-Solver++", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 10),
    ],
    "sd3": [
        *(("flow Euler", "FlowMatchEulerDiscreteScheduler", {}, steps) for steps in (1, 2, 4, 25)),
        *(
            ("flow Euler, stochastic", "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, steps)
            for steps in (2, 4, 8)
        ),
    ],
}


def estimators(denoiser: PipelineDenoiser) -> dict[str, Any]:
    return {
        "one step": OneStepFisher(FiniteDifferenceFisher(denoiser)),
        "finite difference": FiniteDifferenceFisher(denoiser),
        "direct": DirectFisher(),
    }


def gradient(pipe: Any, scheduler: Any, noise: torch.Tensor, steps: int, estimator: Any, reward: Any, arguments: Any):
    """Returns the gradient of the reward at the noise through one run of the pipeline."""
    with scheduler.differentiable(estimator) as trajectory:
        latents = pipe(
            latents=noise, num_inference_steps=steps, guidance_scale=SCALE, output_type="latent", return_dict=False,
            generator=torch.Generator().manual_seed(1), **arguments,
        )[0]  # fmt: skip
    images = backbone_of(pipe).decode(latents)
    return trajectory.gradient(checked_reward(reward, images, arguments["prompt"]).sum()).double()


def cosines(pipe: Any, reward: Any, prompts: list[str], noise: torch.Tensor, case: tuple) -> dict[str, float]:
    """Returns by estimator the mean cosine with the exact gradient."""
    _, cls, changes, steps = case
    pipe.scheduler = fisher_scheduler(getattr(diffusers, cls)).from_config(pipe.scheduler.config, **changes)
    arguments = {"prompt": prompts}
    denoiser = PipelineDenoiser(pipe, guidance_scale=SCALE, **arguments)
    exact, *rest = (
        gradient(pipe, pipe.scheduler, noise, steps, estimator, reward, arguments)
        for estimator in (AutodiffFisher(denoiser), *estimators(denoiser).values())
    )
    return {name: cosine(value, exact) for name, value in zip(estimators(denoiser), rest, strict=True)}


def gains(pipe: Any, reward: Any, prompts: list[str], noise: torch.Tensor, case: tuple) -> dict[str, Any]:
    """Returns by estimator how much the best reward grows in ten guidance steps, and the seconds."""
    _, cls, changes, steps = case
    pipe.scheduler = fisher_scheduler(getattr(diffusers, cls)).from_config(pipe.scheduler.config, **changes)
    ways = {
        "one step": OneStepFisher(), "finite difference": FiniteDifferenceFisher(), "exact": AutodiffFisher(),
        "direct": DirectFisher(),
    }  # fmt: skip
    rows = {}
    for name, estimator in ways.items():
        begin = time.perf_counter()
        out = pipe.guide(
            prompts, reward, estimator=estimator, latents=noise, num_inference_steps=steps, guidance_scale=SCALE,
            num_guidance_steps=ITERATIONS, output_type="pt", generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        gain = torch.as_tensor(out.best_rewards) - torch.as_tensor(out.rewards)[0]
        error = float(gain.std() / len(gain) ** 0.5)
        rows[name] = {
            "gain": float(gain.mean()), "standard_error": error, "seconds": time.perf_counter() - begin,
        }  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=NAMES, default="sd")
    parser.add_argument("--folder", help="another checkpoint of that kind; no JSON is written")
    parser.add_argument("--gains", action="store_true")
    arguments = parser.parse_args()
    labels = [index % 10 for index in range(BATCH)]
    prompts = [embedded_prompt(label) for label in labels]
    reward = ClassifierReward.from_pretrained(
        f"{embedded_checkpoint()}/classifier", target=[(label + 1) % 10 for label in labels]
    )
    noise, rows = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    with embedded_pipeline(arguments.checkpoint, arguments.folder) as pipe:
        for case in RUNS[arguments.checkpoint]:
            row: dict[str, Any] = {"scheduler": case[0], "steps": case[-1]}
            row["cosine"] = cosines(pipe, reward, prompts, noise, case)
            if arguments.gains:
                row["guidance"] = gains(pipe, reward, prompts, noise, case)
            rows.append(row)
            print(row, flush=True)
    if arguments.folder is None:
        suffix = "" if arguments.checkpoint == "sd" else f"_{arguments.checkpoint}"
        save(f"few_steps{suffix}", {"batch": BATCH, "guidance_scale": SCALE, "rows": rows})


if __name__ == "__main__":
    main()
