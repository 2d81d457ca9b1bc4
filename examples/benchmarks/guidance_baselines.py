"""Compares `guide` with best of N, noise optimisation, guidance step by step and particles, at equal cost.

    python examples/benchmarks/guidance_baselines.py [--checkpoint sd3] [--student FOLDER]
    python examples/benchmarks/guidance_baselines.py --expect    # prints how long the whole will take
    python examples/benchmarks/guidance_baselines.py --tiny      # only to see that it runs; writes no JSON

The budget of every method is the cost of `--runs` sampling runs without guidance. Costs are numbers of samples that
the network and the decoder evaluate, with and without a backward pass, at prices in seconds that are measured once, in
turn, at the beginning. So another program on the machine does not change who wins; the seconds of every row are
reported beside. The strength of each method is searched over five values on `--search` samples with other noise, other
target classes and other target images, and the one with the highest reward is used. Every row (a method, a reward, a
strength and a batch) is kept in the folder `--records` when it is done, and a second run continues from there. The
benchmark writes guidance_baselines.json and guidance_baselines.png.

ReNO needs `--student`, the distilled checkpoint of train_student.py. The other methods don't use it.
"""

import dataclasses
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, save
from embedded_pipelines import embedded_pipeline
from guidance_baseline_methods import METHODS, NEEDS_STUDENT, Sampler, Task
from guidance_problem import Cells, Problem, Setting, Source, best_so_far, mean_and_error, parse, prices
from matplotlib.figure import Figure

from diffusers_fisher.files import save_figure

SHARES = (0.25, 0.5, 1.0)  # of the budget, at which methods that yield once are run
REFERENCE = "guide, few steps"
TINY = Setting(prompts=2, compared_prompts=2, batch=2, steps=2, rounds=1)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Holds the problems of a comparison.

    Args:
        problem, search: samples that are compared, and samples on which strengths are searched.
        student: pipeline of one step; None: methods that need it are left out.
        runs: budget per sample, in runs without guidance.
    """

    problem: Problem
    search: Problem
    student: Any
    runs: float

    @property
    def methods(self) -> list[str]:
        return [name for name in METHODS if self.student is not None or name not in NEEDS_STUDENT]

    def budget(self, prices: dict[str, float]) -> float:
        """Returns the budget of one sample in seconds."""
        return self.runs * (self.problem.setting.steps * prices["denoise"] + prices["decode"])


def spread(comparison: Comparison, name: str) -> dict[str, float]:
    """Returns the standard deviation of a reward over images without guidance."""
    search = comparison.search
    setting, prompts = search.setting, search.prompts(0)
    sampler = Sampler(search.pipe, prompts, setting.guidance_scale, setting.steps, Counter())
    with torch.no_grad():
        return {"spread": float(search.rewards(0)[name][0](sampler.images(search.noises[0]), prompts).std())}


@torch.no_grad()
def row(
    comparison: Comparison, values: dict[str, Any], name: str, method: str, strength: float | None, share: float,
    batch: int, for_search: bool,
) -> dict[str, Any]:  # fmt: skip
    """Runs one method on one batch until its budget is spent, and returns what it had by cost.

    Args:
        values: "prices", and by reward "spread".
        name: name of the reward.
        share: share of the budget.
    """
    problem = comparison.search if for_search else comparison.problem
    setting, noise, (reward, held_out) = problem.setting, problem.noises[batch], problem.rewards(batch)[name]
    budget = share * comparison.budget(values["prices"]) * len(noise)
    task = Task(
        problem.pipe, reward, problem.prompts(batch), noise, setting.steps, setting.guidance_scale, values[name],
        budget, values["prices"], comparison.student, seed=2 * batch + for_search,
    )  # fmt: skip
    result: dict[str, Any] = {"rewards": [], "held_out": [], "seconds": [], "costs": []}
    begin, cost_before = time.perf_counter(), 0.0
    for images in METHODS[method].run(task, strength):
        result["seconds"].append(time.perf_counter() - begin)
        result["costs"].append(task.cost / len(noise))
        result["rewards"].append(task.rewards(images).tolist())
        result["held_out"].append(held_out(images, task.prompts).tolist())
        begin, last_cost, cost_before = time.perf_counter(), task.cost - cost_before, task.cost
        if task.cost + last_cost > budget:  # what comes next costs at least as much
            break
    return {**result, "evaluations": {kind: count / len(noise) for kind, count in task.counts.items()}}


def summarise(rows: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns means over the samples, and differences from the reference, sample by sample."""
    best, held_out, seconds = best_so_far(rows)
    result: dict[str, Any] = {
        "seconds": float(seconds[-1]), "cost": rows[0]["costs"][-1], "evaluations": rows[0]["evaluations"],
        "costs": rows[0]["costs"][: len(best)], "curve": best.mean(1).tolist(),
        "held_out_curve": held_out.mean(1).tolist(),
    }  # fmt: skip
    last = best_so_far(reference)
    for key, mine, other in (("reward", best[-1], last[0][-1]), ("held_out", held_out[-1], last[1][-1])):
        result[key], result[f"{key}_error"] = mean_and_error(mine)
        result[f"{key}_difference"], result[f"{key}_difference_error"] = mean_and_error(mine - other)
    return result


