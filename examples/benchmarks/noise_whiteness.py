"""Measures what keeping the noise white does to guidance on the embedded checkpoint: rewards and held-out rewards.

    python examples/benchmarks/noise_whiteness.py                           # about an hour on two cores
    python examples/benchmarks/noise_whiteness.py --prompts 16 --steps 8    # a first look, a few minutes
    python examples/benchmarks/noise_whiteness.py --tiny                    # only to see that it runs; writes no JSON

The benchmark writes noise_whiteness.json. Every row (a reward, a projection and a batch) is kept in the folder
`--records` when it is done, and a second run continues from there.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from common import save
from guidance import TINY, Cells, Problem, Setting, best_so_far

from diffusers_fisher import embedded_prompt

PROJECTIONS = ("none", "soft", "hard")


def row(problem: Problem, name: str, projection: str, batch: int) -> dict[str, Any]:
    """Guides one batch, and returns what every run had, by run and prompt."""
    setting = problem.setting
    reward, held_out = problem.rewards(batch)[name]
    out = problem.pipe.guide(
        [embedded_prompt(label) for label in problem.batch_labels(batch)], reward, held_out_reward=held_out,
        latents=problem.noises[batch], num_guidance_steps=setting.iterations, step_size=setting.step_size,
        num_inference_steps=setting.steps, guidance_scale=setting.guidance_scale, output_type="pt",
        noise_projection=None if projection == "none" else projection,
    )  # fmt: skip
    return {
        "rewards": out.rewards.tolist(), "held_out": out.held_out_rewards.tolist(),
        "whiteness": out.whiteness.tolist(), "seconds": out.seconds.tolist(), "best_runs": out.best_runs.tolist(),
        "status": out.status,
    }  # fmt: skip


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the prompts, at the best run of every prompt."""
    best, held_out, _ = best_so_far(rows)
    returned = torch.cat([
        torch.tensor(each["whiteness"], dtype=torch.float64).gather(0, torch.tensor(each["best_runs"])[None])[0]
        for each in rows
    ])  # fmt: skip
    prompts = best.shape[1]
    return {
        "before": float(best[0].mean()), "after": float(best[-1].mean()),
        "standard_error": float(best[-1].std() / prompts**0.5),
        "held_out_before": float(held_out[0].mean()), "held_out_after": float(held_out[-1].mean()),
        "held_out_standard_error": float(held_out[-1].std() / prompts**0.5),
        "whiteness_below_0.01": float((returned < 0.01).double().mean()),
        "seconds": sum(sum(each["seconds"]) for each in rows),
    }  # fmt: skip


def at_equal_reward(rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Compares held-out rewards at the first run in which every projection has a mean reward that all of them reach.

    The differences are those from guidance without a projection, prompt by prompt.
    """
    histories = {projection: best_so_far(each)[:2] for projection, each in rows.items()}
    target = min(float(best[-1].mean()) for best, _ in histories.values())
    values = {}
    for projection, (best, held_out) in histories.items():
        run = int((best.mean(1) >= target - 1e-12).nonzero()[0])
        values[projection] = (run, float(best[run].mean()), held_out[run])
    result: dict[str, Any] = {"reward": target}
    for projection, (run, reward, held_out) in values.items():
        difference = held_out - values["none"][2]
        result[projection] = {
            "run": run, "reward": reward, "held_out": float(held_out.mean()),
            "held_out_difference": float(difference.mean()),
            "held_out_difference_standard_error": float(difference.std() / len(difference) ** 0.5),
        }  # fmt: skip
    return result


def run(setting: Setting, folder: Path) -> dict[str, Any]:
    cells, problem = Cells(folder, setting), Problem(setting)
    result: dict[str, Any] = {"setting": dataclasses.asdict(setting), "after": {}, "at_equal_reward": {}}
    for name in problem.rewards(0):
        rows = {
            projection: [
                cells(row, name, projection, batch, context=(problem,)) for batch in range(len(problem.noises))
            ]
            for projection in PROJECTIONS
        }
        result["after"][name] = {projection: summarise(each) for projection, each in rows.items()}
        result["at_equal_reward"][name] = at_equal_reward(rows)
    return result


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("outputs/benchmarks/noise_whiteness"))
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    setting = TINY if options.tiny else Setting(steps=options.steps, iterations=options.iterations)
    count = setting.prompts if options.tiny else options.prompts
    setting = dataclasses.replace(setting, prompts=count, compared_prompts=count)
    result = run(setting, options.records)
    if not options.tiny:
        save("noise_whiteness", result)


if __name__ == "__main__":
    main()
