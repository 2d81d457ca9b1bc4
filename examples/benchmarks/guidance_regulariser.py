"""Measures what the pull toward likely images does to guidance: rewards, held-out rewards, bounds of the likelihood.

    python examples/benchmarks/guidance_regulariser.py [--checkpoint sd3]
    python examples/benchmarks/guidance_regulariser.py --prompts 16 --steps 8    # a first look
    python examples/benchmarks/guidance_regulariser.py --tiny                    # only to see that it runs; no JSON

Held-out rewards are compared at equal reward, prompt by prompt. `likelihood_bound` is that of the returned images
under their prompts, in bits/dim: an upper bound of -log p, so larger numbers are less likely images. Every row (a
reward, a weight and a batch) is kept in the folder `--records` when it is done, and a second run continues from there.
The benchmark writes guidance_regulariser.json, with the network's name behind it where it is not the first checkpoint.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from common import save
from guidance_problem import TINY, Cells, Problem, Setting, Source, best_so_far, mean_and_error, parse
from noise_whiteness import at_equal_reward

from diffusers_fisher import LikelihoodRegulariser

WEIGHTS = ("none", "0.1", "0.3", "1.0")
BOUND_STEPS, DRAWS = 20, 2  # of the bound


def row(problem: Problem, name: str, weight: str, batch: int) -> dict[str, Any]:
    """Guides one batch, and returns what every run had, by run and prompt, and the bounds before and after."""
    setting, prompts = problem.setting, problem.prompts(batch)
    reward, held_out = problem.rewards(batch)[name]
    out = problem.pipe.guide(
        prompts, reward, held_out_reward=held_out, latents=problem.noises[batch],
        num_guidance_steps=setting.iterations, step_size=setting.step_size, num_inference_steps=setting.steps,
        guidance_scale=setting.guidance_scale, output_type="pt", generator=torch.Generator().manual_seed(batch),
        regulariser=None if weight == "none" else LikelihoodRegulariser(float(weight)),
    )  # fmt: skip
    bounds = {
        key: problem.pipe.likelihood_bound(
            images,
            prompts,
            num_inference_steps=min(BOUND_STEPS, setting.steps),
            num_draws=DRAWS,
            generator=torch.Generator().manual_seed(0),
        ).bits_per_dim.tolist()
        for key, images in (("bound_before", out.initial_images), ("bound", out.images))
    }
    return {
        "rewards": out.rewards.tolist(), "held_out": out.held_out_rewards.tolist(), "seconds": out.seconds.tolist(),
        "status": out.status, **bounds,
    }  # fmt: skip


def summarise(rows: list[dict[str, Any]], free: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the prompts, at their best runs, and differences from guidance without a pull."""
    best, held_out, _ = best_so_far(rows)
    bounds = [
        torch.tensor([value for each in table for value in each["bound"]], dtype=torch.float64)
        for table in (rows, free)
    ]
    before = torch.tensor([value for each in rows for value in each["bound_before"]], dtype=torch.float64)
    result: dict[str, Any] = {"before": float(best[0].mean()), "bound_before": float(before.mean())}
    values = {
        "reward": best[-1], "held_out": held_out[-1], "bound": bounds[0], "bound_difference": bounds[0] - bounds[1],
    }  # fmt: skip
    for key, value in values.items():
        result[key], result[f"{key}_standard_error"] = mean_and_error(value)
    return result


def run(setting: Setting, folder: Path, source: Source | None = None) -> dict[str, Any]:
    cells, problem = Cells(folder, setting, source), Problem(setting, source)
    result: dict[str, Any] = {"setting": dataclasses.asdict(setting), "after": {}, "at_equal_reward": {}}
    for name in problem.rewards(0):
        rows = {
            weight: [cells(row, name, weight, batch, context=(problem,)) for batch in problem.batches]
            for weight in WEIGHTS
        }
        result["after"][name] = {weight: summarise(each, rows["none"]) for weight, each in rows.items()}
        result["at_equal_reward"][name] = at_equal_reward(rows)
    return result


def main(arguments: list[str] | None = None) -> None:
    options = parse(__doc__, "guidance_regulariser", arguments, prompts=64, steps=25, iterations=10)
    setting = TINY if options.tiny else Setting(steps=options.steps, iterations=options.iterations)
    count = setting.prompts if options.tiny else options.prompts
    setting = dataclasses.replace(setting, prompts=count, compared_prompts=count)
    result = run(setting, options.records, options.source)
    if not options.tiny:
        save(f"guidance_regulariser{options.source.suffix}", result)


if __name__ == "__main__":
    main()
