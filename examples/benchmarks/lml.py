"""Does Levenberg-Marquardt-Langevin help on the embedded checkpoint? A comparison of samplers at equal calls.

    python examples/benchmarks/lml.py
    python examples/benchmarks/lml.py --report    # reports the cells that are done so far

The benchmark needs Fashion-MNIST (Debian's dataset-fashion-mnist), and writes lml.json and lml.png. It takes two hours
on one core (one hour with `--compile`). Every cell is kept in the output folder when it is done, and a second run
continues from there.

Samples of one seed start from the same noise under every sampler. The Frechet distance is that of Gaussians fitted to
the last features of the checkpoint's own classifier, with the 10,000 test images as reference; lambda and kappa are
chosen on other noise than they are reported on.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from common import PICTURES, save
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline, UniPCMultistepScheduler
from tqdm.auto import tqdm

from diffusers_fisher import (
    EMBEDDED_CLASSES,
    ClassifierReward,
    LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler,
    embedded_checkpoint,
    embedded_prompt,
)
from diffusers_fisher.files import check_writable, save_figure, write_json

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

SAMPLERS: dict[str, Any] = {
    "DDIM": DDIMScheduler,
    "LML-DDIM": LMLDDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "LML-DPM-Solver++": LMLDPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
# All runs start at the last training timestep and end without noise, whatever the sampler's defaults.
COMMON = {"timestep_spacing": "trailing"}
ENDS = {"DDIM": {"set_alpha_to_one": True}, "LML-DDIM": {"set_alpha_to_one": True}}
LAMBDAS, KAPPAS = (0.1, 1.0, 10.0), (0.1, 0.5, 0.9)
BATCH, BLOCKS = 50, 10  # samples per batch; blocks of the jackknife


@dataclasses.dataclass(frozen=True)
class Cell:
    """One sampler at one number of calls."""

    sampler: str
    calls: int
    guidance_scale: float = 1.0
    count: int = 5000
    seed: int = 0
    lml_lambda: float | None = None
    lml_kappa: float | None = None

    @property
    def name(self) -> str:
        """Of its record."""
        options = "" if self.lml_lambda is None else f"_{self.lml_lambda}_{self.lml_kappa}"
        return f"{self.sampler}{options}_{self.calls}_scale{self.guidance_scale}_{self.count}_seed{self.seed}"

    def scheduler(self, config: Any) -> Any:
        """Returns the sampler with the checkpoint's noise levels."""
        options = {} if self.lml_lambda is None else {"lml_lambda": self.lml_lambda, "lml_kappa": self.lml_kappa}
        return SAMPLERS[self.sampler].from_config(config, **COMMON, **ENDS.get(self.sampler, {}), **options)


class Models:
    """Holds the checkpoint and its classifier."""

    def __init__(self, compiled: bool = False):
        self.pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
        self.pipe.set_progress_bar_config(disable=True)
        self.config = self.pipe.scheduler.config
        self.classifier = ClassifierReward.from_pretrained(Path(embedded_checkpoint()) / "classifier", target=0)
        if compiled:
            self.pipe.unet.compile()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the last features (B, 160) float64 and predicted classes (B,) of images (B, 3, 32, 32) in [0, 1]."""
        features: list[torch.Tensor] = []
        hook = self.classifier.model.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        try:
            labels = self.classifier.logits(images).argmax(1)
        finally:
            hook.remove()
        return features[0].flatten(1).double(), labels

    def sample_features(self, cell: Cell) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features (count, 160) of a cell's samples, and whether each is classified as prompted."""
        self.pipe.scheduler = cell.scheduler(self.config)
        noise = torch.randn(cell.count, 4, 8, 8, generator=torch.Generator().manual_seed(cell.seed))
        labels = torch.arange(cell.count) % len(EMBEDDED_CLASSES)
        batch = (
            BATCH if cell.guidance_scale > 1 else 2 * BATCH
        )  # the same batch size for the network: guidance doubles it
        features, right = [], []
        for latents, truth in zip(tqdm(noise.split(batch), cell.name), labels.split(batch), strict=True):
            images = self.pipe(
                [embedded_prompt(int(label)) for label in truth], latents=latents, num_inference_steps=cell.calls,
                guidance_scale=cell.guidance_scale, output_type="pt",
            ).images  # fmt: skip
            batch_features, predictions = self.features(images)
            features.append(batch_features)
            right.append(predictions == truth)
        return torch.cat(features), torch.cat(right)

    def real_features(self, data: str) -> torch.Tensor:
        """Returns features (10000, 160) of the test images."""
        images, _ = fashion_mnist.load("test", data)
        batches = tqdm(images.split(BATCH), "real images")
        return torch.cat([self.features(fashion_mnist.to_rgb(batch) / 2 + 0.5)[0] for batch in batches])

    @torch.no_grad()
    def reconstruct_features(self, data: str, indices: torch.Tensor) -> torch.Tensor:
        """Returns features of some test images after the autoencoder, which limits every sampler."""
        images, _ = fashion_mnist.load("test", data)
        features = []
        for batch in tqdm(images[indices].split(BATCH), "reconstructions"):
            latents = self.pipe.vae.encode(fashion_mnist.to_rgb(batch)).latent_dist.mode()
            features.append(self.features((self.pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))[0])
        return torch.cat(features)


