"""Measures guidance on the embedded checkpoint: cost of an iteration, memory, gradients, rewards by time.

    python examples/benchmarks/guidance.py                        # most of an hour on two cores
    python examples/benchmarks/guidance.py --tiny --picture P.png # only to see that it runs; writes no JSON

The benchmark writes guidance.json and guidance.png. Methods that leave classifier-free guidance out of the backward
pass are run with the first reward alone. Every cell (a part, or a method with a reward) is kept in the folder
`--records` when it is done, and a second run continues from there. All times of one table should come from one machine
without other work.
"""

import argparse
import dataclasses
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import PICTURES, paired_seconds, ratio, save
from guidance_methods import DEFAULT
from guidance_problem import TINY, Cells, Problem, Setting, best_so_far
from matplotlib.figure import Figure

from diffusers_fisher import posterior_guidance
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.files import check_writable, save_figure
from diffusers_fisher.guidance import AscentSettings, GuidedRun, ascend_noise
from diffusers_fisher.guidance.checks import checked_reward

EXACT = ("stored graph", "per-step recomputation")
LEFT_OUT = "guidance left out"  # end of the names of methods that are run with the first reward alone
STRENGTHS = (0.2, 0.4)  # the default, and twice the default


def one_iteration(problem: Problem, method: tuple, reward: Any, noise: torch.Tensor) -> torch.Tensor:
    """Runs sampling, decoding, reward and gradient, as in each guidance step."""
    sample, scheduler, estimator = method
    with scheduler.differentiable(estimator) as trajectory:
        latents = sample(noise)
    return trajectory.gradient(checked_reward(reward, backbone_of(problem.pipe).decode(latents), []).sum())


def floor(problem: Problem, method: tuple, reward: Any, noise: torch.Tensor) -> torch.Tensor:
    """Runs what every method needs: a run without a record, decoding, and the reward's gradient at the latents."""
    latents = method[0](noise).detach().requires_grad_()
    return torch.autograd.grad(checked_reward(reward, backbone_of(problem.pipe).decode(latents), []).sum(), latents)[0]


def iteration_cost(problem: Problem) -> dict[str, Any]:
    table, noise = problem.methods(0).table, problem.noises[0]
    reward = problem.rewards(0)["another class"][0]
    tasks: dict[str, Callable] = {"floor": lambda: floor(problem, table["direct"], reward, noise)}
    for name, method in table.items():
        tasks[name] = lambda method=method: one_iteration(problem, method, reward, noise)
    seconds = paired_seconds(tasks, problem.setting.rounds)
    exact = min(EXACT, key=lambda name: statistics.median(seconds[name]))
    over = {name: ratio(seconds, name, "floor") for name in table}
    return {
        "rounds": problem.setting.rounds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "over_floor": {name: value for name, value in over.items() if not name.endswith(LEFT_OUT)},
        "over_floor_with_guidance_left_out": {name: value for name, value in over.items() if name.endswith(LEFT_OUT)},
        "faster_exact_method": exact,
        "exact_over_default": ratio(seconds, exact, DEFAULT),
        "recomputation_over_default": ratio(seconds, "per-step recomputation", DEFAULT),
    }


def graph_bytes(noise: torch.Tensor, sample: Any, scheduler: Any, estimator: Any) -> int:
    """Returns the bytes that autograd keeps for the backward pass of one sampling run. Every storage counts once."""
    storages: dict[int, int] = {}
    references = []  # so that no address is used twice during the count

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        references.append(storage)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, scheduler.differentiable(estimator) as trajectory:
        latents = sample(noise)
    states = sum(2 * state.sample.numel() * state.sample.element_size() for state in trajectory.states)
    del latents
    return sum(storages.values()) + states


def memory(problem: Problem) -> dict[str, Any]:
    """Returns the bytes that the graph keeps by number of steps, and their slope in units of one latent batch."""
    result: dict = {}
    noise, counts = problem.noises[0], problem.setting.memory_steps
    tables = {steps: problem.methods(0, steps).table for steps in counts}
    latent = noise.numel() * noise.element_size()
    for name in ("direct", "stored graph"):
        sizes = {steps: graph_bytes(noise, *table[name]) for steps, table in tables.items()}
        slope = (sizes[counts[-1]] - sizes[counts[-2]]) / (counts[-1] - counts[-2])
        by_steps = {str(steps): size for steps, size in sizes.items()}
        result[name] = {"bytes_by_steps": by_steps, "latent_batches_a_step": slope / latent}
    parameters = sum(p.numel() * p.element_size() for p in problem.pipe.unet.parameters())
    return {"latent_batch_bytes": latent, "unet_parameter_bytes": parameters, **result}


