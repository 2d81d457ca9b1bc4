"""Intrinsic dimensions by trained trace models on linear manifolds of known dimension; writes trained_dimension.json.

    python examples/benchmarks/trained_dimension.py

The laws are subspaces of dimension 1 to 64 in 256 dimensions, and a union of all of them, whose model has to see on
which subspace a sample lies. The dimension is judged at points of the manifold themselves, without noise, whereas a
trace model was trained on noisy samples. Half an hour on one core.
"""

import argparse
from typing import Any

import torch
from common import save
from diffusers import DDIMScheduler
from manifolds import SHAPE, on_subspace, subspaces
from trace_matching_mixture import SampledDenoiser, train

from diffusers_fisher import TraceMatchingFisher
from diffusers_fisher.curvature import denoiser_intrinsic_dimension
from diffusers_fisher.testing import OracleDenoiser

SIZES, POINTS = (1, 4, 16, 64), 32
NETWORK = {"in_channels": 4, "patch_size": 1, "block_out_channels": (32, 64), "prior_shape": SHAPE}


class LawDenoiser(OracleDenoiser, SampledDenoiser):
    """Draws samples of the law too, for the training."""

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return self.oracle.sample(count, generator).float()


def trained(name: str, numbers: dict[int, int], steps: int) -> dict[str, Any]:
    """Trains a model of the union of subspaces, and returns its dimensions on each of them.

    Args:
        numbers: number of each subspace by its dimension.
    """
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    denoiser = LawDenoiser(subspaces(*numbers), scheduler)
    model = train(denoiser, steps, 0, **NETWORK)
    rows = []
    for size, number in numbers.items():
        points = on_subspace(POINTS, size, number)
        out = denoiser_intrinsic_dimension(denoiser, points, TraceMatchingFisher(model), num_probes=None)
        gaps = (out.value - size).abs()
        rows.append({
            "dimension": size, "mean": float(out.value.mean()), "mean_error": float(gaps.mean()),
            "largest_error": float(gaps.max()), "allowed_error": max(1.0, 0.1 * size),
            "within": float((gaps <= max(1.0, 0.1 * size)).double().mean()),
            "has_plateau": float(out.has_plateau.double().mean()),
        })  # fmt: skip
        print(name, rows[-1], flush=True)
    return {"law": name, "points": POINTS, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    laws = {f"subspace of dimension {size}": {size: 0} for size in SIZES}
    laws["union of all"] = {size: number for number, size in enumerate(SIZES)}
    results = [trained(name, numbers, steps) for name, numbers in laws.items()]
    save("trained_dimension", {"steps": steps, "laws": results})


if __name__ == "__main__":
    main()
