"""What random directions of the trace leave in a likelihood: scatter, its stated error, bias, and cost.

    python examples/benchmarks/likelihood_probes.py [PART ...] [--checkpoint sd3]

The parts are scatter, coverage, sizes, bias, half_precision and reference; without names all run. Everything is on
test images with their own prompts. "scatter" takes 200 directions per level at once: the sum over the levels of one
direction each is what a likelihood with one direction per level adds up, so it stands for 200 seeds. "coverage" runs
whole likelihoods with different seeds, in every way. "reference" compares with the adaptive integration by whole
Jacobians of likelihood.json. Writes likelihood_probes.json; with --checkpoint sd3
likelihood_probes_sd3.json, without "reference" and without "sizes", because its transformer takes no larger latents.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from common import FOLDER, machine
from embedded_pipelines import NAMES, embedded_pipeline

from diffusers_fisher import (
    AutodiffFisher,
    FiniteDifferenceFisher,
    LikelihoodOutput,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.files import write_json

IMAGES, DIRECTIONS, SEEDS, PIECE = 16, 200, 20, 8
FEW_IMAGES = 4  # where the number of directions matters, and not that of images
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "1 per level": (SEEDS, {"num_inference_steps": 32}),
    "2 per level": (SEEDS, {"num_inference_steps": 21, "num_probes": 2}),
    "2 per level on average, dealt": (SEEDS, {"num_inference_steps": 21, "num_probes": 2, "dealt_probes": True}),
    "4 per level": (10, {"num_inference_steps": 32, "num_probes": 4}),
    "1 per level, by back-propagation": (10, {"num_inference_steps": 32, "estimator": AutodiffFisher()}),
    "2, the same at all levels": (SEEDS, {"num_inference_steps": 32, "num_probes": 2, "fixed_probes": True}),
}
"""Ways to a trace by random directions: number of seeds, and options."""


class Problem:
    """Holds a pipeline, and latents and prompts of test images."""

    def __init__(self, pipe: Any):
        self.pipe = pipe
        images, labels = embedded_test_images()
        self.latents = backbone_of(self.pipe).samples_of(images[:IMAGES])
        self.prompts = [embedded_prompt(int(label)) for label in labels[:IMAGES]]

    def score(self, rows: slice, seed: int, latents: torch.Tensor | None = None, **options: Any) -> LikelihoodOutput:
        """Returns likelihoods of some images, by forward differences unless the options say otherwise."""
        samples = self.latents[rows] if latents is None else latents
        options = {"estimator": FiniteDifferenceFisher(), **options}
        generator = torch.Generator().manual_seed(seed)
        keys = [str(index) for index in range(len(self.latents))][rows]
        return self.pipe.log_likelihood(
            prompt=self.prompts[rows], latents=samples, generator=generator, image_keys=keys, **options
        )


def pieces(count: int) -> list[slice]:
    return [slice(first, min(first + PIECE, count)) for first in range(0, count, PIECE)]


def spread(by_direction: torch.Tensor) -> dict[str, float]:
    """Returns the root mean square and the largest of the images' scatter; `by_direction` (n, B) bits/dim."""
    scatter = by_direction.std(0)
    return {"scatter": float(scatter.square().mean().sqrt()), "largest": float(scatter.max())}


