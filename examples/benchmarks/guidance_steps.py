"""Compares guidance that climbs by runs of few steps with exact gradients and with guidance by full runs.

    python examples/benchmarks/guidance_steps.py [--checkpoint sd3 | --student FOLDER]
    python examples/benchmarks/guidance_steps.py --expect    # prints how long the whole will take
    python examples/benchmarks/guidance_steps.py --tiny      # only to see that it runs; writes no JSON

All ways begin with the same noise, and end with the pipeline's own run. The exact method takes `--iterations` steps by
full runs; every other way takes as many steps as shares of the exact method's cost allow, its last full run included.
Costs are numbers of evaluations at prices in seconds that are measured once, in turn, at the beginning, because other
work on the machine changes seconds; the seconds of every row are reported beside. The result has rewards and held-out
rewards, and their differences from the exact method, prompt by prompt. Every row (reward, way, share and batch) is
kept in the folder `--records` when it is done, and a second run continues from there. The benchmark writes
guidance_steps.json, with the network's name behind it where it is not the first checkpoint.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import save
from guidance_baseline_methods import Task, exact_ascent
from guidance_problem import TINY, Cells, Problem, Setting, Source, mean_and_error, parse, prices

from diffusers_fisher import AutodiffFisher

SHARES = (0.125, 1 / 6, 1 / 3, 1.0)  # of the exact method's cost
STUDENT_STEPS = 4


def ways_of(source: Source) -> dict[str, int | None]:
    """Returns by way the number of steps of the runs by which it climbs; None: all runs are full ones."""
    few = (5, 8) if source.student is None else (1, 2)
    return {"full runs": None, **{f"{count} steps": count for count in few}}


def row(problem: Problem, price: dict[str, float], name: str, way: str, share: float, batch: int) -> dict[str, Any]:
    """Guides one batch at a share of the exact method's cost, and returns the rewards of its images, prompt by prompt.

    Args:
        way: "full runs", or the steps of the runs by which it climbs, such as "5 steps".
    """
    few_steps = None if way == "full runs" else int(way.split()[0])
    iterations = num_iterations(problem.setting, price, few_steps, share)
    return guided(problem, name, batch, iterations, num_guidance_inference_steps=few_steps)


def guided(problem: Problem, name: str, batch: int, iterations: int, **options: Any) -> dict[str, Any]:
    setting = problem.setting
    reward, held_out = problem.rewards(batch)[name]
    out = problem.pipe.guide(
        problem.prompts(batch), reward, held_out_reward=held_out, latents=problem.noises[batch],
        num_guidance_steps=iterations, step_size=setting.step_size, num_inference_steps=setting.steps,
        guidance_scale=setting.guidance_scale, output_type="pt", generator=torch.Generator().manual_seed(batch),
        **options,
    )  # fmt: skip
    pairs = max(1, len(out.best_rewards) * (len(out.best_rewards) - 1) // 2)
    return {
        "rewards": out.best_rewards.tolist(),
        "held_out": out.held_out_rewards.gather(0, out.best_runs[None])[0].tolist(),
        "cheap_rewards": None if out.cheap_rewards is None else out.cheap_rewards.tolist(),
        "full_rewards": None if out.full_rewards is None else out.full_rewards.tolist(),
        "reordered": len(out.reordered) / pairs, "guidance_scheduler": out.guidance_scheduler,
        "seconds": float(out.seconds.sum()), "denoiser_calls": out.num_denoiser_calls, "status": out.status,
        "iterations": iterations,
    }  # fmt: skip


def exact(problem: Problem, source: Source, name: str, batch: int) -> dict[str, Any]:
    """Guides one batch by exact gradients: by back-propagation, for the student by recomputation.

    The steps of the student's scheduler draw noise, which the sampler of the baselines does not.
    """
    setting = problem.setting
    if source.student is not None:
        return guided(problem, name, batch, setting.iterations, estimator=AutodiffFisher())
    reward, held_out = problem.rewards(batch)[name]
    task = Task(
        problem.pipe, reward, problem.prompts(batch), problem.noises[batch], setting.steps, setting.guidance_scale
    )
    begin, rows = time.perf_counter(), []
    for images in itertools.islice(exact_ascent(task, setting.step_size), setting.iterations + 1):
        with torch.no_grad():
            rows.append((task.rewards(images), held_out(images, task.prompts)))
    rewards, held_out_rewards = (torch.stack(each) for each in zip(*rows, strict=True))
    best = rewards.argmax(0, keepdim=True)
    return {
        "rewards": rewards.gather(0, best)[0].tolist(), "held_out": held_out_rewards.gather(0, best)[0].tolist(),
        "cheap_rewards": None, "seconds": time.perf_counter() - begin, "guidance_scheduler": "",
        "denoiser_calls": (setting.iterations + 1) * setting.steps, "iterations": setting.iterations,
    }  # fmt: skip


def exact_cost(setting: Setting, price: dict[str, float]) -> float:
    """Returns the seconds per sample of the exact method, whose last run has no backward pass."""
    run = setting.steps * price["denoise"] + price["decode"]
    return setting.iterations * (setting.steps * price["denoise backward"] + price["decode backward"]) + run


def step_cost(setting: Setting, price: dict[str, float], few_steps: int | None) -> float:
    """Returns the seconds per sample of a guidance step by the default estimator, one product included."""
    return ((few_steps or setting.steps) + 1) * price["denoise"] + price["decode backward"]


def num_iterations(setting: Setting, price: dict[str, float], few_steps: int | None, share: float) -> int:
    """Returns the number of guidance steps that fit, with the last run, into a share of the exact method's cost."""
    last = setting.steps * price["denoise"] + price["decode"]
    if few_steps is not None:
        last += few_steps * price["denoise"] + price["decode"]
    return max(1, int((share * exact_cost(setting, price) - last) / step_cost(setting, price, few_steps)))


