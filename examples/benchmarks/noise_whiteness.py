"""Measures what keeping the noise white does to guidance on the embedded checkpoint: rewards and held-out rewards.

    python examples/benchmarks/noise_whiteness.py [--checkpoint sd3 | --student FOLDER]
    python examples/benchmarks/noise_whiteness.py --expect                  # prints how long the whole will take
    python examples/benchmarks/noise_whiteness.py --prompts 16 --steps 8    # a first look, a few minutes
    python examples/benchmarks/noise_whiteness.py --tiny                    # only to see that it runs; writes no JSON

The student, the distilled checkpoint of train_student.py, makes its images in one step. The benchmark writes
noise_whiteness.json, with the network's name behind it where it is not the first checkpoint. Every row (a reward, a
projection and a batch) is kept in the folder `--records` when it is done, and a second run continues from there.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from common import save
from guidance_problem import TINY, Cells, Problem, Setting, Source, best_so_far, mean_and_error, parse, prices

PROJECTIONS = ("none", "soft", "hard")
DIFFERENCE = ("held_out_difference", "held_out_difference_standard_error")


def row(problem: Problem, name: str, projection: str, batch: int) -> dict[str, Any]:
    """Guides one batch, and returns what every run had, by run and prompt."""
    setting = problem.setting
    reward, held_out = problem.rewards(batch)[name]
    out = problem.pipe.guide(
        problem.prompts(batch), reward, held_out_reward=held_out,
        latents=problem.noises[batch], num_guidance_steps=setting.iterations, step_size=setting.step_size,
        num_inference_steps=setting.steps, guidance_scale=setting.guidance_scale, output_type="pt",
        noise_projection=None if projection == "none" else projection, generator=torch.Generator().manual_seed(batch),
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
            **dict(zip(DIFFERENCE, mean_and_error(difference), strict=True)),
        }  # fmt: skip
    return result


def run(setting: Setting, folder: Path, source: Source | None = None) -> dict[str, Any]:
    cells, problem = Cells(folder, setting, source), Problem(setting, source)
    result: dict[str, Any] = {"setting": dataclasses.asdict(setting), "after": {}, "at_equal_reward": {}}
    for name in problem.rewards(0):
        rows = {
            projection: [cells(row, name, projection, batch, context=(problem,)) for batch in problem.batches]
            for projection in PROJECTIONS
        }
        result["after"][name] = {projection: summarise(each) for projection, each in rows.items()}
        result["at_equal_reward"][name] = at_equal_reward(rows)
    return result


def expected_seconds(setting: Setting, source: Source) -> float:
    """Returns the seconds of the whole, by the price of its evaluations now."""
    price = prices(Problem(setting, source))
    run_price = (setting.steps + 1) * price["denoise"] + price["decode backward"]
    return 3 * len(PROJECTIONS) * setting.compared_prompts * (setting.iterations + 1) * run_price


def main(arguments: list[str] | None = None) -> None:
    options = parse(__doc__, "noise_whiteness", arguments, flags=("expect",), prompts=64, steps=25, iterations=10)
    steps, scale = (options.steps, 2.0) if options.student is None else (1, 1.0)
    setting = TINY if options.tiny else Setting(steps=steps, guidance_scale=scale, iterations=options.iterations)
    count = setting.prompts if options.tiny else options.prompts
    setting = dataclasses.replace(setting, prompts=count, compared_prompts=count)
    if options.expect:
        print(f"The whole takes {expected_seconds(setting, options.source) / 60:.0f} minutes.")
        return
    result = run(setting, options.records, options.source)
    if not options.tiny:
        save(f"noise_whiteness{options.source.suffix}", result)


if __name__ == "__main__":
    main()