def moments(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean (d,) and covariance (d, d) of features (N, d)."""
    return features.mean(0), features.T.cov()


def root(matrix: torch.Tensor) -> torch.Tensor:
    """Returns the symmetric root of a positive semi-definite matrix; rounding below zero becomes zero."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.mT


def frechet_distance(first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Returns |m - n|^2 + tr(S + T - 2 (S^1/2 T S^1/2)^1/2) of Gaussians (m, S), (n, T).

    This is the squared Wasserstein distance (Dowson and Landau, 1982), as in Heusel et al., NeurIPS 2017.
    """
    (mean, covariance), (other_mean, target) = first, second
    half = root(covariance)
    cross = root(half @ target @ half)
    return float((mean - other_mean).square().sum() + (covariance + target - 2 * cross).trace())


def jackknife(features: torch.Tensor, reference: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Returns the distances with each of `BLOCKS` blocks of samples left out in turn."""
    parts = features.tensor_split(BLOCKS)
    return [
        frechet_distance(moments(torch.cat([*parts[:index], *parts[index + 1 :]])), reference)
        for index in range(BLOCKS)
    ]


def jackknife_error(values: torch.Tensor) -> float:
    """Returns the standard error of a statistic from its values with one block left out."""
    count = len(values)
    return float(((count - 1) / count * (values - values.mean()).square().sum()).sqrt())


def measure(cell: Cell, models: Models, reference: tuple[torch.Tensor, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Returns the record of a cell. A record that does not exist yet is made and kept."""
    path = folder / f"{cell.name}.json"
    if path.is_file():
        return json.loads(path.read_text())
    begin = time.perf_counter()
    features, right = models.sample_features(cell)
    replicates = jackknife(features, reference)
    record = {
        **dataclasses.asdict(cell),
        "accuracy": float(right.double().mean()),
        "accuracy_standard_error": float(right.double().std() / len(right) ** 0.5),
        "frechet_distance": frechet_distance(moments(features), reference),
        "frechet_standard_error": jackknife_error(torch.tensor(replicates)),
        "frechet_jackknife": replicates,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    write_json(path, record)
    print(f"{cell.name}: accuracy {record['accuracy']:.3f}, Frechet distance {record['frechet_distance']:.3f}")
    return record


def differences(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns each LML cell's distance minus its parent's from the same noise, with the error by the jackknife."""
    setting = ("calls", "guidance_scale", "seed")
    parents = {(row["sampler"], *(row[key] for key in setting)): row for row in cells}
    result = []
    for row in cells:
        parent = parents.get((row["sampler"].removeprefix("LML-"), *(row[key] for key in setting)))
        if parent not in (None, row):
            change = torch.tensor(row["frechet_jackknife"]) - torch.tensor(parent["frechet_jackknife"])
            difference = row["frechet_distance"] - parent["frechet_distance"]
            settings = {key: row[key] for key in ("sampler", *setting)}
            result.append({**settings, "difference": difference, "standard_error": jackknife_error(change)})
    return result


def floors(models: Models, data: str, features: torch.Tensor) -> dict[str, Any]:
    """Returns the distances between halves of the real images, and with one half reconstructed: limits of samplers."""
    halves = []
    for seed in range(5):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))
        left, right = (moments(features[half]) for half in order.tensor_split(2))
        halves.append(frechet_distance(left, right))
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    reconstruction_indices, other_indices = (order[: len(order) // 2], order[len(order) // 2 :])
    values = torch.tensor(halves)
    return {
        "real_halves": float(values.mean()),
        "real_halves_standard_deviation": float(values.std()),
        "reconstructed_half": frechet_distance(
            moments(models.reconstruct_features(data, reconstruction_indices)), moments(features[other_indices])
        ),
    }  # fmt: skip


def sweep_cells() -> list[Cell]:
    """Returns cells of ten calls and 1,000 samples with other noise: the parents, and LML by lambda and kappa."""
    cells = [Cell(name, 10, count=1000, seed=1) for name in ("DDIM", "DPM-Solver++")]
    for name in ("LML-DDIM", "LML-DPM-Solver++"):
        cells += [
            Cell(name, 10, count=1000, seed=1, lml_lambda=damping, lml_kappa=kappa)
            for damping in LAMBDAS
            for kappa in KAPPAS
        ]
    return cells


def chosen_options(sweep: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns lambda and kappa of the least Frechet distance by sampler."""
    best = {}
    for name in ("LML-DDIM", "LML-DPM-Solver++"):
        row = min((row for row in sweep if row["sampler"] == name), key=lambda row: row["frechet_distance"])
        best[name] = {"lml_lambda": row["lml_lambda"], "lml_kappa": row["lml_kappa"]}
    return best


def study_cells(options: dict[str, dict[str, float]]) -> list[Cell]:
    """Returns the cells of the report; the most important ones come first."""
    settings: list[tuple[str, int, dict[str, Any]]] = [(name, calls, {}) for calls in (10, 5) for name in SAMPLERS]
    settings += [(name, 5, {"guidance_scale": 2.0}) for name in SAMPLERS]
    settings += [(name, 20, {}) for name in SAMPLERS]
    settings += [(name, 5, {"seed": 2}) for name in ("DDIM", "LML-DDIM", "DPM-Solver++")]
    settings += [(name, 50, {}) for name in SAMPLERS]
    return [Cell(name, calls, **changes, **options.get(name, {})) for name, calls, changes in settings]


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws distance and accuracy by calls, and the sweep."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for index, name in enumerate(SAMPLERS):
        rows = [row for row in report["cells"] if row["sampler"] == name and row["seed"] == 0]
        rows = sorted((row for row in rows if row["guidance_scale"] == 1), key=lambda row: row["calls"])
        style = {"marker": "osv^D"[index], "linestyle": "--" if name.startswith("LML") else "-", "capsize": 2}
        for axes, quantity in ((left, "frechet_distance"), (middle, "accuracy")):
            errors = [row[f"{quantity.removesuffix('_distance')}_standard_error"] for row in rows]
            axes.errorbar([row["calls"] for row in rows], [row[quantity] for row in rows], errors, label=name, **style)
    left.axhline(report["floors"]["reconstructed_half"], color="tab:gray", linestyle=":", label="autoencoder alone")
    left.set_ylabel("Frechet distance to real images")
    middle.set_ylabel("classified as prompted")
    for axes in (left, middle):
        axes.set(xlabel="denoiser calls", xscale="log", xticks=(5, 10, 20, 50), xticklabels=(5, 10, 20, 50))
        axes.minorticks_off()
    left.legend(fontsize=8)
    for name, color in (("DDIM", "tab:blue"), ("DPM-Solver++", "tab:green")):
        rows = [row for row in report["sweep"] if row["sampler"] == f"LML-{name}"]
        rows = sorted(rows, key=lambda row: row["lml_kappa"] / row["lml_lambda"])
        ratios = [row["lml_kappa"] / row["lml_lambda"] for row in rows]
        right.plot(ratios, [row["frechet_distance"] for row in rows], "o--", color=color, label=f"LML-{name}")
        parent = next(row for row in report["sweep"] if row["sampler"] == name)
        right.axhline(parent["frechet_distance"], color=color, linewidth=1, label=name)
    right.set(xlabel="kappa / lambda", ylabel="Frechet distance, 10 calls, 1,000 samples", xscale="log", yscale="log")
    right.legend(fontsize=8)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=fashion_mnist.DEFAULT_FOLDER)
    parser.add_argument("--output", type=Path, default=Path("outputs/lml"), help="folder of the cells' records")
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet; needs a C++ compiler")
    parser.add_argument("--report", action="store_true", help="report the cells that are done so far, after the sweep")
    arguments = parser.parse_args()
    check_writable(arguments.output)
    models = Models(arguments.compile)
    features = models.real_features(arguments.data)
    reference = moments(features)
    sweep = [measure(cell, models, reference, arguments.output) for cell in sweep_cells()]
    options = chosen_options(sweep)
    print(f"chosen: {options}")
    study = study_cells(options)
    if arguments.report:
        study = [cell for cell in study if (arguments.output / f"{cell.name}.json").is_file()]
    cells = [measure(cell, models, reference, arguments.output) for cell in study]
    report = {
        "floors": floors(models, arguments.data, features), "chosen": options, "cells": cells,
        "differences": differences(cells), "sweep": sweep,
    }  # fmt: skip
    save("lml", report)
    draw(report, PICTURES / "lml.png")


if __name__ == "__main__":
    main()
