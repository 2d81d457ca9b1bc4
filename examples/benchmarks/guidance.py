"""Guidance on the embedded checkpoint: cost of one iteration, memory of the graph, reward against exact gradients.

    python examples/benchmarks/guidance.py

Writes guidance.json. All figures of one table come from one run on one machine, the methods in turn.
"""

import contextlib
import inspect
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import paired_seconds, ratio, save

from diffusers_fisher import (
    AutodiffFisher,
    ClassifierReward,
    DirectFisher,
    EndpointFisher,
    FiniteDifferenceFisher,
    LinearReward,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    fisher_scheduler,
)
from diffusers_fisher.guidance import MeasurementReward, ascend_noise
from diffusers_fisher.guidance.adjoint import checked_reward

BATCH, STEPS, SCALE, STEP_SIZE, ITERATIONS = 16, 25, 2.0, 0.2, 10
LABELS = [index % 10 for index in range(BATCH)]
PROMPTS = [embedded_prompt(label) for label in LABELS]


class StoredGraph:
    """Full back-propagation through the stock pipeline, with the interface of a differentiable scheduler."""

    def __init__(self, pipe: StableDiffusionFisherPipeline, arguments: dict):
        self.states: list = []
        self._pipe, self._arguments, self._leaf = pipe, arguments, None

    @contextlib.contextmanager
    def differentiable(self, estimator):
        yield self

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        self._leaf = noise.detach().requires_grad_()
        with torch.enable_grad():
            call = inspect.unwrap(type(self._pipe).__call__)
            return call(self._pipe, latents=self._leaf, **self._arguments)[0]

    def gradient(self, loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, self._leaf)[0]


def methods(pipe: StableDiffusionFisherPipeline, steps: int) -> dict[str, tuple]:
    """(sample, scheduler, estimator) of every method; the first two give the exact gradient."""
    positive, negative = pipe.encode_prompt(PROMPTS, pipe.device, 1, True)
    embeds = {"prompt_embeds": positive.detach(), "negative_prompt_embeds": negative.detach()}
    denoiser = PipelineDenoiser(pipe, guidance_scale=SCALE, **embeds)
    arguments = {
        **embeds, "num_inference_steps": steps, "guidance_scale": SCALE, "output_type": "latent", "return_dict": False
    }  # fmt: skip
    stored = StoredGraph(pipe, arguments)
    scheduler = fisher_scheduler(type(pipe.scheduler)).from_config(pipe.scheduler.config)

    def sample(noise: torch.Tensor) -> torch.Tensor:
        pipe.scheduler = scheduler  # several tables share the pipeline
        return pipe(latents=noise, **arguments)[0]

    estimators = {
        "per-step recomputation": AutodiffFisher(denoiser),
        "direct": DirectFisher(),
        "finite difference": FiniteDifferenceFisher(denoiser),
        "endpoint, centred": EndpointFisher(centred=True),
        "endpoint, paper": EndpointFisher(),
    }
    table: dict[str, tuple] = {"stored graph": (stored.sample, stored, None)}
    return table | {name: (sample, scheduler, estimator) for name, estimator in estimators.items()}


def rewards(folder: str) -> dict:
    """Three rewards: another class, left minus right, and inpainting of the upper half of a real image."""
    images, labels = embedded_test_images()
    known = torch.stack([images[labels == label][0] for label in LABELS])
    mask = torch.zeros(32, 32)
    mask[:16] = 1
    return {
        "another class": ClassifierReward.from_pretrained(
            Path(folder) / "classifier", target=[(label + 1) % 10 for label in LABELS]
        ),
        "left minus right": LinearReward.left_minus_right(32, 32),
        "inpainting": MeasurementReward(known, mask),
    }


def one_iteration(pipe, method: tuple, reward, noise: torch.Tensor) -> torch.Tensor:
    """Sampling, decoding, reward and gradient, as each guidance step does."""
    sample, scheduler, estimator = method
    with scheduler.differentiable(estimator) as trajectory:
        latents = sample(noise)
    return trajectory.gradient(checked_reward(reward, pipe._decode(latents), PROMPTS).sum())


def floor(pipe, method: tuple, reward, noise: torch.Tensor) -> torch.Tensor:
    """What no method can do without: an untracked run, decoding, and the reward's gradient at the latents."""
    latents = method[0](noise).detach().requires_grad_()
    return torch.autograd.grad(checked_reward(reward, pipe._decode(latents), PROMPTS).sum(), latents)[0]


