"""Runs the demonstration of `diffusers-fisher demo`: likelihood and guidance on the embedded checkpoint."""

import math
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import pandas
import torch

from . import __version__
from .checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt, embedded_test_images
from .console import say
from .errors import CoarseGridWarning
from .figures import make_figure
from .files import check_writable, save_figure, write_json
from .fisher import (
    AutodiffFisher,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    OneStepFisher,
)
from .guidance import ClassifierReward, GuidanceOutput
from .likelihood import LikelihoodOutput
from .pipelines import StableDiffusionFisherPipeline

PROMPT_CLASS = EMBEDDED_CLASSES.index("sneaker")
TARGET = "ankle boot"
NUM_IMAGES = 8
SAMPLING: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0}
GUIDANCE: dict[str, Any] = {"num_guidance_steps": 10}
LIKELIHOOD: dict[str, Any] = {"num_inference_steps": 20}
PROBES = "real, 2 probes"
"""Name of the likelihoods of the same images without the trace model, for comparison."""

ESTIMATORS: dict[str, Callable[[], FisherEstimator]] = {
    "one step (default)": OneStepFisher,
    "direct": DirectFisher,
    "finite difference": FiniteDifferenceFisher,
    "exact (autodiff)": AutodiffFisher,
    "endpoint, centred": lambda: EndpointFisher(centred=True),
    "endpoint, paper": EndpointFisher,
}
LIKELIHOOD_COLUMNS = {
    "mean": "bits/dim", "standard_deviation": "std", "probe_standard_error": "probe s.e.",
    "discretisation_error": "step error", "largest_discretisation_error": "at most", "num_denoiser_calls": "calls",
}  # fmt: skip
GUIDANCE_COLUMNS = {
    "reward_before": "reward before", "reward_after": "after", "seconds": "seconds", "num_denoiser_calls": "calls",
}  # fmt: skip


def run_demo(output: Path, seed: int = 0) -> dict[str, Any]:
    """Runs the demonstration, prints its tables and writes its files; returns the content of report.json.

    Args:
        output: folder of report.json and the pictures.
        seed: seed of all draws.

    Raises:
        InputError: the folder can't be written. CheckpointError: the installation is damaged.
    """
    check_writable(output)
    begin = time.perf_counter()
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    images, labels = embedded_test_images()
    question = "How likely are images under the checkpoint?"
    say(f"{question} ({len(images)} test images, bits/dim of the latent)")
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    sets = {"real": images, "inverted": 1 - images, "noise-corrupted": (images + 0.2 * noise).clamp(0, 1)}
    likelihoods = {name: _likelihood(pipe, pixels, labels, seed) for name, pixels in sets.items()}
    likelihoods[PROBES] = _likelihood(pipe, images, labels, seed, estimator=AutodiffFisher(), num_probes=2)
    report: dict[str, Any] = {"likelihood": {name: _likelihood_report(out) for name, out in likelihoods.items()}}
    _print_table("images", report["likelihood"], LIKELIHOOD_COLUMNS)
    say(f"\nSteering '{embedded_prompt(PROMPT_CLASS)}' toward '{TARGET}' ({NUM_IMAGES} images)")
    reward = ClassifierReward.from_pretrained(Path(embedded_checkpoint()) / "classifier", target=TARGET)
    prompts = [embedded_prompt(PROMPT_CLASS)] * NUM_IMAGES
    options: dict[str, Any] = {"output_type": "pt", **SAMPLING, **GUIDANCE}
    runs = {}
    for name, make in ESTIMATORS.items():
        generator = torch.Generator().manual_seed(seed)
        out = pipe.guide(prompts, reward, estimator=make(), generator=generator, **options)
        runs[name] = cast(GuidanceOutput, out)
    report["guidance"] = {name: _guidance_report(out) for name, out in runs.items()}
    _print_table("estimator", report["guidance"], GUIDANCE_COLUMNS)
    report |= {"seconds": round(time.perf_counter() - begin, 1), "versions": versions()}
    _draw(output, likelihoods, runs)
    write_json(output / "report.json", report)
    say(f"\nImages, plots and report.json are in {output.resolve()} ({report['seconds']} s in all).")
    return report


