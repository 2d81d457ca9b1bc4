"""Compares every estimator of the diffusion Fisher with exact values: trace, products, gradients, reward per second.

    python examples/benchmarks/fisher_accuracy.py

(a) a mixture fitted to real 16x16 images, whose Fisher is known in closed form; (b) the embedded checkpoint against
its own full Jacobian. Needs Fashion-MNIST (Debian's dataset-fashion-mnist). Writes fisher_accuracy.json and .png.
About half an hour on two cores.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import fisher_estimators as family
import torch
from common import PICTURES, save
from mixtures import fashion_mnist, fitted_mixture, small_images
from tqdm.auto import tqdm

from diffusers_fisher import (
    AutodiffFisher,
    ClassifierReward,
    ExactFisher,
    FisherDDIMScheduler,
    GaussianFisher,
    LinearReward,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.files import save_figure
from diffusers_fisher.guidance.checks import checked_reward
from diffusers_fisher.guidance.noise_ascent import AscentSettings, GuidedRun, ascend_noise
from diffusers_fisher.noise import DenoisingState
from diffusers_fisher.testing import OracleDenoiser

STEPS, SCALES, LEVELS, ITERATIONS, STEP_SIZE = (10, 25, 50), (1.0, 5.0), 12, 5, 0.2
SCHEDULE = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Returns the mean of the relative error over samples."""
    difference, size = (value - reference).flatten(1).norm(dim=1), reference.flatten(1).norm(dim=1)
    return float((difference / size).mean())


