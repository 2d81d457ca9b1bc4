"""Scatter of the likelihood by random directions of the trace, on whole Jacobians of the embedded checkpoint.

python examples/benchmarks/likelihood_probes.py --work outputs/likelihood_probes

Whole Jacobians along the solver's own path are kept in `--work`, so a killed run continues. With them the scatter over
any number of seeds is linear algebra, by the very directions that a likelihood would draw.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from common import save

from diffusers_fisher import (
    AutodiffFisher,
    FiniteDifferenceFisher,
    FisherEstimator,
    StableDiffusionFisherPipeline,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.files import load_tensors, save_tensors
from diffusers_fisher.fisher.autodiff import AutodiffOperator
from diffusers_fisher.fisher.estimate import Estimate
from diffusers_fisher.likelihood.draws import ImageDraws
from diffusers_fisher.likelihood.traces import NodeTrace, node_variance, standard_error

IMAGES, SEEDS = 16, 200
STEPS = (20, 32, 64)
PAIRED_SEEDS = 4
BIT = math.log(2)


class JacobianRecorder(FisherEstimator):
    """Takes exact traces by whole matrices, and keeps the matrices sigma^2 F/d, one (B, d, d) per level."""

    default_num_probes = None
    needs_denoiser = True

    def __init__(self, denoiser=None, matrices=None):
        self.denoiser = denoiser
        self.matrices = [] if matrices is None else matrices

    def __call__(self, state, endpoint=None):
        operator = AutodiffFisher(self.denoiser, chunk_size=64)(state)
        return RecordingOperator(operator, self.matrices)


class RecordingOperator(AutodiffOperator):
    def __init__(self, operator: AutodiffOperator, matrices: list[torch.Tensor]):
        super().__init__(operator.state, operator._function, operator.chunk_size)
        self._matrices = matrices

    def trace(self, probes=None, sketch=None) -> Estimate:
        matrix = self.dense().detach()
        scale = float(self.state.level.sigma) ** 2 / matrix.shape[1]
        self._matrices.append((scale * matrix).float().cpu())
        return Estimate.exact(matrix.diagonal(dim1=1, dim2=2).double().sum(1), 0)


def load() -> tuple[StableDiffusionFisherPipeline, torch.Tensor, list[str]]:
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = embedded_test_images()
    return pipe, images[:IMAGES], [embedded_prompt(int(label)) for label in labels[:IMAGES]]


def jacobians(work: Path, steps: int) -> dict[str, torch.Tensor]:
    """Returns matrices (levels, B, d, d), log-likelihoods, weights and levels of a likelihood with exact traces."""
    path = work / f"jacobians_{steps}.safetensors"
    if not path.is_file():
        pipe, images, prompts = load()
        recorder = JacobianRecorder()
        out = pipe.log_likelihood(images, prompts, num_inference_steps=steps, estimator=recorder)
        matrices = torch.stack(recorder.matrices)
        tensors = {
            "matrices": matrices, "log_prob": out.log_prob, "weights": out.trace_weights,
            "log_noise": out.noise_to_signal.log(),
        }  # fmt: skip
        save_tensors(path, tensors, {"steps": str(steps)})
    return load_tensors(path)[0]


def scatter(work: Path, steps: int) -> dict[str, Any]:
    """Returns the scatter over seeds and the calibration of the standard error, in bits/dim."""
    tensors = jacobians(work, steps)
    matrices, weights = tensors["matrices"].double(), tensors["weights"]
    exact = torch.einsum("nbii,n->b", matrices, weights)
    dimensions = matrices.shape[-1]
    samples = torch.zeros(len(exact), dimensions)
    deviations: dict[str, list[torch.Tensor]] = {"1 per level": [], "2 the same at all levels": []}
    errors = []
    for seed in range(SEEDS):
        draws = ImageDraws(samples, torch.Generator().manual_seed(seed), [str(index) for index in range(len(exact))])
        traces = []
        for matrix, log_noise in zip(matrices, tensors["log_noise"].tolist(), strict=True):
            vectors = draws.signs(1, "probes", f"{log_noise:.9f}").double()
            traces.append(NodeTrace.sampled(vectors, torch.einsum("bij,kbj->kbi", matrix, vectors)))
        deviations["1 per level"].append(
            sum(weight * trace.rest for weight, trace in zip(weights, traces, strict=True)) - exact
        )
        errors.append(standard_error(traces, node_variance(traces, False), weights, False))
        fixed = draws.signs(2, "probes", "fixed").double()
        totals = torch.einsum("n,nbij,kbi,kbj->b", weights, matrices, fixed, fixed) / 2
        deviations["2 the same at all levels"].append(totals - exact)
    ratio = torch.stack(deviations["1 per level"]) / torch.stack(errors)
    nats = dimensions * BIT
    return {
        "levels": steps + 1,
        "scatter": {name: _row(torch.stack(values) / nats) for name, values in deviations.items()},
        "stated": float(torch.stack(errors).mean() / nats),
        "coverage_68": float((ratio.abs() < 1).double().mean()),
        "coverage_95": float((ratio.abs() < 1.96).double().mean()),
        "variance_by_level": _shares(matrices, weights, tensors["log_noise"]),
    }


def _row(values: torch.Tensor) -> dict[str, float]:
    """Returns the scatter over seeds (rows), its mean over images and the largest."""
    spread = values.std(0)
    return {"mean": float(spread.square().mean().sqrt()), "largest": float(spread.max()), "bias": float(values.mean())}


def _shares(matrices: torch.Tensor, weights: torch.Tensor, log_noise: torch.Tensor) -> list[list[float]]:
    """Returns log s and the share of the variance of each level, mean over the images."""
    symmetric = (matrices + matrices.transpose(2, 3)) / 2
    off = symmetric.square().sum((2, 3)) - symmetric.diagonal(dim1=2, dim2=3).square().sum(2)
    variance = weights[:, None].square() * 2 * off
    share = (variance / variance.sum(0)).mean(1)
    return [[round(float(u), 4), round(float(each), 5)] for u, each in zip(log_noise, share, strict=True)]


def paired_bias(steps: int = 32) -> dict[str, float]:
    """Returns the mean paired difference of finite differences from back-propagation, bits/dim, and its error."""
    pipe, images, prompts = load()
    rows = []
    for seed in range(PAIRED_SEEDS):
        outputs = [
            pipe.log_likelihood(
                images,
                prompts,
                num_inference_steps=steps,
                estimator=estimator,
                generator=torch.Generator().manual_seed(seed),
            )
            for estimator in (FiniteDifferenceFisher(), AutodiffFisher())
        ]
        rows.append(outputs[0].bits_per_dim - outputs[1].bits_per_dim)
    by_image = torch.stack(rows).mean(0)
    return {"mean": float(by_image.mean()), "standard_error": float(by_image.std() / len(by_image) ** 0.5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("outputs/likelihood_probes"))
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    result = {"images": IMAGES, "seeds": SEEDS, "paired_bias": paired_bias()}
    result["scatter"] = [scatter(work, steps) for steps in STEPS]
    save("likelihood_probes", result)


if __name__ == "__main__":
    main()