def versions() -> dict[str, str]:
    """Returns the versions of the packages on which the figures depend, and the number of threads."""
    result = {"diffusers_fisher": __version__, "threads": str(torch.get_num_threads())}
    return result | {name: version(name) for name in ("diffusers", "transformers", "torch")}


def _likelihood(
    pipe: StableDiffusionFisherPipeline, images: torch.Tensor, labels: torch.Tensor, seed: int, **options: Any
) -> LikelihoodOutput:
    prompts = [embedded_prompt(int(label)) for label in labels]
    generator = torch.Generator().manual_seed(seed)
    # The table shows the largest error.
    with warnings.catch_warnings(action="ignore", category=CoarseGridWarning):
        return pipe.log_likelihood(images, prompt=prompts, generator=generator, **LIKELIHOOD, **options)


def _likelihood_report(out: LikelihoodOutput) -> dict[str, Any]:
    bits, nats = out.bits_per_dim, out.dims * math.log(2)  # nats of one bit/dim
    return {
        "bits_per_dim": [round(float(value), 4) for value in bits],
        "mean": float(bits.mean()),
        "standard_deviation": float(bits.std()),
        "probe_standard_error": float(out.standard_error.mean() / nats),
        "discretisation_error": float(out.discretisation_error.abs().mean() / nats),
        "largest_discretisation_error": float(out.discretisation_error.abs().max() / nats),
        "num_denoiser_calls": out.num_denoiser_calls,
        **{name: getattr(out, name) for name in ("space", "prior", "density", "trace")},
    }


def _guidance_report(out: GuidanceOutput) -> dict[str, Any]:
    return {
        "reward_before": float(out.rewards[0].mean()),
        "reward_after": float(out.best_rewards.mean()),
        "rewards": [round(float(value), 4) for value in out.rewards.mean(1)],
        "seconds": float(out.seconds.sum()),
        "num_denoiser_calls": out.num_denoiser_calls,
    }


def _print_table(title: str, report: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Prints one line per entry of a report, with the values of some of its keys.

    Args:
        title: heading of the entries' names.
        report: values by key, by name of the entry.
        columns: heading of the column by key of the report.
    """
    table = pandas.DataFrame(list(report.values()), index=list(report))[list(columns)].rename(columns=columns)
    table.columns.name = title
    say(textwrap.indent(table.to_string(float_format="{:.3f}".format), "  "))


def _draw(output: Path, likelihoods: Mapping[str, LikelihoodOutput], runs: Mapping[str, GuidanceOutput]) -> None:
    """Draws histograms of bits/dim and r by noise level, the rewards by seconds, and the images."""
    figure, (left, right) = make_figure(11, 4, columns=2)
    for name, out in likelihoods.items():
        left.hist(out.bits_per_dim.numpy(), bins=20, alpha=0.6, label=name)
        mean, spread = out.unexplained_noise_fraction.mean(1), out.unexplained_noise_fraction.std(1)  # over the images
        right.plot(out.noise_to_signal, mean, label=name)
        right.fill_between(out.noise_to_signal, mean - spread, mean + spread, alpha=0.2)
    left.set(xlabel="bits/dim of the latent (lower is likelier)", ylabel="images", title="Likelihood")
    right.set(xlabel="noise to signal", ylabel="r = tr Cov[noise]/d", xscale="log", title="Trace of the Fisher")
    left.legend()
    save_figure(figure, output / "likelihood.png")

    figure, (axes,) = make_figure(6, 4)
    for name, run in runs.items():
        axes.plot(run.seconds.cumsum(0), run.rewards.mean(1), marker=".", label=name)
    axes.set(xlabel="seconds", ylabel=f"log-probability of '{TARGET}'", title="Reward against time")
    axes.legend()
    save_figure(figure, output / "guidance.png")

    before = next(iter(runs.values())).initial_images  # the same for every estimator
    rows = {"before": before, **{name: run.images for name, run in runs.items()}}
    figure, grid = make_figure(8, 1.35 * len(rows), len(rows))
    for axes, (name, pictures) in zip(grid, rows.items(), strict=True):
        axes.imshow(torch.cat(list(pictures), dim=-1).permute(1, 2, 0))
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_axis_off()
    save_figure(figure, output / "gallery.png")