def cosine(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples."""
    return float(torch.nn.functional.cosine_similarity(value.flatten(1), reference.flatten(1)).mean())


def run(scheduler: Any, output: Callable, noise: torch.Tensor, steps: int, estimator: Any) -> tuple[Any, torch.Tensor]:
    """Runs one sampling run over `output(x, t)` and records it."""
    with scheduler.differentiable(estimator) as trajectory:
        end = run_sampler(scheduler, output, noise, steps)
    return trajectory, end


@torch.no_grad()
def run_sampler(scheduler: Any, output: Callable, x: torch.Tensor, steps: int) -> torch.Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, t), t, x).prev_sample
    return x


def accuracy_by_level(states: list[DenoisingState], endpoint: torch.Tensor, estimators: dict, truth: Callable) -> dict:
    """Returns relative errors of trace and product, and the product's cosine, at every state."""
    generator = torch.Generator().manual_seed(2)
    rows: dict[str, Any] = {name: {"trace": [], "matvec": [], "cosine": []} for name in estimators}
    for state in tqdm(states, "levels"):
        v = torch.randn(state.sample.shape, generator=generator, dtype=state.sample.dtype)
        trace, product = truth(state, v)
        for name, (estimator, tracer) in estimators.items():
            operator = estimator(state, endpoint)
            estimate, value = operator.matvec(v), tracer(operator, generator)
            variance = float(state.level.sigma**2)
            rows[name]["trace"].append(relative(variance * value[:, None], variance * trace[:, None].double()))
            rows[name]["matvec"].append(relative(estimate, product))
            rows[name]["cosine"].append(cosine(estimate, product))
    return rows


def noise_to_signal(states: list[DenoisingState]) -> list[float]:
    return [float(state.level.noise_to_signal) for state in states]


def gradient_cosines(runs: Callable, reference: Any, estimators: dict[str, Any], loss: Callable) -> dict:
    """Compares each estimator's gradient at the noise with `reference`: cosine and ratio of norms, per setting."""
    result: dict[str, Any] = {}
    for name, estimator in {"reference": reference, **estimators}.items():
        trajectory, end = runs(estimator)
        begin = time.perf_counter()
        try:
            gradient = trajectory.gradient(loss(end)).double()
        except ArithmeticError as error:
            result[name] = {"failed": str(error).split(".")[0]}
            continue
        seconds = time.perf_counter() - begin
        if name == "reference":
            exact = gradient
            continue
        ratio = (gradient.flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).log10().mean()
        result[name] = {"cosine": cosine(gradient, exact), "log10_norm_ratio": float(ratio), "seconds": seconds}
    return result


def on_the_mixture(batch: int) -> dict[str, Any]:
    """Part (a)."""
    images = small_images()
    mixture = fitted_mixture(images, 300)
    scheduler = FisherDDIMScheduler(**SCHEDULE)
    denoiser = OracleDenoiser(mixture, scheduler)
    exact = ExactFisher(mixture)
    draws = mixture.sample(20000, torch.Generator().manual_seed(4))
    noise = torch.randn(batch, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimators = family.estimators(denoiser, family.priors(draws), autodiff=False) | {
        "prior (DCT) with the exact trace": family.trace_corrected(GaussianFisher.fit_diagonal(draws, dct=True), exact)
    }
    trajectory, end = run(scheduler, denoiser.model_output, noise, 48, exact)
    states = trajectory.states[3::4][:LEVELS]

    def truth(state: DenoisingState, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        operator = exact(state)
        return operator.trace().value, operator.matvec(v)

    tracers = {name: (estimator, family.exact_trace) for name, estimator in estimators.items()}
    tracers |= family.probe_estimators(exact)
    target = mixture.sample(batch, torch.Generator().manual_seed(5))
    gradients = {}
    for steps in STEPS:

        def runs(estimator: Any, steps: int = steps):
            return run(scheduler, denoiser.model_output, noise, steps, estimator)

        gradients[str(steps)] = gradient_cosines(
            runs, exact, estimators, lambda result: -0.5 * (result - target).square().sum()
        )
    levels = accuracy_by_level(states, end.detach(), tracers, truth)
    return {"noise_to_signal": noise_to_signal(states), "levels": levels, "gradients": gradients, "batch": batch}


def on_the_checkpoint(batch: int) -> dict[str, Any]:
    """Part (b)."""
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, _ = fashion_mnist.load("train")
    latents = family.encode_images(pipe, images[:10000])
    priors = family.priors(latents)
    labels = [index % 10 for index in range(batch)]
    embeds = family.prompt_embeds(pipe, [embedded_prompt(label) for label in labels])
    noise = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    scheduler = FisherDDIMScheduler.from_config(pipe.scheduler.config)
    unguided = PipelineDenoiser(pipe, guidance_scale=1.0, **embeds)
    trajectory, end = run(scheduler, unguided.model_output, noise, 48, AutodiffFisher(unguided))
    states = trajectory.states[3::4][:LEVELS]
    jacobians: dict[int, torch.Tensor] = {}

    def truth(state: DenoisingState, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dense = jacobians.setdefault(id(state), AutodiffFisher(unguided, chunk_size=64)(state).dense())
        return dense.diagonal(dim1=1, dim2=2).sum(1), (dense @ v.flatten(1)[..., None])[..., 0].view_as(v)

    closed_forms = family.estimators(unguided, priors, autodiff=True)
    tracers = {name: (estimator, family.trace_or_probes) for name, estimator in closed_forms.items()}
    tracers |= family.probe_estimators(AutodiffFisher(unguided))
    levels = accuracy_by_level(states, end.detach(), tracers, truth)
    asymmetry = [float((m - m.mT).norm() / (2 * m.norm())) for m in jacobians.values()]
    rewards = {
        "another class": ClassifierReward.from_pretrained(
            f"{embedded_checkpoint()}/classifier", target=[(label + 1) % 10 for label in labels]
        ),
        "left minus right": LinearReward.left_minus_right(32, 32),
    }
    gradients, ascents = {}, {}
    for scale, steps in itertools.product(SCALES, STEPS):
        denoiser = PipelineDenoiser(pipe, guidance_scale=scale, **embeds)

        def runs(estimator: Any, denoiser: Any = denoiser, steps: int = steps):
            return run(scheduler, denoiser.model_output, noise, steps, estimator)

        key, reward = f"guidance scale {scale:g}, {steps} steps", rewards["another class"]
        estimators = family.estimators(denoiser, priors, autodiff=True)

        def loss(result: torch.Tensor, reward: Any = reward) -> torch.Tensor:
            return checked_reward(reward, backbone_of(pipe).decode(result), [""] * batch).sum()

        gradients[key] = gradient_cosines(runs, AutodiffFisher(denoiser), estimators, loss)
        ascents[key] = {
            name: {each: ascent(pipe, denoiser, steps, noise, estimator, rewards[each]) for each in rewards}
            for name, estimator in tqdm(
                ({"autodiff (VJP)": AutodiffFisher(denoiser)} | estimators).items(), key, len(estimators) + 1
            )
        }
    return {
        "noise_to_signal": noise_to_signal(states), "levels": levels, "gradients": gradients, "batch": batch,
        "asymmetry_of_the_networks_jacobian": asymmetry, "ascents": ascents, "iterations": ITERATIONS,
        "step_size": STEP_SIZE,
    }  # fmt: skip


def ascent(pipe: Any, denoiser: Any, steps: int, noise: torch.Tensor, estimator: Any, reward: Any) -> dict[str, Any]:
    """Runs normalised ascent on the sphere of the noise; returns the gain of the reward, and the gain per second."""
    scheduler = FisherDDIMScheduler.from_config(pipe.scheduler.config)

    def sample(x: torch.Tensor) -> torch.Tensor:
        return run_sampler(scheduler, denoiser.model_output, x, steps)

    prompts, begin = [""] * len(noise), time.perf_counter()
    try:
        run = GuidedRun(sample, backbone_of(pipe).decode, reward, prompts, scheduler, family.without_memory(estimator))
        result = ascend_noise(run, noise, AscentSettings(ITERATIONS, STEP_SIZE))
    except ArithmeticError as error:
        return {"failed": str(error).split(".")[0]}
    seconds = time.perf_counter() - begin
    gain = float((result.best_rewards - result.rewards[0]).mean())
    return {"gained": gain, "seconds": seconds, "gained_per_second": gain / seconds}


def plot(result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True)
    for row, (part, title) in zip(
        grid, (("mixture", "mixture, exact"), ("checkpoint", "embedded checkpoint")), strict=True
    ):
        for axes, quantity in zip(row, ("trace", "matvec"), strict=True):
            for index, (name, values) in enumerate(result[part]["levels"].items()):
                style = "-" if index < 10 else "--"  # matplotlib has ten colours
                axes.plot(result[part]["noise_to_signal"], values[quantity], style, marker=".", label=name)
            axes.set(xscale="log", yscale="log", ylabel=f"relative error of {quantity}", title=title, ylim=(1e-6, 1e4))
        row[1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    for axes in grid[1]:
        axes.set_xlabel("noise to signal")
    save_figure(figure, PICTURES / "fisher_accuracy.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    batch = parser.parse_args().batch
    result = {"mixture": on_the_mixture(batch), "checkpoint": on_the_checkpoint(batch)}
    plot(result)
    save("fisher_accuracy", result)


if __name__ == "__main__":
    main()
