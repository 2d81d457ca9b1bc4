"""Compares guidance that climbs by runs of few steps with guidance by full runs, on the embedded checkpoint.

    python examples/benchmarks/guidance_steps.py          # some minutes on two cores
    python examples/benchmarks/guidance_steps.py --tiny   # only to see that it runs; writes no JSON

All ways take the same number of guidance steps from the same noise, and end with the pipeline's own run of 25 steps of
DDIM. The benchmark writes guidance_steps.json. Every row (a reward, a way and a batch) is kept in the folder
`--records` when it is done, and a second run continues from there. Seconds depend on what else the machine does; the
numbers of denoiser calls do not.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from common import save
from guidance import TINY, Cells, Problem, Setting

from diffusers_fisher import embedded_prompt

WAYS: dict[str, dict[str, Any]] = {
    "full runs": {},
    "5 steps": {"num_guidance_inference_steps": 5},
    "8 steps": {"num_guidance_inference_steps": 8},
}
REWARDS = ("another class", "left minus right")


def row(problem: Problem, name: str, way: str, batch: int) -> dict[str, Any]:
    """Guides one batch, and returns the rewards of its images, prompt by prompt."""
    setting = problem.setting
    reward, held_out = problem.rewards(batch)[name]
    out = problem.pipe.guide(
        [embedded_prompt(label) for label in problem.batch_labels(batch)], reward, held_out_reward=held_out,
        latents=problem.noises[batch], num_guidance_steps=setting.iterations, step_size=setting.step_size,
        num_inference_steps=setting.steps, guidance_scale=setting.guidance_scale, output_type="pt", **WAYS[way],
    )  # fmt: skip
    pairs = len(out.best_rewards) * (len(out.best_rewards) - 1) // 2
    return {
        "rewards": out.best_rewards.tolist(),
        "held_out": out.held_out_rewards.gather(0, out.best_runs[None])[0].tolist(),
        "cheap_rewards": None if out.cheap_rewards is None else out.cheap_rewards.tolist(),
        "full_rewards": None if out.full_rewards is None else out.full_rewards.tolist(),
        "reordered": len(out.reordered) / pairs, "guidance_scheduler": out.guidance_scheduler,
        "seconds": float(out.seconds.sum()), "denoiser_calls": out.num_denoiser_calls, "status": out.status,
    }  # fmt: skip


def summarise(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the prompts, and the differences from the reference, prompt by prompt."""

    def values(name: str, of: list[dict[str, Any]] = rows) -> torch.Tensor:
        return torch.tensor([value for each in of for value in each[name]], dtype=torch.float64)

    result: dict[str, Any] = {"guidance_scheduler": rows[0]["guidance_scheduler"], "prompts": len(values("rewards"))}
    for name in ("rewards", "held_out"):
        mine, difference = values(name), values(name) - values(name, reference)
        result |= {
            name: float(mine.mean()), f"{name}_difference": float(difference.mean()),
            f"{name}_difference_standard_error": float(difference.std() / len(difference) ** 0.5),
        }  # fmt: skip
    if rows[0]["cheap_rewards"] is not None:
        result |= {name: float(values(name).mean()) for name in ("cheap_rewards", "full_rewards")}
        result["pairs_reordered"] = sum(each["reordered"] for each in rows) / len(rows)
    for name in ("seconds", "denoiser_calls"):
        total = sum(each[name] for each in rows)
        result |= {name: total, f"{name}_over_full_runs": total / sum(each[name] for each in reference)}
    return result


def run(setting: Setting, folder: Path) -> dict[str, Any]:
    cells, problem = Cells(folder, setting), Problem(setting)
    batches = range(len(problem.noises))
    table: dict[str, Any] = {}
    for name in REWARDS:
        rows = {way: [cells(row, name, way, batch, context=(problem,)) for batch in batches] for way in WAYS}
        table[name] = {way: summarise(each, rows["full runs"]) for way, each in rows.items()}
    return {"setting": dataclasses.asdict(setting), "rewards": table}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("outputs/benchmarks/guidance_steps"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    count = TINY.prompts if options.tiny else options.prompts
    setting = TINY if options.tiny else Setting(iterations=options.iterations)
    result = run(dataclasses.replace(setting, prompts=count, compared_prompts=count), options.records)
    if not options.tiny:
        save("guidance_steps", result)


if __name__ == "__main__":
    main()
