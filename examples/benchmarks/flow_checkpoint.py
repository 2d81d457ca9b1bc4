"""What is claimed of flow-matching models, measured on the embedded Stable Diffusion 3; writes flow_checkpoint.json.

    python examples/benchmarks/flow_checkpoint.py [PART ...]

The parts are samples, likelihood, products, gradients, guidance and half_precision; without names all run.
All run with one empty token in the place of the stock call's 256 (`empty_tokens.short_context`), which is the same
function; "samples" compares some images with the stock call's. The likelihoods by random
directions are in likelihood_probes_sd3.json.
"""

import argparse
import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import FOLDER, machine
from embedded_checkpoint import CENTRE, fashion_mnist, generation, load_pipeline
from embedded_pipelines import embedded_pipeline, short_context
from fisher_accuracy import accuracy_by_level, gradient_cosines, noise_to_signal, run
from fisher_estimators import estimators, exact_trace

from diffusers_fisher import (
    AutodiffFisher,
    ClassifierReward,
    CoarseGridWarning,
    DirectFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    FisherFlowMatchEulerDiscreteScheduler,
    GaussianFisher,
    LikelihoodOutput,
    LinearReward,
    OneStepFisher,
    PipelineDenoiser,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.files import write_json
from diffusers_fisher.guidance.checks import checked_reward
from diffusers_fisher.likelihood import reference_log_likelihood
from diffusers_fisher.likelihood.pipeline import unguided_denoiser

SAMPLES, STOCK_SAMPLES, IMAGES, BATCH, PROMPTS, HALF_PRECISION_PROMPTS = 1000, 10, 4, 8, 32, 16
STEPS, ITERATIONS, LEVELS = (10, 25), 10, 12


def samples(pipe: Any, folder: str) -> dict[str, Any]:
    """Returns how often samples are classified as prompted, and how far some are from those of the stock call."""
    stock = load_pipeline(Path(folder))
    arguments = {"num_inference_steps": 25, "guidance_scale": 2.0, "output_type": "pt"}
    whole, short = (_samples(stock, is_short, arguments) for is_short in (False, True))
    classifier = ClassifierReward.from_pretrained(Path(embedded_checkpoint()) / "classifier", target=0)
    images, labels = fashion_mnist.load("test")
    centre = (images.float() / 255)[CENTRE][:, 0]
    real_spread = torch.stack([centre[labels == label].std(0).mean() for label in range(10)])
    begin = time.perf_counter()
    with short_context(stock.transformer):
        result = generation(stock, classifier, 2.0, SAMPLES, real_spread)
    return result | {
        "guidance_scale": 2.0, "steps": 25, "seconds": time.perf_counter() - begin,
        "largest_difference_from_the_stock_call": float((whole - short).abs().max()), "stock_samples": len(whole),
    }  # fmt: skip


def _samples(pipe: Any, is_short: bool, arguments: dict[str, Any]) -> torch.Tensor:
    """Returns one image of each class in [0, 1], with the 256 empty tokens of the stock call or with one."""
    prompts = [embedded_prompt(label) for label in range(STOCK_SAMPLES)]
    with short_context(pipe.transformer) if is_short else contextlib.nullcontext():
        return pipe(prompts, generator=torch.Generator().manual_seed(1), **arguments).images


def test_latents(pipe: Any, count: int) -> tuple[torch.Tensor, list[str]]:
    """Returns latents of the first test images, and their prompts."""
    images, labels = embedded_test_images()
    return backbone_of(pipe).samples_of(images[:count]), [embedded_prompt(int(label)) for label in labels[:count]]


def likelihood(pipe: Any, folder: str) -> dict[str, Any]:
    """Compares every way to a likelihood with adaptive steps and whole Jacobians, in bits/dim."""
    latents, prompts = test_latents(pipe, IMAGES)
    backbone = backbone_of(pipe)
    denoiser = unguided_denoiser(backbone, latents, backbone.unguided_scale({}), prompts, {})
    truth = reference_log_likelihood(denoiser, latents, None, 1e-5, 9, *pipe.latent_statistics)
    rows = []

    def score(name: str, steps: int, **options: Any) -> LikelihoodOutput:
        generator = torch.Generator().manual_seed(0)
        out = pipe.log_likelihood(
            latents=latents, prompt=prompts, num_inference_steps=steps, generator=generator, **options
        )
        gaps = out.to_bits(out.log_prob - truth.log_prob)
        rows.append({
            "what": name, "levels": steps + 1, "calls": out.num_denoiser_calls, "mean": float(gaps.abs().mean()),
            "largest": float(gaps.abs().max()), "stated": float(out.to_bits(out.total_error).mean()),
            "within_total_error": float((gaps.abs() <= out.to_bits(out.total_error)).double().mean()),
        })  # fmt: skip
        print(rows[-1], flush=True)
        return out

    jacobian = {"estimator": AutodiffFisher(chunk_size=64), "num_probes": None}
    score("whole Jacobian", 19, **jacobian)
    score("whole Jacobian", 39, **jacobian)
    score("default without a trace model", 32, estimator=FiniteDifferenceFisher())
    score("2 directions per level, dealt", 21, estimator=FiniteDifferenceFisher(), num_probes=2, dealt_probes=True)
    if pipe.trace_model is not None:
        score("trace model", 32)
        score("trace model", 39)
    return {
        "images": IMAGES, "reference_calls": truth.num_denoiser_calls,
        "reference_error": float(truth.to_bits(truth.discretisation_error).max()),
        "bits_per_dim": truth.bits_per_dim.tolist(), "rows": rows,
    }  # fmt: skip


class Guided:
    """Holds what runs with guidance need: prompts, noise, the scheduler, and Gaussians of the data."""

    def __init__(self, pipe: Any):
        self.labels = [index % 10 for index in range(BATCH)]
        self.prompts = [embedded_prompt(label) for label in self.labels]
        self.noise = torch.randn(BATCH, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        self.scheduler = FisherFlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        latents, _ = test_latents(pipe, 256)
        self.gaussians = {
            "Gaussian, diagonal": GaussianFisher.fit_diagonal(latents),
            "Gaussian, DCT": GaussianFisher.fit_diagonal(latents, dct=True),
        }

    def table(self, denoiser: PipelineDenoiser) -> dict[str, Any]:
        """Returns the estimators to be compared by name."""
        names = ("autodiff, forward (JVP)", "finite difference", "direct", *self.gaussians, "endpoint, centred",
                 "endpoint (paper's DF-EA)")  # fmt: skip
        gaussians = self.gaussians | {name: DirectFisher() for name in ("Gaussian, isotropic", "Gaussian, rank 32")}
        every = estimators(denoiser, gaussians, autodiff=True)
        return {name: every[name] for name in names} | {"one step": OneStepFisher(FiniteDifferenceFisher(denoiser))}


def products(pipe: Any, folder: str) -> dict[str, Any]:
    """Compares traces and products along an unguided run with whole Jacobians, by level."""
    problem = Guided(pipe)
    denoiser = PipelineDenoiser(pipe, guidance_scale=1.0, prompt=problem.prompts)
    trajectory, end = run(problem.scheduler, denoiser.model_output, problem.noise, 48, AutodiffFisher(denoiser))
    states = trajectory.states[3::4][:LEVELS]
    jacobians: dict[int, torch.Tensor] = {}

    def truth(state: Any, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dense = jacobians.setdefault(id(state), AutodiffFisher(denoiser, chunk_size=64)(state).dense())
        return dense.diagonal(dim1=1, dim2=2).sum(1), (dense @ v.flatten(1)[..., None])[..., 0].view_as(v)

    table = {
        name: (estimator, exact_trace)
        for name, estimator in problem.table(denoiser).items()
        if name not in ("finite difference", "autodiff, forward (JVP)", "one step")
    }
    levels = accuracy_by_level(states, end.detach(), table, truth)
    asymmetry = [float((m - m.mT).norm() / (2 * m.norm())) for m in jacobians.values()]
    return {"noise_to_signal": noise_to_signal(states), "levels": levels, "asymmetry": asymmetry}


def gradients(pipe: Any, folder: str) -> dict[str, Any]:
    """Compares gradients at the noise with the exact ones: cosine and length, by guidance scale and steps."""
    problem, result = Guided(pipe), {}
    reward = _rewards(problem.labels)["another class"][0]
    for scale in (1.0, 5.0):
        denoiser = PipelineDenoiser(pipe, guidance_scale=scale, prompt=problem.prompts)
        for steps in STEPS:

            def runs(estimator: Any, denoiser: Any = denoiser, steps: int = steps) -> Any:
                return run(problem.scheduler, denoiser.model_output, problem.noise, steps, estimator)

            def loss(end: torch.Tensor) -> torch.Tensor:
                return checked_reward(reward, backbone_of(pipe).decode(end), problem.prompts).sum()

            key = f"guidance scale {scale:g}, {steps} steps"
            rows = gradient_cosines(runs, AutodiffFisher(denoiser), problem.table(denoiser), loss)
            # Some products at high noise are so small that the gradient ends as zero.
            result[key] = {
                name: row if math.isfinite(row.get("log10_norm_ratio", 0)) else {"failed": "a gradient is zero"}
                for name, row in rows.items()
            }
            print(key, result[key], flush=True)
    return result


def _rewards(labels: list[int]) -> dict[str, tuple[Any, Any]]:
    """Returns rewards by name, each with a held-out one: of another class nothing, of brightness the own class."""
    folder = Path(embedded_checkpoint()) / "classifier"
    other, own = (
        ClassifierReward.from_pretrained(folder, target=[(label + shift) % 10 for label in labels]) for shift in (1, 0)
    )
    return {"another class": (other, None), "left minus right": (LinearReward.left_minus_right(32, 32), own)}


def _guided(pipe: Any, name: str, estimator: FisherEstimator | None, prompts: int) -> torch.Tensor:
    """Returns the best rewards so far after every guidance step, (steps + 1, prompts) float64."""
    labels, parts = [index % 10 for index in range(prompts)], []
    for first in range(0, prompts, BATCH):
        part = labels[first : first + BATCH]
        reward, held_out = _rewards(part)[name]
        out = pipe.guide(
            [embedded_prompt(label) for label in part], reward, num_guidance_steps=ITERATIONS, estimator=estimator,
            num_inference_steps=25, guidance_scale=2.0, held_out_reward=held_out,
            generator=torch.Generator().manual_seed(first), output_type="pt",
        )  # fmt: skip
        parts.append(torch.as_tensor(out.rewards, dtype=torch.float64))
    return torch.cat(parts, dim=1).cummax(0).values


def guidance(pipe: Any, folder: str) -> dict[str, Any]:
    """Runs the same guidance with the default, the direct estimator and exact gradients."""
    ways = {"default": None, "direct": DirectFisher(), "exact gradients": AutodiffFisher()}
    result: dict[str, Any] = {"prompts": PROMPTS, "steps": 25, "guidance_scale": 2.0, "iterations": ITERATIONS}
    for name in ("another class", "left minus right"):
        rows = {}
        for way, estimator in ways.items():
            begin = time.perf_counter()
            curve = _guided(pipe, name, estimator, PROMPTS)
            rows[way] = {
                "curve": curve.mean(1).tolist(), "standard_error": float(curve[-1].std() / PROMPTS**0.5),
                "seconds": time.perf_counter() - begin,
            }  # fmt: skip
            print(name, way, rows[way], flush=True)
        result[name] = rows
    return result


def half_precision(pipe: Any, folder: str) -> dict[str, Any]:
    """Returns what the default guidance reaches with a network in float16 less what it reaches in float32, paired."""
    networks = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    states = [{name: value.clone() for name, value in part.state_dict().items()} for part in networks]
    result: dict[str, Any] = {"prompts": HALF_PRECISION_PROMPTS, "iterations": ITERATIONS}
    for name in ("another class", "left minus right"):
        before = _guided(pipe, name, None, HALF_PRECISION_PROMPTS)
        pipe.to(torch.float16)
        after = _guided(pipe, name, None, HALF_PRECISION_PROMPTS)
        pipe.to(torch.float32)
        for part, state in zip(networks, states, strict=True):
            part.load_state_dict(state)  # not the rounded weights
        gaps = (after - before)[[0, -1]]
        result[name] = {
            "float32": before[[0, -1]].mean(1).tolist(), "float16": after[[0, -1]].mean(1).tolist(),
            "difference": gaps.mean(1).tolist(), "standard_error": (gaps.std(1) / gaps.shape[1] ** 0.5).tolist(),
        }  # fmt: skip
        print(name, result[name], flush=True)
    return result


PARTS: dict[str, Callable[[Any, str], dict[str, Any]]] = {
    "samples": samples, "likelihood": likelihood, "products": products, "gradients": gradients, "guidance": guidance,
    "half_precision": half_precision,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="parts to run; none: all")
    parser.add_argument("--folder", help="another checkpoint of that kind; no JSON is written")
    arguments = parser.parse_args()
    path, folder = FOLDER / "flow_checkpoint.json", arguments.folder or embedded_checkpoint("sd3")
    result = json.loads(path.read_text()) if path.is_file() else {}
    warnings.simplefilter("ignore", CoarseGridWarning)  # few calls are intended here
    with embedded_pipeline("sd3", arguments.folder) as pipe:
        for name in arguments.parts or PARTS:
            result[name] = {"machine": machine(), **PARTS[name](pipe, folder)}
            print(name, result[name], flush=True)
            if arguments.folder is None:
                write_json(path, result)


if __name__ == "__main__":
    main()
