"""Compares trace models of the embedded checkpoint with the quantities that they were trained on, on test images.

    python examples/benchmarks/trace_embedded.py --runs outputs/trace_embedded_*

The benchmark takes one run of `diffusers_fisher.training.trace_matching` per target. It compares r with the mean
squared error of the denoiser over many draws ("residual", "norm") or with full Jacobians ("jacobian"), for all images
and for single images. It also compares the integrated trace of whole likelihoods, and that of 1 and 16 Hutchinson
probes, with full Jacobians on the same path, and measures the times. A target without a run keeps its earlier figures,
because all draws are the same. The benchmark needs Fashion-MNIST (Debian's dataset-fashion-mnist), and writes
trace_embedded.json. It takes a quarter of an hour on two cores.
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, paired_seconds, ratio, save
from tqdm.auto import tqdm

from diffusers_fisher import (
    AutodiffFisher,
    FisherTraceModel,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
    embedded_checkpoint,
    embedded_prompt,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.noise import expand, log_noise_to_signal_range
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.training.trace_losses import TraceDraw, mirrored_noise, noised_state, residual_target

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

LEVELS = 12
STEPS = 20


def test_data(pipe: Any, count: int) -> tuple[torch.Tensor, list[str]]:
    """Returns mean and deviation (count, 2, 4, 8, 8) of the latents of the first test images, and their captions."""
    images, labels = fashion_mnist.load("test")
    with torch.no_grad():
        pieces = [
            torch.stack(backbone_of(pipe).encode(fashion_mnist.to_rgb(piece)), 1)
            for piece in images[:count].split(250)
        ]
    return torch.cat(pieces), [embedded_prompt(label) for label in labels[:count].tolist()]


def states(pipe: Any, moments: torch.Tensor, captions: list[str], seed: int, with_graph: bool = False) -> Any:
    """Yields (state, noise, denoiser) of noised samples of the posterior at every level."""
    low, high = log_noise_to_signal_range(pipe.scheduler)
    for number, level in enumerate(torch.linspace(low, high, LEVELS, dtype=torch.float64)):
        generator = step_generator(seed, "noise", number)
        posterior, noise = torch.randn(2, *moments[:, 0].shape, generator=generator)
        latents = moments[:, 0] + moments[:, 1] * posterior
        denoiser = PipelineDenoiser(pipe, prompt=captions)
        draw = TraceDraw(level.expand(len(latents)), noise)
        yield noised_state(denoiser, latents, draw, with_graph), noise, denoiser


def squared_errors(pipe: Any, models: dict[str, FisherTraceModel], count: int) -> dict[str, Any]:
    """Returns the mean r of every model and of the squared errors at every level."""
    moments, captions = test_data(pipe, count)
    pieces, size = [], 250
    for number in tqdm(range(0, count, size), "squared errors"):
        piece = slice(number, number + size)
        pieces.append(errors_and_r(pipe, models, moments[piece], captions[piece], number))
    values = torch.cat(pieces, dim=2)  # (levels, 1 + models, images)
    means = {name: values[:, index].mean(1).tolist() for index, name in enumerate(["squared error", *models])}
    standard_error = (values[:, 0].std(1) / count**0.5).tolist()
    away = {name: averaged_difference(means[name], means["squared error"]) for name in models}
    return {"images": count, "mean": means, "standard_error": standard_error, "mean_absolute_difference": away}


def norm_estimate(pipe: Any, count: int) -> dict[str, Any]:
    """Returns the r that target "norm" estimates: the mean of (|x_0|^2 - |predicted x_0|^2)/(d s^2) at every level.

    The mean is over images. Each image has two mirrored draws of the noise, so that the fluctuation at small noise
    cancels. An error of the denoiser contributes 2 <predicted x_0, error>/(d s^2).
    """
    moments, captions = test_data(pipe, count)
    rows = []
    for number in tqdm(range(0, count, 250), "norm"):
        piece = slice(number, number + 250)
        rows.append([])
        for state, noise, denoiser in states(pipe, moments[piece], captions[piece], number):
            level, x = state.level, state.sample.double()
            clean = (x - expand(level.sigma, x) * noise.double()) / expand(level.alpha, x)
            draw = TraceDraw(level.log_noise_to_signal, mirrored_noise(noise))
            mirrored_state = noised_state(denoiser, clean.to(state.sample.dtype), draw)
            differences = [
                (clean.square() - each.pred_original_sample.double().square()) for each in (state, mirrored_state)
            ]
            rows[-1].append(sum(differences).flatten(1).mean(1) / (2 * level.noise_to_signal**2))
    values = torch.cat([torch.stack(row) for row in rows], dim=1)  # (levels, images)
    return {
        "images": count, "mean": values.mean(1).tolist(), "standard_error": (values.std(1) / count**0.5).tolist()
    }  # fmt: skip


def with_earlier(result: dict[str, Any], earlier: dict[str, Any]) -> dict[str, Any]:
    """Adds to `result` the entries that only `earlier` has, such as the rows of other targets."""
    common = {key: with_earlier(result[key], earlier[key]) for key in result if isinstance(earlier.get(key), dict)}
    return {**earlier, **result, **common}


def errors_and_r(pipe: Any, models: dict[str, FisherTraceModel], *draw: Any) -> torch.Tensor:
    """Returns squared errors of a draw and r by every model, (levels, 1 + models, images); `draw` as in `states`."""
    rows = [
        [residual_target(state, noise), *(model.unexplained_noise_fraction(state) for model in models.values())]
        for state, noise, _ in states(pipe, *draw)
    ]
    return torch.stack([torch.stack([value.double() for value in row]) for row in rows])


def squared_errors_of_images(pipe: Any, models: dict[str, FisherTraceModel], count: int, draws: int) -> dict[str, Any]:
    """Compares the integral of r over log(sigma/alpha) by every model with that by squared errors, image by image.

    Both are averages over the same draws. A model learns the mean over all images that may belong to a noised image,
    so even a perfect model has a correlation below 1 with the errors of one image.
    """
    moments, captions = test_data(pipe, count)
    total = torch.zeros(LEVELS, 1 + len(models), count, dtype=torch.float64)
    for draw in tqdm(range(draws), "squared errors of images"):
        total += errors_and_r(pipe, models, moments, captions, 10**6 + draw) / draws
    integrals = integral(pipe, total)
    rows = {
        name: {
            "correlation": float(torch.corrcoef(torch.stack([estimate, integrals[0]]))[0, 1]),
            "mean_difference": float((estimate - integrals[0]).mean()),
            "mean_absolute_difference": float((estimate - integrals[0]).abs().mean()),
        }
        for name, estimate in zip(models, integrals[1:], strict=True)
    }
    return {"images": count, "draws": draws, "bits_per_dim": rows}


def integral(pipe: Any, r: torch.Tensor) -> torch.Tensor:
    """Returns the integral of r by level (levels, ...) over log(sigma/alpha) in bits/dim."""
    log_noise = torch.linspace(*log_noise_to_signal_range(pipe.scheduler), LEVELS, dtype=torch.float64)
    return torch.trapezoid(r, log_noise, dim=0) / math.log(2)


def gap_bits_per_dim(pipe: Any, means: dict[str, list[float]]) -> float:
    """Returns the integral of r by the residual model minus that by the jacobian model on noised images, bits/dim."""
    r = {name: torch.tensor(means[name], dtype=torch.float64) for name in ("residual", "jacobian")}
    return float(integral(pipe, r["residual"] - r["jacobian"]))


def averaged_difference(left: list[float], right: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)


def full_jacobians(pipe: Any, models: dict[str, FisherTraceModel], count: int) -> dict[str, Any]:
    """Returns r of every model and of the full Jacobian at noised images of every level."""
    moments, captions = test_data(pipe, count)
    rows = []
    for state, _, denoiser in tqdm(states(pipe, moments, captions, 0, with_graph=True), "Jacobians", LEVELS):
        trace = AutodiffFisher(denoiser)(state).trace(None).value
        exact = 1 - state.level.sigma**2 * trace / state.sample[0].numel()
        rows.append(
            torch.stack([exact.double(), *(model.unexplained_noise_fraction(state) for model in models.values())])
        )
    values = torch.stack(rows)  # (levels, 1 + models, images)
    means = {name: values[:, index].mean(1).tolist() for index, name in enumerate(["full Jacobian", *models])}
    return {
        "images": count, "mean": means,
        "mean_absolute_difference": {
            name: averaged_difference(means[name], means["full Jacobian"]) for name in models
        },
        "mean_absolute_difference_a_point": {
            name: float((values[:, 1 + index] - values[:, 0]).abs().mean()) for index, name in enumerate(models)
        },
    }  # fmt: skip


class Featureless(TraceMatchingFisher):
    """Wraps a trace model so that it gets no features of the denoiser's last hidden layer, as in a sampler's run."""

    def __call__(self, state: Any, endpoint: Any = None) -> Any:
        return super().__call__(dataclasses.replace(state, features=None), endpoint)


def likelihoods(pipe: Any, models: dict[str, FisherTraceModel], count: int) -> dict[str, Any]:
    """Returns integrated traces on the same paths in bits/dim."""
    moments, captions = test_data(pipe, count)
    latents = moments[:, 0]
    estimators: dict[str, tuple[Any, int | None]] = {
        name: (TraceMatchingFisher(model), None) for name, model in models.items()
    }
    estimators |= {
        f"{name}, without features": (Featureless(model), None)
        for name, model in models.items()
        if model.config["feature_channels"] is not None
    }
    estimators |= {"Hutchinson, 1 probe": (AutodiffFisher(), 1), "Hutchinson, 16 probes": (AutodiffFisher(), 16)}

    def bits(estimator: Any, probes: int | None) -> torch.Tensor:
        out = pipe.log_likelihood(
            latents=latents, prompt=captions, estimator=estimator, num_probes=probes,
            num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        return -out.trace_log_prob / (out.dims * math.log(2))

    exact = bits(AutodiffFisher(), None)
    rows = {}
    for name, (estimator, probes) in tqdm(estimators.items(), "likelihoods"):
        values = bits(estimator, probes)
        difference = values - exact
        rows[name] = {
            "correlation": float(torch.corrcoef(torch.stack([values, exact]))[0, 1]),
            "mean_difference": float(difference.mean()), "mean_absolute_difference": float(difference.abs().mean()),
            "largest_difference": float(difference.abs().max()),
        }  # fmt: skip
    return {"images": count, "steps": STEPS, "exact_bits_per_dim": exact.tolist(), "bits_per_dim": rows}


def times(pipe: Any, model: FisherTraceModel, count: int, rounds: int) -> dict[str, Any]:
    """Returns the seconds of one likelihood of `count` images by every estimator, timed in turn."""
    moments, captions = test_data(pipe, count)
    latents = moments[:, 0]

    def task(estimator: Any, probes: int | None) -> Any:
        return lambda: pipe.log_likelihood(
            latents=latents, prompt=captions, estimator=estimator, num_probes=probes,
            num_inference_steps=8,
        )  # fmt: skip

    seconds = paired_seconds(
        {
            "trace model": task(TraceMatchingFisher(model), None), "1 probe": task(AutodiffFisher(), 1),
            "16 probes": task(AutodiffFisher(), 16),
        }, rounds,
    )  # fmt: skip
    names = ("1 probe", "16 probes")
    return {
        "images": count,
        "seconds": seconds,
        "ratio": {name: ratio(seconds, name, "trace model") for name in names},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", required=True, help="output folders of trace matching, one per target")
    parser.add_argument("--images", type=int, default=32, help="images for full Jacobians")
    parser.add_argument("--error-images", type=int, default=4000, help="images for the squared errors")
    parser.add_argument("--draws", type=int, default=64, help="draws for the squared errors of single images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="trace_embedded", help="name of the JSON file")
    arguments = parser.parse_args()
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    models, runs = {}, {}
    for folder in map(Path, arguments.runs):
        model = FisherTraceModel.from_pretrained(folder / "trace_model").eval()
        model.check_fingerprint(pipe)
        models[model.target] = model
        config = json.loads((folder / "config.json").read_text())
        runs[model.target] = {**config["optimisation"], "parameters": model.num_parameters()}
    result = {
        "levels": LEVELS, "training": runs, "threads": torch.get_num_threads(),
        "squared_errors": squared_errors(pipe, models, arguments.error_images),
        "norm_estimate": norm_estimate(pipe, arguments.error_images),
        "squared_errors_of_images": squared_errors_of_images(pipe, models, arguments.images, arguments.draws),
        "full_jacobians": full_jacobians(pipe, models, arguments.images),
        "likelihoods": likelihoods(pipe, models, arguments.images),
        "times": times(pipe, next(iter(models.values())), 16, arguments.rounds),
    }  # fmt: skip
    file = FOLDER / f"{arguments.name}.json"
    if file.exists():
        earlier = json.loads(file.read_text())
        result = with_earlier(result, {key: value for key, value in earlier.items() if key != "machine"})
    result["residual_less_jacobian_bits_per_dim"] = gap_bits_per_dim(pipe, result["squared_errors"]["mean"])
    save(arguments.name, result)


if __name__ == "__main__":
    main()