def gradients(problem: Problem, name: str) -> dict[str, Any]:
    """Returns the cosine with the stored graph's gradient, and the ratio of norms: means over the first batch."""
    reward, noise, table = problem.rewards(0)[name][0], problem.noises[0], problem.methods(0).table
    exact = one_iteration(problem, table["stored graph"], reward, noise).double().flatten(1)
    rows = {}
    for method in table:
        gradient = one_iteration(problem, table[method], reward, noise).double().flatten(1)
        cosine = torch.nn.functional.cosine_similarity(gradient, exact)
        rows[method] = {
            "cosine": float(cosine.mean()),
            "norm_ratio": float((gradient.norm(dim=1) / exact.norm(dim=1)).log().mean().exp()),
            "relative_error": float(((gradient - exact).norm(dim=1) / exact.norm(dim=1)).mean()),
        }
    return rows


def curve(problem: Problem, name: str, method: str, batch: int) -> dict[str, Any]:
    """Runs normalised ascent of one batch with one method. Noise and step size are the same for all methods."""
    setting, noise = problem.setting, problem.noises[batch]
    reward, held_out = problem.rewards(batch)[name]
    sample, scheduler, estimator = problem.methods(batch).table[method]
    run = GuidedRun(sample, backbone_of(problem.pipe).decode, reward, [], scheduler, estimator, held_out)
    ascent = ascend_noise(run, noise, AscentSettings(setting.iterations, setting.step_size))
    return {
        "rewards": torch.stack(ascent.rewards).tolist(), "held_out": torch.stack(ascent.held_out_rewards).tolist(),
        "seconds": ascent.seconds, "status": ascent.status,
    }  # fmt: skip


def per_step(problem: Problem, name: str, estimator: str, strength: float, batch: int) -> dict[str, Any]:
    """Runs per-step guidance once for one batch."""
    methods, noise = problem.methods(batch), problem.noises[batch]
    reward, held_out = problem.rewards(batch)[name]
    pipe = methods.stock()
    begin = time.perf_counter()
    with posterior_guidance(pipe, reward, strength=strength, estimator=methods.estimators()[estimator]) as guidance:
        latents = pipe(latents=noise, callback_on_step_end=guidance, **methods.arguments)[0]
    with torch.no_grad():
        images = backbone_of(problem.pipe).decode(latents)
        values = {"rewards": reward(images, []).tolist(), "held_out": held_out(images, []).tolist()}
    return {**values, "seconds": time.perf_counter() - begin}