def directions(problem: Problem, steps: int, count: int, latents: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the traces' integrals by one direction per level, (directions, B) bits/dim."""
    total = len(problem.latents[:count]) if latents is None else len(latents)
    parts = []
    for rows in pieces(total):
        samples = None if latents is None else latents[rows]
        out = problem.score(rows, 0, samples, num_inference_steps=steps, num_probes=DIRECTIONS)
        parts.append(out.to_bits(out.trace_by_probe))
    return torch.cat(parts, dim=1)


def scatter(problem: Problem) -> dict[str, Any]:
    """Returns the scatter by the number of levels."""
    rows = []
    for steps, images in ((32, IMAGES), (20, FEW_IMAGES), (64, FEW_IMAGES)):
        values = spread(directions(problem, steps, images))
        rows.append({"levels": steps + 1, "calls": 2 * (steps + 1), "images": images, **values})
        print(rows[-1], flush=True)
    return {"directions": DIRECTIONS, "rows": rows}


def coverage(problem: Problem) -> dict[str, Any]:
    """Returns scatter, stated error, coverage and cost of whole likelihoods by seeds, for every way."""
    rows = {}
    for name, (seeds, options) in WAYS.items():
        parts, begin = [], time.process_time()
        for piece in pieces(IMAGES):
            outputs = [problem.score(piece, seed, **options) for seed in range(seeds)]
            values, errors = (
                torch.stack([getattr(out, field) for out in outputs]) for field in ("bits_per_dim", "standard_error")
            )
            parts.append(torch.stack([values, outputs[0].to_bits(errors)]))
        values, errors = torch.cat(parts, dim=2)
        # The mean over the seeds stands for the truth; with it a deviation is too small by a factor.
        ratio = (values - values.mean(0)) / errors * (seeds / (seeds - 1)) ** 0.5
        rows[name] = {
            "calls": outputs[0].num_denoiser_calls, "seeds": seeds, **spread(values),
            "processor_seconds": (time.process_time() - begin) / seeds / IMAGES,
            "stated": float(errors.square().mean().sqrt()),
            "within_1": float((ratio.abs() < 1).double().mean()),
            "within_1.96": float((ratio.abs() < 1.96).double().mean()),
            "mean_bits_per_dim": values.mean(0).tolist(),
        }  # fmt: skip
        print(name, {key: value for key, value in rows[name].items() if key != "mean_bits_per_dim"}, flush=True)
    return {"images": IMAGES, "rows": rows}


def sizes(problem: Problem) -> dict[str, Any]:
    """Returns the scatter of tiled images by the number of dimensions, and the slope of its logarithm."""
    rows = []
    for tiles, images in ((1, FEW_IMAGES), (2, FEW_IMAGES), (4, 2)):
        latents = problem.latents[:images].tile(1, 1, tiles, tiles)
        values = spread(directions(problem, 32, images, latents))
        rows.append({"dimensions": latents[0].numel(), "images": images, **values})
        print(rows[-1], flush=True)
    x, y = (torch.tensor([math.log(row[name]) for row in rows]) for name in ("dimensions", "scatter"))
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    return {"rows": rows, "slope": slope}


def paired(differences: list[torch.Tensor]) -> dict[str, float]:
    """Returns mean and standard error over the images of differences, each (B,) bits/dim of one seed."""
    by_image = torch.stack(differences).mean(0)
    return {
        "mean": float(by_image.mean()), "standard_error": float(by_image.std() / len(by_image) ** 0.5),
        "largest": float(by_image.abs().max()), "images": len(by_image), "seeds": len(differences),
    }  # fmt: skip


def bias(problem: Problem) -> dict[str, Any]:
    """Returns paired differences of finite differences from back-propagation along the same directions and path."""
    rows = []
    for seed in range(2):
        outputs = [
            torch.cat([problem.score(piece, seed, estimator=estimator).bits_per_dim for piece in pieces(IMAGES)])
            for estimator in (FiniteDifferenceFisher(), AutodiffFisher())
        ]
        rows.append(outputs[0] - outputs[1])
    return paired(rows)


def half_precision(problem: Problem) -> dict[str, Any]:
    """Returns paired differences of networks in half precision from float32, by the same directions."""
    pipe, result = problem.pipe, {}
    before = torch.cat([problem.score(piece, 0).bits_per_dim for piece in pieces(IMAGES)])
    names = {dtype: str(dtype).removeprefix("torch.") for dtype in (torch.float16, torch.bfloat16)}
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    states = [{name: value.clone() for name, value in part.state_dict().items()} for part in networks]
    for dtype, name in names.items():
        pipe.to(dtype)
        after = torch.cat([problem.score(piece, 0).bits_per_dim for piece in pieces(IMAGES)])
        result[name] = paired([after - before])
        print(name, result[name], flush=True)
        pipe.to(torch.float32)
        for part, state in zip(networks, states, strict=True):
            part.load_state_dict(state)  # not the rounded weights
    return result


def reference(problem: Problem) -> dict[str, Any]:
    """Returns how far whole likelihoods are from the adaptive integration, in their standard errors."""
    expected = json.loads((FOLDER / "likelihood.json").read_text())["reference"]
    truth = torch.tensor(expected["bits_per_dim"], dtype=torch.float64)
    outputs = [problem.score(piece, 0) for piece in pieces(IMAGES)]
    values = torch.cat([out.bits_per_dim for out in outputs])
    errors = torch.cat([out.to_bits(out.standard_error) for out in outputs])
    total = torch.cat([out.to_bits(out.total_error) for out in outputs])
    gaps = values - truth
    return {
        "images": IMAGES, "mean": float(gaps.mean()), "standard_error": float(errors.square().sum().sqrt() / IMAGES),
        "largest_in_standard_errors": float((gaps / errors).abs().max()),
        "within_total_error": float((gaps.abs() <= total).double().mean()), "reference_error": expected["error"],
    }  # fmt: skip


PARTS: dict[str, Callable[[Problem], dict[str, Any]]] = {
    "scatter": scatter, "coverage": coverage, "sizes": sizes, "bias": bias, "half_precision": half_precision,
    "reference": reference,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; none: all")
    parser.add_argument("--checkpoint", choices=NAMES, default="sd")
    parser.add_argument("--folder", help="another checkpoint of that kind; no JSON is written")
    arguments = parser.parse_args()
    is_first = arguments.checkpoint == "sd"
    path = FOLDER / ("likelihood_probes.json" if is_first else f"likelihood_probes_{arguments.checkpoint}.json")
    result = json.loads(path.read_text()) if path.is_file() else {}
    with embedded_pipeline(arguments.checkpoint, arguments.folder) as pipe:
        problem = Problem(pipe)
        for name in arguments.parts or [name for name in PARTS if is_first or name not in ("reference", "sizes")]:
            result[name] = {"machine": machine(), **PARTS[name](problem)}
            print(name, result[name], flush=True)
            if arguments.folder is None:
                write_json(path, result)


if __name__ == "__main__":
    main()
