"""How well `total_error` holds for a likelihood by random directions as a whole: total_error.json.

    python examples/benchmarks/total_error.py [SEED ...]

The laws and points of discretisation.py, whose densities are known in closed form. The trace is taken as for a
checkpoint without a trace model: by forward differences along one random direction per level. So the error has all of
its parts: the steps, the directions, and the prior. Points at which 256 and 512 steps with exact traces differ by more
than 0.005 bits/dim are "not settled" and reported apart. Development used seeds from 1000 on; the judging seeds 0 to 9
were run once. A minute per seed on one core.
"""

import argparse
import math
import time
import warnings
from typing import Any

import discretisation
import torch
from closed_form_laws import CLASSES, Law, LawDenoiser, draw_law, draw_points
from common import save
from discretisation import FAMILIES, JUDGING, LAWS, POINTS, SETTLED, STEPS, TOLERANCE, WRONG

from diffusers_fisher import CoarseGridWarning, FiniteDifferenceFisher
from diffusers_fisher.likelihood import Integration, LikelihoodOutput, integrate_log_likelihood
from diffusers_fisher.likelihood.pipeline import DEFAULT_STEPS, DEFAULT_TOLERANCE, STEPS_FOR_TOLERANCE

WAYS: dict[str, dict[str, Any]] = {
    "one grid": {"num_steps": STEPS},
    "default": {"num_steps": DEFAULT_STEPS, "tolerance": DEFAULT_TOLERANCE},
    "tolerance": {"num_steps": STEPS_FOR_TOLERANCE, "tolerance": TOLERANCE},
}


def solve(law: Law, samples: torch.Tensor, scheduler: Any, seed: int, options: dict[str, Any]) -> LikelihoodOutput:
    denoiser = LawDenoiser(law, scheduler)
    generator = torch.Generator().manual_seed(seed)
    estimator = FiniteDifferenceFisher(denoiser)
    return integrate_log_likelihood(denoiser, samples, estimator, Integration(generator=generator, **options))


def is_settled(law: Law, samples: torch.Tensor, scheduler: Any, steps: int = 256) -> torch.Tensor:
    """Returns at which samples (n, d) twice as many steps with exact traces change nothing of note, (n,) bool."""
    coarse, fine = (
        discretisation.solve(law, samples, scheduler, num_steps=number).log_prob for number in (steps, 2 * steps)
    )
    return (fine - coarse).abs() / (samples.shape[1] * math.log(2)) <= SETTLED


def judge(seed: int) -> list[dict[str, Any]]:
    """Returns errors in bits/dim on the laws of one seed, by law, family and way, over all points."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for _ in range(LAWS):
        law, words = draw_law(generator)
        samples = torch.cat(list(draw_points(law, POINTS, generator).values()))
        bit = samples.shape[1] * math.log(2)
        begin = time.perf_counter()
        for family, make in FAMILIES.items():
            settled = is_settled(law, samples, make())
            for way, options in WAYS.items():
                out = solve(law, samples, make(), seed, options)
                truth = law.log_prob(samples, float(out.noise_to_signal[0]))
                rows.append({
                    "family": family, "way": way, "true": (out.log_prob - truth).abs() / bit,
                    "stated": out.total_error / bit, "steps": out.discretisation_error / bit,
                    "directions": 1.96 * out.standard_error / bit, "prior": out.prior_error / bit,
                    "levels": _levels(out).double(), "settled": settled,
                })  # fmt: skip
        print(f"seed {seed}, {words}: {time.perf_counter() - begin:.0f} s", flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the coverage by family, class and way."""
    result = []
    for family in FAMILIES:
        for index, name in enumerate(CLASSES):
            own = slice(index * POINTS, (index + 1) * POINTS)
            for way in WAYS:
                chosen = [row for row in rows if (row["family"], row["way"]) == (family, way)]
                values = {
                    key: torch.cat([row[key][own] for row in chosen])
                    for key in ("true", "stated", "steps", "directions", "prior", "levels", "settled")
                }
                result.append({"family": family, "class": name, "way": way, **figures(**values)})
    return result


def _levels(out: LikelihoodOutput) -> torch.Tensor:
    """Returns at how many levels each point was evaluated, (n,)."""
    calls = out.denoiser_calls_per_image
    return torch.full((len(out.log_prob),), len(out.noise_to_signal)) if calls is None else calls


def figures(
    true: torch.Tensor, stated: torch.Tensor, levels: torch.Tensor, settled: torch.Tensor, **parts: torch.Tensor
) -> dict[str, Any]:
    """Returns the columns of the study, over points (n,)."""

    def share(of: torch.Tensor) -> float:
        return float(of[settled].double().mean())

    medians = {"true": true, "stated": stated, **parts}
    return {
        "settled": int(settled.sum()), "not_settled": int((~settled).sum()), "covered": share(true <= stated),
        "wrong_unwarned": share((true > WRONG) & (stated < WRONG)),
        "not_settled_unwarned": int((stated < WRONG)[~settled].sum()), "mean_levels": float(levels.mean()),
        **{f"median_{name}": float(values[settled].median()) for name, values in medians.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=int, metavar="SEED", help="none: the judging seeds, and the JSON")
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", CoarseGridWarning)  # few steps are the point here
    result = summary([row for seed in seeds or JUDGING for row in judge(seed)])
    for row in result:
        print(row, flush=True)
    if not seeds:
        points = LAWS * len(JUDGING) * POINTS
        save("total_error", {
            "laws": LAWS * len(JUDGING), "points": points, "tolerance": TOLERANCE, "steps": STEPS, "summary": result,
        })  # fmt: skip


if __name__ == "__main__":
    main()