def summarise(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the prompts, and the differences from the reference, prompt by prompt."""

    def values(name: str, of: list[dict[str, Any]] = rows) -> torch.Tensor:
        return torch.tensor([value for each in of for value in each[name]], dtype=torch.float64)

    result: dict[str, Any] = {
        "guidance_scheduler": rows[0]["guidance_scheduler"], "prompts": len(values("rewards")),
        "iterations": rows[0]["iterations"],
    }  # fmt: skip
    for name in ("rewards", "held_out"):
        mine, difference = values(name), values(name) - values(name, reference)
        result[name], result[f"{name}_standard_error"] = mean_and_error(mine)
        result[f"{name}_difference"], result[f"{name}_difference_standard_error"] = mean_and_error(difference)
    if rows[0]["cheap_rewards"] is not None:
        result |= {name: float(values(name).mean()) for name in ("cheap_rewards", "full_rewards")}
        result["pairs_reordered"] = sum(each["reordered"] for each in rows) / len(rows)
    for name in ("seconds", "denoiser_calls"):
        total = sum(each[name] for each in rows)
        result |= {name: total, f"{name}_over_exact": total / sum(each[name] for each in reference)}
    return result


def run(setting: Setting, folder: Path, source: Source | None = None) -> dict[str, Any]:
    source = Source() if source is None else source
    cells, problem = Cells(folder, setting, source), Problem(setting, source)
    price = cells(prices, context=(problem,))
    table: dict[str, Any] = {}

    def rows(make: Callable[..., dict[str, Any]], *arguments: Any, context: Any) -> list[dict[str, Any]]:
        return [cells(make, *arguments, batch, context=(problem, context)) for batch in problem.batches]

    for name in problem.rewards(0):
        reference = rows(exact, name, context=source)
        table[name] = {"exact": summarise(reference, reference)}
        for way in ways_of(source):
            table[name][way] = {
                f"{share:.3f}": summarise(rows(row, name, way, share, context=price), reference) for share in SHARES
            }
    costs = {"exact": exact_cost(setting, price), "prices": price, "shares": SHARES}
    return {"setting": dataclasses.asdict(setting), "costs": costs, "rewards": table}


def expected_seconds(setting: Setting, source: Source) -> float:
    """Returns the seconds of the whole, by the price of its evaluations now."""
    per_prompt = exact_cost(setting, prices(Problem(setting, source)))
    return 3 * setting.compared_prompts * per_prompt * (1 + len(ways_of(source)) * sum(SHARES))


def main(arguments: list[str] | None = None) -> None:
    options = parse(__doc__, "guidance_steps", arguments, flags=("expect",), prompts=64, iterations=10)
    count = TINY.prompts if options.tiny else options.prompts
    steps, scale = (25, 2.0) if options.student is None else (STUDENT_STEPS, 1.0)
    setting = TINY if options.tiny else Setting(iterations=options.iterations, steps=steps, guidance_scale=scale)
    setting = dataclasses.replace(setting, prompts=count, compared_prompts=count)
    if options.expect:
        print(f"The whole takes {expected_seconds(setting, options.source) / 60:.0f} minutes.")
        return
    result = run(setting, options.records, options.source)
    if not options.tiny:
        save(f"guidance_steps{options.source.suffix}", result)


if __name__ == "__main__":
    main()
