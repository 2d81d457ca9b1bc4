"""Compares trace matching with the exact trace of a mixture of 4,000 modes in 256 dimensions, fitted to real images.

    python examples/benchmarks/trace_matching_mixture.py

The modes are 4,000 training images of Fashion-MNIST at 16x16. "one variance": isotropic, fitted to other images by
expectation maximisation. "variance a class": 0.01 to 0.1, one for each of the ten classes, so that the trace at small
noise depends on the image. The denoiser is exact. Every model has the same network, steps and samples; the error is
mean |tr F_model - tr F|/|tr F| over fresh samples at timesteps of Stable Diffusion's schedule. Training runs on one
thread, so its processor time is the time that it takes on one free core.
"""

import abc
import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import common
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel

from diffusers_fisher import DenoisingState, FisherTraceModel, GaussianFisher, NoiseLevel, TraceMatchingFisher
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.seeds import step_generator
from diffusers_fisher.training.trace_losses import TraceObjective, draw_trace_batch

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist

TIMESTEPS = [1, 10, 50, 150, 300, 500, 700, 900, 999]
SHAPE = (1, 16, 16)
DIMENSIONS = math.prod(SHAPE)
MODES = 4000
SAMPLES = 64  # samples per step, each with two draws of noise
NETWORK = {"in_channels": 1, "patch_size": 2, "block_out_channels": (64, 128), "basis": "dct", "prior_shape": SHAPE}
RECIPES: dict[str, dict[str, Any]] = {
    "residual": {},
    "residual, without the prediction": {"use_prediction": False},
    "residual, independent noise": {"mirrored": False},
    "norm (paper's target)": {"target": "norm", "use_prediction": False},
    "norm, with the prediction": {"target": "norm"},
}