def iteration_cost(pipe, table: dict[str, tuple], reward, noise: torch.Tensor, rounds: int) -> dict:
    tasks = {"floor": lambda: floor(pipe, table["direct"], reward, noise)}
    for name, method in table.items():
        tasks[name] = lambda method=method: one_iteration(pipe, method, reward, noise)
    seconds = paired_seconds(tasks, rounds)
    exact = min(("stored graph", "per-step recomputation"), key=lambda name: statistics.median(seconds[name]))
    return {
        "rounds": rounds,
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "over_floor": {name: ratio(seconds, name, "floor") for name in table},
        "faster_exact_method": exact,
        "exact_over_direct": ratio(seconds, exact, "direct"),
        "stored_graph_over_direct": ratio(seconds, "stored graph", "direct"),
        "recomputation_over_direct": ratio(seconds, "per-step recomputation", "direct"),
    }


def graph_bytes(noise: torch.Tensor, sample, scheduler, estimator) -> int:
    """Bytes that autograd keeps for the backward pass of one sampling run, counted once a storage."""
    storages: dict[int, int] = {}
    kept = []  # so that no address is used twice while counting

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        kept.append(storage)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, scheduler.differentiable(estimator) as trajectory:
        latents = sample(noise)
    states = sum(2 * state.sample.numel() * state.sample.element_size() for state in trajectory.states)
    del latents
    return sum(storages.values()) + states


def memory(pipe, noise: torch.Tensor) -> dict:
    """Bytes kept by the graph at 5, 10 and 20 steps, and their slope in units of one latent batch."""
    result: dict = {}
    tables = {steps: methods(pipe, steps) for steps in (5, 10, 20)}
    latent = noise.numel() * noise.element_size()
    parameters = sum(p.numel() * p.element_size() for p in pipe.unet.parameters())
    for name in ("direct", "stored graph"):
        sizes = {str(steps): graph_bytes(noise, *table[name]) for steps, table in tables.items()}
        slope = (sizes["20"] - sizes["10"]) / 10
        result[name] = {"bytes_by_steps": sizes, "latent_batches_a_step": slope / latent}
    return {"latent_batch_bytes": latent, "unet_parameter_bytes": parameters, **result}


def reward_curves(pipe, table: dict[str, tuple], all_rewards: dict, noise: torch.Tensor) -> dict:
    """Ten iterations of normalised ascent with every method and reward, same noise, same step size."""
    result: dict = {}
    for reward_name, reward in all_rewards.items():
        result[reward_name] = {}
        for name, (sample, scheduler, estimator) in table.items():
            begin = time.perf_counter()
            ascent = ascend_noise(
                sample, pipe._decode, reward, noise, PROMPTS, scheduler, estimator, ITERATIONS, STEP_SIZE
            )
            means = [float(values.mean()) for values in ascent.rewards]
            result[reward_name][name] = {
                "before": means[0],
                "after": float(ascent.best_rewards.mean()),
                "standard_error": float(ascent.best_rewards.std() / len(noise) ** 0.5),
                "curve": [round(value, 4) for value in means],
                "seconds": time.perf_counter() - begin,
            }
            row = result[reward_name][name]
            print(f"{reward_name:<18}{name:<24}{row['before']:>9.3f}{row['after']:>9.3f}{row['seconds']:>8.1f} s")
    return result


def import_time(rounds: int) -> dict:
    """Whole-process time of `import diffusers_fisher` against `import diffusers`."""

    def task(name: str):
        return lambda: subprocess.run([sys.executable, "-c", f"import {name}"], check=True)

    seconds = paired_seconds({name: task(name) for name in ("diffusers", "diffusers_fisher")}, rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"median_seconds": medians, "ratio": ratio(seconds, "diffusers_fisher", "diffusers")}


def main() -> None:
    folder = embedded_checkpoint()
    imports = import_time(rounds=7)
    pipe = StableDiffusionFisherPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    table, all_rewards = methods(pipe, STEPS), rewards(folder)
    noise = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    setting = {
        "batch": BATCH, "scheduler": "DDIM", "steps": STEPS, "guidance_scale": SCALE, "step_size": STEP_SIZE,
        "iterations": ITERATIONS, "dtype": "float32",
    }  # fmt: skip
    save(
        "guidance",
        {
            "setting": setting,
            "import": imports,
            "iteration": iteration_cost(pipe, table, all_rewards["another class"], noise, rounds=5),
            "memory": memory(pipe, noise),
            "reward_after_ten_iterations": reward_curves(pipe, table, all_rewards, noise),
        },
    )


if __name__ == "__main__":
    main()
