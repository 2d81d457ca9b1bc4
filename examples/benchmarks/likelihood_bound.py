"""Which unexplained noise fraction makes the tightest bound, and what pairs and strata make of its standard error.

    python examples/benchmarks/likelihood_bound.py

Works on the embedded checkpoint and its test images: tables are fitted on the second half, and the first 16 images are
bounded. The bound is also compared with the ODE's value where both take whole Jacobians, and timed beside the ODE.
Writes likelihood_bound.json. Ten minutes on one core.
"""

import math

import torch
from common import paired_seconds, ratio, save

from diffusers_fisher import (
    AutodiffFisher,
    BoundOptions,
    FisherEstimator,
    FisherOperator,
    LevelFisher,
    LikelihoodBound,
    PipelineDenoiser,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
    denoiser_likelihood_bound,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    fit_level_fisher,
)

STEPS = (10, 20, 40)
COUNT, DRAWS = 16, 8
BIT = 256 * math.log(2)
WHOLE_IMAGES, WHOLE_DRAWS, ROUNDS = 4, 2, 3


class AverageFisher(FisherEstimator):
    """The mean of two estimators."""

    def __init__(self, first: FisherEstimator, second: FisherEstimator):
        self.first, self.second = first, second

    @property
    def components(self) -> dict[str, FisherEstimator]:
        return {"first": self.first, "second": self.second}

    def __call__(self, state, endpoint=None) -> FisherOperator:
        return 0.5 * (self.first(state, endpoint) + self.second(state, endpoint))