class SampledDenoiser(Denoiser):
    """A denoiser of a law of which samples can be drawn."""

    @abc.abstractmethod
    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws clean samples (count, C, h, w)."""


class IsotropicMixture(SampledDenoiser):
    """The exact denoiser of modes m_k with covariances v_k I and equal weights: two matrix products per call, float32.

    Args:
        means: (K, 256); variances: (K,).
    """

    def __init__(self, scheduler: Any, means: torch.Tensor, variances: torch.Tensor):
        super().__init__(scheduler)
        self.means, self.variances = means, variances

    def model_output(self, x: torch.Tensor, timestep: Any) -> torch.Tensor:
        self.num_calls += 1
        level = self.level(timestep)
        return self.epsilon_and_r(x.flatten(1), level.alpha, level.sigma)[0].view_as(x)

    def epsilon_and_r(
        self, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns E[eps|x] (B, 256) and tr Cov[eps|x]/d (B,), in the dtype of `x` (B, 256); levels are () or (B,)."""
        means, variances = self.means.to(x.dtype), self.variances.to(x.dtype)
        alpha, sigma = (value.to(x.dtype).expand(len(x))[:, None] for value in (alpha, sigma))
        total = alpha**2 * variances + sigma**2  # (B, K), variance of the noised mode
        squared = x.square().sum(1, keepdim=True) - 2 * alpha * (x @ means.mT) + alpha**2 * means.square().sum(1)
        weights = (-0.5 * squared / total - 0.5 * DIMENSIONS * total.log()).softmax(1)
        shares = weights / total
        epsilon = sigma * (x * shares.sum(1, keepdim=True) - alpha * (shares @ means))
        mode_variance = (shares * alpha**2 * variances).sum(1)
        mean_variance = (shares / total * sigma**2 * squared).sum(1) - epsilon.square().sum(1)
        return epsilon, mode_variance + mean_variance / DIMENSIONS

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws clean samples (count, 1, 16, 16)."""
        modes = torch.randint(len(self.means), (count,), generator=generator)
        noise = torch.randn(count, DIMENSIONS, generator=generator)
        return (self.means[modes] + self.variances[modes].sqrt()[:, None] * noise).view(count, *SHAPE)


def mixtures(scheduler: Any) -> dict[str, IsotropicMixture]:
    images, labels = fashion_mnist.load("train")
    pixels = F.avg_pool2d(images[:10000].float() / 127.5 - 1, 2).flatten(1)
    means, points = pixels[:MODES], pixels[MODES:]
    variance = torch.tensor(0.03)
    distances = torch.cdist(points, means).square()
    for _ in range(30):
        responsibilities = (-0.5 * distances / variance).softmax(1)
        variance = (responsibilities * distances).sum(1).mean() / DIMENSIONS
    by_class = torch.linspace(0.01, 0.1, 10)[labels[:MODES]]
    return {
        "one variance": IsotropicMixture(scheduler, means, variance.expand(MODES)),
        "variance a class": IsotropicMixture(scheduler, means, by_class),
    }


def train(
    mixture: SampledDenoiser, steps: int, seed: int, mirrored: bool = True, rate: float = 3e-3, **settings: Any
) -> FisherTraceModel:
    """Trains a trace model of `mixture` for `steps` steps; returns it with averaged parameters."""
    torch.manual_seed(seed)  # moving average of the parameters
    model = FisherTraceModel(**{**NETWORK, **settings})
    prior = GaussianFisher.fit_diagonal(mixture.sample(20000, step_generator(seed, "prior")), dct=True)
    shape = model.config.prior_shape
    model.set_prior(prior.mean, prior.covariance.variances.view(shape))
    objective = TraceObjective(model.config)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    average = EMAModel(parameters, decay=0.995)
    count = SAMPLES if mirrored else 2 * SAMPLES  # the same number of denoiser calls
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        clean = mixture.sample(count, step_generator(seed, "data", step))
        draw = draw_trace_batch(mixture.scheduler, tuple(shape), count, step, seed, mirrored=mirrored)
        objective(model, mixture, clean, draw).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)
    average.copy_to(parameters)
    return model.eval()


def errors(model: FisherTraceModel, mixture: IsotropicMixture, count: int) -> list[float]:
    """Returns the mean relative error of tr F over `count` fresh samples at each of `TIMESTEPS`."""
    result = []
    for timestep in TIMESTEPS:
        generator = step_generator(0, "evaluation", timestep)
        level = mixture.level(timestep)
        noise = torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64)
        x = level.alpha * mixture.sample(count, generator).double() + level.sigma * noise
        epsilon, r = mixture.epsilon_and_r(x.flatten(1), level.alpha, level.sigma)
        state = DenoisingState(
            x.float(), epsilon.float().view(x.shape), NoiseLevel(level.alpha, level.sigma), mixture.prediction
        )
        exact = DIMENSIONS * (1 - r) / level.sigma**2
        trace = TraceMatchingFisher(model)(state).trace().value
        result.append(float(((trace - exact) / exact).abs().mean()))
    return result


def run(steps: int, seeds: int, count: int) -> dict[str, Any]:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
    rows: list[dict[str, Any]] = []
    all_mixtures = mixtures(scheduler)
    for kind, mixture in all_mixtures.items():
        for name, recipe in RECIPES.items():
            for seed in range(seeds if name == "residual" else 1):
                begin = time.process_time()
                model = train(mixture, steps, seed, **recipe)
                row = {
                    "mixture": kind, "recipe": name, "seed": seed,
                    "processor_seconds": round(time.process_time() - begin, 1),
                    "relative_error": errors(model, mixture, count),
                }  # fmt: skip
                rows.append(row)
                numbers = " ".join(f"{value:.4f}" for value in row["relative_error"])
                print(f"{kind}, {name}, seed {seed}, {row['processor_seconds']} s: {numbers}", flush=True)
    worst = {
        kind: max(max(row["relative_error"]) for row in rows if row["mixture"] == kind and row["recipe"] == "residual")
        for kind in all_mixtures
    }
    return {
        "timesteps": TIMESTEPS, "steps": steps, "denoiser_calls_a_step": 2 * SAMPLES,
        "threads": torch.get_num_threads(), "parameters": FisherTraceModel(**NETWORK).num_parameters(),
        "evaluation_samples": count, "fitted_variance": float(all_mixtures["one variance"].variances[0]),
        "worst_residual": worst, "rows": rows,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000, help="samples that are evaluated at every timestep")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    common.save("trace_matching_mixture", run(arguments.steps, arguments.seeds, arguments.samples))


if __name__ == "__main__":
    main()
