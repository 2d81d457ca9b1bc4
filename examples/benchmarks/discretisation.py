"""How well the stated discretisation error holds, in and out of distribution: discretisation.json.

python examples/benchmarks/discretisation.py [SEED ...]

Laws, points and all choices come from the seed. Development used seeds from 1000 on; the judging seeds 0 to 9 were run
once, when the algorithm was done. Denoiser and trace are exact, in float64. The true error is the difference from
1024 steps; points at which 512 and 1024 steps differ by more than 0.005 bits/dim are "not settled" and reported apart.
Every seed's results are kept in outputs/discretisation, so that several processes can share the seeds, and the JSON is
of all judging seeds that are there. Three minutes per seed on one core.
"""

import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from closed_form_laws import CLASSES, Law, LawDenoiser, LawTrace, draw_law, draw_points
from common import save

from diffusers_fisher import CoarseGridWarning
from diffusers_fisher.files import write_json
from diffusers_fisher.likelihood import Integration, LikelihoodOutput, integrate_log_likelihood

FAMILIES: dict[str, Callable[[], Any]] = {
    "Stable Diffusion": lambda: diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False
    ),
    "flow matching": diffusers.FlowMatchEulerDiscreteScheduler,
}
JUDGING = range(10)
LAWS, POINTS = 3, 12  # laws per seed, points of each class per law
STEPS, REFERENCE = 32, (512, 1024)
TOLERANCE = 0.01
SETTLED, WRONG = 0.005, 0.05  # bits/dim
FOLDER = Path("outputs/discretisation")
WAYS: dict[str, dict[str, Any]] = {
    "one grid": {"num_steps": STEPS},
    "step halving": {"num_steps": STEPS, "step_halving": True},
    "tolerance": {"num_steps": 38, "tolerance": TOLERANCE},
}


def solve(law: Law, samples: torch.Tensor, scheduler: Any, **options: Any) -> LikelihoodOutput:
    denoiser = LawDenoiser(law, scheduler)
    return integrate_log_likelihood(denoiser, samples, LawTrace(denoiser), Integration(num_probes=None, **options))


def judge(seed: int) -> dict[str, Any]:
    """Errors of every way on the laws of one seed: lists over points by family, class and way."""
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Any] = {"laws": [], "points": []}
    for _ in range(LAWS):
        law, words = draw_law(generator)
        classes = draw_points(law, POINTS, generator)
        result["laws"].append(words)
        samples = torch.cat(list(classes.values()))
        bit = samples.shape[1] * math.log(2)
        for family, make in FAMILIES.items():
            begin = time.perf_counter()
            fine, finer = (solve(law, samples, make(), num_steps=steps).log_prob for steps in REFERENCE)
            row: dict[str, Any] = {"family": family, "law": words, "moved": (finer - fine).abs() / bit, "ways": {}}
            for way, options in WAYS.items():
                out = solve(law, samples, make(), **options)
                calls = out.denoiser_calls_per_image
                row["ways"][way] = {
                    "true": (out.log_prob - finer).abs() / bit, "stated": out.discretisation_error / bit,
                    "calls": torch.full((len(samples),), out.num_denoiser_calls) if calls is None else calls,
                }  # fmt: skip
            result["points"].append(row)
            print(f"seed {seed}, {words}, {family}: {time.perf_counter() - begin:.0f} s", flush=True)
    return result


def summary(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Coverage by family, class and way."""
    rows = []
    for family in FAMILIES:
        for index, name in enumerate(CLASSES):
            own = slice(index * POINTS, (index + 1) * POINTS)
            laws = [row for result in results for row in result["points"] if row["family"] == family]
            settled = torch.cat([row["moved"][own] for row in laws]) <= SETTLED
            for way in WAYS:
                true, stated, calls = (
                    torch.cat([row["ways"][way][key][own] for row in laws]) for key in ("true", "stated", "calls")
                )
                rows.append({"family": family, "class": name, "way": way, **figures(true, stated, calls, settled)})
    return rows


def figures(true: torch.Tensor, stated: torch.Tensor, calls: torch.Tensor, settled: torch.Tensor) -> dict[str, Any]:
    """The columns of the study, over points (n,); errors in bits/dim."""
    wrong = (true > WRONG) & (stated < WRONG)
    holds = settled & (stated <= TOLERANCE)

    def share(of: torch.Tensor, among: torch.Tensor) -> float | None:
        return float(of[among].double().mean()) if bool(among.any()) else None

    def median(values: torch.Tensor) -> float | None:
        return float(values[settled].median()) if bool(settled.any()) else None

    return {
        "settled": int(settled.sum()), "not_settled": int((~settled).sum()),
        "covered": share(stated >= true, settled), "wrong_unwarned": share(wrong, settled),
        "median_true": median(true), "median_stated": median(stated),
        "not_settled_unwarned": int((stated < WRONG)[~settled].sum()),
        "within_40_calls": share((calls <= 40) & (stated <= TOLERANCE), settled),
        "reached": share(stated <= TOLERANCE, settled),
        "reached_and_within_tolerance": share(true <= TOLERANCE, holds),
        "mean_calls": float(calls.double().mean()),
    }  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    for row in result["points"]:
        row["moved"] = torch.tensor(row["moved"], dtype=torch.float64)
        row["ways"] = {
            way: {key: torch.tensor(values, dtype=torch.float64) for key, values in each.items()}
            for way, each in row["ways"].items()
        }
    return result


def main() -> None:
    torch.set_num_threads(1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore", CoarseGridWarning)  # few steps are the point here
    for seed in map(int, sys.argv[1:]) if len(sys.argv) > 1 else JUDGING:
        path = FOLDER / f"seed_{seed}.json"
        if not path.is_file():
            write_json(path, _plain(judge(seed)))
    paths = [FOLDER / f"seed_{seed}.json" for seed in JUDGING]
    if not all(path.is_file() for path in paths):
        return
    results = [_read(path) for path in paths]
    save("discretisation", {
        "steps": STEPS, "tolerance": TOLERANCE, "laws": [words for result in results for words in result["laws"]],
        "points_per_class_and_family": len(results) * LAWS * POINTS, "summary": summary(results),
        "by_seed": [
            {"seed": seed, "summary": [row for row in summary([result]) if row["way"] == "tolerance"]}
            for seed, result in zip(JUDGING, results, strict=True)
        ],
    })  # fmt: skip


def _plain(value: Any) -> Any:
    """The value with lists for tensors."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main()
