"""Which estimator guides runs of few steps, and runs that add noise; writes few_steps.json.

    python examples/benchmarks/few_steps.py [--checkpoint sd3] [--gains]
    python examples/benchmarks/few_steps.py --student outputs/embedded_student/checkpoint [--gains]

For runs of 1 to 25 steps by schedulers that are deterministic, that add some noise at every step, or that replace all
of it (LCM): the cosine of every estimator's gradient at the noise with the exact one, on the embedded checkpoint, or
on the consistency model that train_student.py has distilled from it (few_steps_student.json). With --gains also the
reward after ten guidance steps, and the time beside exact gradients.
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

BATCH, ITERATIONS, SAMPLES = 10, 10, 200
SCALES = {"sd": 2.0, "sd3": 2.0, "student": 1.0}  # the teacher's guidance is part of the student
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
    "student": [("LCM", "LCMScheduler", {}, steps) for steps in (1, 2, 4)],
}


def estimators(denoiser: PipelineDenoiser) -> dict[str, Any]:
    return {
        "one step": OneStepFisher(FiniteDifferenceFisher(denoiser)),
        "finite difference": FiniteDifferenceFisher(denoiser),
        "direct": DirectFisher(),
    }


def gradient(pipe: Any, noise: torch.Tensor, estimator: Any, reward: Any, arguments: dict[str, Any]) -> torch.Tensor:
    """Returns the gradient of the reward at the noise through one run of the pipeline."""
    with pipe.scheduler.differentiable(estimator) as trajectory:
        latents = pipe(
            latents=noise, output_type="latent", return_dict=False, generator=torch.Generator().manual_seed(1),
            **arguments,
        )[0]  # fmt: skip
    images = backbone_of(pipe).decode(latents)
    return trajectory.gradient(checked_reward(reward, images, arguments["prompt"]).sum()).double()


def cosines(pipe: Any, reward: Any, noise: torch.Tensor, arguments: dict[str, Any]) -> dict[str, float]:
    """Returns by estimator the mean cosine with the exact gradient."""
    denoiser = PipelineDenoiser(pipe, guidance_scale=arguments["guidance_scale"], prompt=arguments["prompt"])
    exact, *rest = (
        gradient(pipe, noise, estimator, reward, arguments)
        for estimator in (AutodiffFisher(denoiser), *estimators(denoiser).values())
    )
    return {name: cosine(value, exact) for name, value in zip(estimators(denoiser), rest, strict=True)}


def gains(pipe: Any, reward: Any, noise: torch.Tensor, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns by estimator how much the best reward grows in ten guidance steps, and the seconds."""
    ways = {
        "one step": OneStepFisher(), "finite difference": FiniteDifferenceFisher(), "exact": AutodiffFisher(),
        "direct": DirectFisher(),
    }  # fmt: skip
    rows = {}
    for name, estimator in ways.items():
        begin = time.perf_counter()
        out = pipe.guide(
            reward=reward, estimator=estimator, latents=noise, num_guidance_steps=ITERATIONS, output_type="pt",
            generator=torch.Generator().manual_seed(1), **arguments,
        )  # fmt: skip
        gain = torch.as_tensor(out.best_rewards) - torch.as_tensor(out.rewards)[0]
        error = float(gain.std() / len(gain) ** 0.5)
        rows[name] = {
            "gain": float(gain.mean()), "standard_error": error, "seconds": time.perf_counter() - begin,
        }  # fmt: skip
    return rows


def classified_as_prompted(pipe: Any, steps: int, scale: float) -> float:
    """Returns the share of samples that the classifier sees as the class of their prompt."""
    labels = [index % 10 for index in range(SAMPLES)]
    images = pipe(
        [embedded_prompt(label) for label in labels], num_inference_steps=steps, guidance_scale=scale,
        output_type="pt", generator=torch.Generator().manual_seed(2),
    ).images  # fmt: skip
    own = ClassifierReward.from_pretrained(f"{embedded_checkpoint()}/classifier", target=labels)
    return float((own(images.float(), [""] * SAMPLES).exp() > 0.5).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", choices=NAMES, default="sd")
    parser.add_argument("--student", metavar="FOLDER", help="the distilled checkpoint of train_student.py")
    parser.add_argument("--gains", action="store_true")
    options = parser.parse_args()
    name = options.checkpoint if options.student is None else "student"
    labels = [index % 10 for index in range(BATCH)]
    reward = ClassifierReward.from_pretrained(
        f"{embedded_checkpoint()}/classifier", target=[(label + 1) % 10 for label in labels]
    )
    prompts = [embedded_prompt(label) for label in labels]
    noise, rows = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    with embedded_pipeline(options.checkpoint, options.student) as pipe:
        for title, cls, changes, steps in RUNS[name]:
            pipe.scheduler = fisher_scheduler(getattr(diffusers, cls)).from_config(pipe.scheduler.config, **changes)
            arguments = {"prompt": prompts, "num_inference_steps": steps, "guidance_scale": SCALES[name]}
            row: dict[str, Any] = {"scheduler": title, "steps": steps}
            row["cosine"] = cosines(pipe, reward, noise, arguments)
            if options.gains:
                row["guidance"] = gains(pipe, reward, noise, arguments)
            if options.student is not None:
                row["classified_as_prompted"] = classified_as_prompted(pipe, steps, SCALES[name])
            rows.append(row)
            print(row, flush=True)
    suffix = "" if name == "sd" else f"_{name}"
    save(f"few_steps{suffix}", {"batch": BATCH, "guidance_scale": SCALES[name], "rows": rows})


if __name__ == "__main__":
    main()