def summarise(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns by run the means over all prompts of the best reward so far and of the held-out reward of its image."""
    best, held_out, seconds = best_so_far(cells)
    prompts = best.shape[1]
    return {
        "before": float(best[0].mean()), "after": float(best[-1].mean()),
        "standard_error": float(best[-1].std() / prompts**0.5),
        "held_out_before": float(held_out[0].mean()), "held_out_after": float(held_out[-1].mean()),
        "held_out_standard_error": float(held_out[-1].std() / prompts**0.5),
        "curve": best.mean(1).tolist(), "held_out_curve": held_out.mean(1).tolist(), "seconds_curve": seconds.tolist(),
        "seconds": float(seconds[-1]), "prompts": prompts,
        "stopped_early": [cell["status"] for cell in cells if cell["status"] != "completed"],
    }  # fmt: skip


def time_to_exact(
    cells: dict[str, list[dict[str, Any]]], exact: str, methods: Sequence[str] = (DEFAULT, "direct")
) -> dict[str, Any]:
    """Returns by method of `methods` the time until it reaches the exact method's last reward.

    The time is relative to that of the exact method. The result also says how much higher the held-out reward then is,
    prompt by prompt. The time of the first run, which is without guidance, counts for all methods.
    """
    target = float(best_so_far(cells[exact])[0][-1].mean())

    def time_to_target(method: str) -> tuple[Any, Any]:
        best, held_out, seconds = best_so_far(cells[method])
        places = (best.mean(1) >= target).nonzero().flatten().tolist()
        return (float(seconds[places[0]]), held_out[places[0]]) if places else (None, None)

    exact_seconds, at_exact = time_to_target(exact)
    rows: dict[str, Any] = {
        "exact_method": exact, "exact_seconds": exact_seconds, "exact_reward": target, "prompts": len(at_exact),
        "held_out_exact": float(at_exact.mean()),
    }  # fmt: skip
    for method in methods:
        method_seconds, at_target = time_to_target(method)
        rows[method] = {"seconds": method_seconds}
        if method_seconds is not None:
            difference = at_target - at_exact
            rows[method] |= {
                "share_of_exact": method_seconds / exact_seconds, "held_out": float(at_target.mean()),
                "held_out_difference": float(difference.mean()),
                "held_out_median_difference": float(difference.median()),
                "held_out_difference_standard_error": float(difference.std() / len(difference) ** 0.5),
            }  # fmt: skip
    return rows


def import_time(rounds: int) -> dict[str, Any]:
    """Compares the time of processes that run `import diffusers_fisher` and `import diffusers`."""

    def task(name: str) -> Callable:
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True)

    seconds = paired_seconds({name: task(name) for name in ("diffusers", "diffusers_fisher")}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"median_seconds": medians, "ratio": ratio(seconds, "diffusers_fisher", "diffusers")}


def run(setting: Setting, folder: Path) -> dict[str, Any]:
    cells, problem = Cells(folder, setting), Problem(setting)
    iteration = cells(iteration_cost, context=(problem,))
    exact = iteration["faster_exact_method"]
    names, methods = list(problem.rewards(0)), list(problem.methods(0).table)
    batches = range(setting.prompts // setting.batch)
    curves: dict[str, Any] = {name: {} for name in names}
    for place, name in enumerate(names):
        for method in methods:
            if place and method.endswith(LEFT_OUT):
                continue
            curves[name][method] = [cells(curve, name, method, b, context=(problem,)) for b in batches]
    comparisons: dict[str, Any] = {name: {} for name in names}
    for name in names:
        for method in (exact, DEFAULT, "direct"):
            extra_cells = [
                cells(curve, name, method, b, context=(problem,)) for b in range(len(batches), len(problem.noises))
            ]
            comparisons[name][method] = curves[name][method] + extra_cells
    steps: dict[str, Any] = {name: {} for name in names}
    for name in names:
        for estimator in ("direct", "gaussian", "finite difference", "per-step recomputation"):
            for strength in STRENGTHS:
                rows = [cells(per_step, name, estimator, strength, b, context=(problem,)) for b in batches]
                steps[name].setdefault(estimator, {})[str(strength)] = {
                    "reward": _mean(rows, "rewards"), "held_out": _mean(rows, "held_out"),
                    "seconds": sum(row["seconds"] for row in rows),
                }  # fmt: skip
    return {
        "setting": dataclasses.asdict(setting),
        "import": cells(import_time, context=(setting.import_rounds,)),
        "iteration": iteration,
        "memory": cells(memory, context=(problem,)),
        "gradients": {name: cells(gradients, name, context=(problem,)) for name in names},
        "reward_after_ten_iterations": {
            name: {method: summarise(cells_of_method) for method, cells_of_method in rows.items()}
            for name, rows in curves.items()
        },
        "time_to_exact": {name: time_to_exact(rows, exact) for name, rows in comparisons.items()},
        "per_step": steps,
    }


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(torch.tensor([value for row in rows for value in row[name]], dtype=torch.float64).mean())


def picture(result: dict[str, Any]) -> Figure:
    """Draws the mean best reward against the seconds for all prompts.

    There is one panel per reward and one line per method. Per-step guidance has one point per strength.
    """
    table = result["reward_after_ten_iterations"]
    figure = Figure(figsize=(4.4 * len(table), 4.6), layout="constrained")
    panels = figure.subplots(1, len(table), squeeze=False)[0]
    colours = {method: f"C{place}" for place, method in enumerate(next(iter(table.values())))}
    for axes, (name, rows) in zip(panels, table.items(), strict=True):
        for method, row in rows.items():
            axes.plot(
                row["seconds_curve"], row["curve"], marker=".", color=colours[method], label=method,
                linestyle="--" if method in EXACT else "-",
            )  # fmt: skip
        for estimator, cells in result["per_step"][name].items():
            points = [(cell["seconds"], cell["reward"]) for cell in cells.values()]
            axes.plot(
                *zip(*points, strict=True), linestyle="", marker="*", markersize=9, color=colours[estimator],
                label=f"step by step, {estimator}",
            )  # fmt: skip
        axes.set(title=name, xlabel="seconds", ylabel="reward", xscale="log")
    handles, labels = panels[0].get_legend_handles_labels()  # the first panel has every method
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    return figure


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=Path, default=Path("outputs/benchmarks/guidance"))
    parser.add_argument("--picture", type=Path, help="file of the plot; default: guidance.png, or none with --tiny")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    picture_file = options.picture or (None if options.tiny else PICTURES / "guidance.png")
    if picture_file is not None:
        check_writable(picture_file.parent)
    result = run(TINY if options.tiny else Setting(), options.records)
    if not options.tiny:
        save("guidance", result)
    if picture_file is not None:
        save_figure(picture(result), picture_file)


if __name__ == "__main__":
    main()