class Replay(PipelineDenoiser):
    """Keeps the outputs of its first use, for estimators that see the same states in the same order."""

    def start(self, outputs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> None:
        self.outputs, self.place = outputs, 0

    def model_output(self, x, timestep):
        if self.place == len(self.outputs):
            output = super().model_output(x, timestep)
            self.outputs.append((x.clone(), output, self._features))
        before, output, self._features = self.outputs[self.place]
        assert torch.equal(before, x)
        self.place += 1
        return output


def bound(denoiser, samples, estimator, pipe, steps, seed=0, **options) -> LikelihoodBound:
    mean, variance = pipe.latent_statistics
    options = {"num_steps": steps, "prior_mean": mean, "prior_variance": variance, **options}
    generator = torch.Generator().manual_seed(seed)
    return denoiser_likelihood_bound(denoiser, samples, estimator, BoundOptions(generator=generator, **options))


def compare_fractions(pipe, samples, prompts, estimators, ode) -> list[dict]:
    """Returns a row per number of steps and estimator: gaps above the ODE and above the trace model's bound."""
    denoiser, rows = Replay(pipe, prompt=prompts), []
    for steps in STEPS:
        outputs, first = [], None
        for name, estimator in estimators.items():
            denoiser.start(outputs)
            out = bound(denoiser, samples, estimator, pipe, steps, num_draws=DRAWS)
            bits = out.bits_per_dim
            first = bits if first is None else first
            difference = bits - first
            rows.append({
                "steps": steps, "fraction": name, "bits_per_dim": float(bits.mean()),
                "above_ode": float((bits - ode).mean()),
                "standard_error_per_image": float(out.standard_error.mean() / BIT),
                "above_trace_model": float(difference.mean()),
                "above_trace_model_standard_error": float(difference.std() / len(bits) ** 0.5),
                "clamped": float(out.clamped.mean()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


def scatter(pipe, sample, prompt, estimator) -> dict[str, float]:
    """Returns the standard deviation of one image's bound by 8 draws of each of 20 steps, over 16 repetitions."""
    samples, keys = sample.expand(COUNT, *sample.shape[1:]), [str(number) for number in range(COUNT)]
    denoiser = PipelineDenoiser(pipe, prompt=[prompt] * COUNT)
    out = bound(denoiser, samples, estimator, pipe, 20, num_draws=DRAWS, keys=keys)
    single = [
        bound(denoiser, samples, estimator, pipe, 20, seed, num_draws=1, keys=keys).bits_per_dim
        for seed in range(DRAWS)
    ]
    return {
        "independent_draws": float(torch.stack(single).mean(0).std()),
        "pairs_in_strata": float(out.bits_per_dim.std()),
        "stated_standard_error": float(out.standard_error.square().mean().sqrt() / BIT),
    }


def sandwich(pipe, samples, prompts, trace) -> dict[str, float]:
    """Returns the ODE's value and the bound of some images, both with whole Jacobians, in bits/dim."""
    samples, prompts = samples[:WHOLE_IMAGES], prompts[:WHOLE_IMAGES]
    whole = AutodiffFisher(chunk_size=64)
    ode = pipe.log_likelihood(
        latents=samples, prompt=prompts, estimator=whole, num_probes=None, num_inference_steps=STEPS[1]
    )  # fmt: skip
    denoiser = Replay(pipe, prompt=prompts)
    outputs: list = []
    denoiser.start(outputs)
    by_model = bound(denoiser, samples, trace, pipe, STEPS[1], num_draws=WHOLE_DRAWS)
    exact = bound(
        PipelineDenoiser(pipe, prompt=prompts), samples, whole, pipe, STEPS[1], num_draws=WHOLE_DRAWS, num_probes=None
    )
    return {
        "images": WHOLE_IMAGES, "steps": STEPS[1], "draws": WHOLE_DRAWS, "ode": float(ode.bits_per_dim.mean()),
        "ode_total_error": float(ode.total_error_bits.mean()), "bound": float(exact.bits_per_dim.mean()),
        "bound_standard_error": float(exact.standard_error.square().mean().sqrt() / BIT / WHOLE_IMAGES**0.5),
        "bound_by_trace_model": float(by_model.bits_per_dim.mean()),
    }  # fmt: skip


def cost(pipe, samples, prompts, trace) -> dict:
    """Returns calls and seconds of the bound by 20 steps and 8 draws, and those of the ODE with its 33 levels."""
    samples, prompts = samples[:WHOLE_IMAGES], prompts[:WHOLE_IMAGES]
    denoiser = PipelineDenoiser(pipe, prompt=prompts)
    tasks = {
        "bound": lambda: bound(denoiser, samples, trace, pipe, STEPS[1], num_draws=DRAWS),
        "ode": lambda: pipe.log_likelihood(latents=samples, prompt=prompts, num_inference_steps=32),
    }
    seconds = paired_seconds(tasks, ROUNDS)
    return {
        "images": WHOLE_IMAGES, "bound_calls": tasks["bound"]().num_denoiser_calls,
        "ode_calls": tasks["ode"]().num_denoiser_calls, "seconds": seconds, "ratio": ratio(seconds, "bound", "ode"),
    }  # fmt: skip


def main() -> None:
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = embedded_test_images()
    prompts = [embedded_prompt(int(label)) for label in labels]
    with torch.no_grad():
        means, deviation = pipe_latents(pipe, images)
    half = max(COUNT, len(images) // 2)
    generator = torch.Generator().manual_seed(1)
    others = PipelineDenoiser(pipe, prompt=prompts[half:])
    drawn = means + deviation * torch.randn(means.shape, generator=generator)
    tables = {
        name: fit_level_fisher(others, latents[half:], 30, 2, torch.Generator().manual_seed(2))
        for name, latents in (("means", means), ("drawn", drawn))
    }
    trace = TraceMatchingFisher(pipe.trace_model)
    estimators = {
        "trace model (target jacobian)": trace,
        "table of squared errors, mean latents": tables["means"],
        "table of squared errors, drawn latents": tables["drawn"],
        "mean of trace model and table, mean latents": AverageFisher(trace, tables["means"]),
        "0.5 at every level": LevelFisher(torch.ones(1), torch.full((1,), 0.5)),
    }
    samples = means[:COUNT]
    ode = pipe.log_likelihood(latents=samples, prompt=prompts[:COUNT]).bits_per_dim
    rows = compare_fractions(pipe, samples, prompts[:COUNT], estimators, ode)
    save("likelihood_bound", {
        "images_bounded": COUNT, "images_fitted": len(images) - half, "draws": DRAWS, "ode_bits_per_dim":
        float(ode.mean()), "rows": rows, "scatter_in_bits_per_dim": scatter(pipe, samples[:1], prompts[0], trace),
        "whole_jacobian": sandwich(pipe, samples, prompts[:COUNT], trace),
        "cost": cost(pipe, samples, prompts[:COUNT], trace),
        "table": {
            "noise_to_signal": [round(float(value), 5) for value in tables["means"].noise_to_signal],
            **{name: [round(float(value), 5) for value in table.unexplained_noise_fraction]
               for name, table in tables.items()},
        },
    })  # fmt: skip


def pipe_latents(pipe, images) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns mean and deviation of the images' scaled latents."""
    from diffusers_fisher import backbone_of

    return backbone_of(pipe).encode(2 * images - 1)


if __name__ == "__main__":
    main()