def compare(comparison: Comparison, cells: Cells) -> dict[str, Any]:
    names = list(comparison.problem.rewards(0))
    values: dict[str, Any] = {"prices": cells(prices, context=(comparison.problem, comparison.student))}
    values |= {name: cells(spread, name, context=(comparison,))["spread"] for name in names}
    result: dict[str, Any] = {"prices": values["prices"], "budget": comparison.budget(values["prices"]), "rewards": {}}
    context = (comparison, values)
    for name in names:
        searched: dict[str, dict[str, float]] = {}
        rows: dict[str, dict[float, list[dict[str, Any]]]] = {}
        for key in comparison.methods:
            method = METHODS[key]
            trials = {}
            for strength in method.strengths if len(method.strengths) > 1 else ():
                search_rows = [
                    cells(row, name, key, strength, 1.0, batch, True, context=context)
                    for batch in comparison.search.batches
                ]
                trials[strength] = float(best_so_far(search_rows)[0][-1].mean())
            best = max(trials, key=trials.__getitem__) if trials else method.strengths[0]
            searched[key] = {str(strength): reward for strength, reward in trials.items()} | {"best": best}
            rows[key] = {
                share: [
                    cells(row, name, key, best, share, b, False, context=context) for b in comparison.problem.batches
                ]
                for share in (SHARES if method.yields_once else SHARES[-1:])
            }
        table = {key: summarise(each[1.0], rows[REFERENCE][1.0]) for key, each in rows.items()}
        for key, each in rows.items():  # one point per share of the budget
            if METHODS[key].yields_once:
                points = [summarise(each[share], rows[REFERENCE][1.0]) for share in SHARES]
                table[key]["costs"] = [point["cost"] for point in points]
                for curve, end in (("curve", "reward"), ("held_out_curve", "held_out")):
                    table[key][curve] = [point[end] for point in points]
        result["rewards"][name] = {"searched": searched, "methods": table}
    return result


def expected_seconds(comparison: Comparison, budget: float) -> float:
    """Returns the seconds of the whole at the measured prices."""
    rewards, search, main = 3, comparison.search.setting.compared_prompts, comparison.problem.setting.compared_prompts
    total = 0.0
    for name in comparison.methods:
        method = METHODS[name]
        trials = len(method.strengths) if len(method.strengths) > 1 else 0
        total += trials * search + main * (sum(SHARES) if method.yields_once else 1)
    return rewards * budget * total


def picture(result: dict[str, Any]) -> Figure:
    """Draws reward and held-out reward against the cost, one column per reward and one line per method."""
    table = result["rewards"]
    figure = Figure(figsize=(4.4 * len(table), 7), layout="constrained")
    panels = figure.subplots(2, len(table), squeeze=False)
    for column, (name, rows) in zip(panels.T, table.items(), strict=True):
        for axes, curve, label in zip(column, ("curve", "held_out_curve"), ("reward", "held-out reward"), strict=True):
            for method, entry in rows["methods"].items():
                axes.plot(entry["costs"], entry[curve], marker=".", label=method)
            axes.set(title=name, xlabel="cost per sample, seconds", ylabel=label)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    return figure


def make_comparison(setting: Setting, source: Source, search: int, runs: float) -> Comparison:
    """Loads the checkpoint that guides, and the student beside it."""
    teacher = Source(source.checkpoint)
    problem = Problem(setting, teacher)
    searched = Problem(dataclasses.replace(setting, compared_prompts=search), teacher, for_search=True)
    student = None
    if source.student is not None:
        student = problem.stack.enter_context(embedded_pipeline("sd", source.student))
    return Comparison(problem, searched, student, runs)


def main(arguments: list[str] | None = None) -> None:
    options = parse(__doc__, "guidance_baselines", arguments, flags=("expect",), prompts=64, search=16, runs=32)
    count, search, runs = (2, 2, 2) if options.tiny else (options.prompts, options.search, options.runs)
    setting = TINY if options.tiny else Setting(prompts=count, compared_prompts=count)
    comparison = make_comparison(setting, options.source, search, runs)
    note = {"runs": runs, "search": search, "with_student": comparison.student is not None}
    cells = Cells(options.records, setting, options.source, **note)
    budget = comparison.budget(cells(prices, context=(comparison.problem, comparison.student)))
    print(f"At the measured prices the whole takes {expected_seconds(comparison, budget) / 3600:.1f} hours.")
    if options.expect:
        return
    result = {"setting": dataclasses.asdict(setting) | note, **compare(comparison, cells)}
    if not options.tiny:
        save(f"guidance_baselines{options.source.suffix}", result)
        save_figure(picture(result), Path(FOLDER / f"guidance_baselines{options.source.suffix}.png"))


if __name__ == "__main__":
    main()
