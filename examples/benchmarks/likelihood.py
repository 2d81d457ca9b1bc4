"""Compares likelihoods with closed forms, with the adaptive reference, and with each other; writes likelihood.json.

python examples/benchmarks/likelihood.py [PART ...]

The parts are closed_forms, other_laws, reference, checkpoint, jacobian, trace_model and comparison. The benchmark runs
the parts that are named, or all without names. "checkpoint" uses the last results of "reference", and "trace_model"
those of "jacobian", because neither of these depends on the trace model. All parts take two hours. The closed forms
need Fashion-MNIST (see examples/fashion_mnist.py).
"""

import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from common import FOLDER, machine
from mixtures import fashion_mnist, fitted_mixture, small_images

from diffusers_fisher import (
    EMBEDDED_CLASSES,
    AutodiffFisher,
    CoarseGridWarning,
    Covariance,
    ExactFisher,
    GaussianMixture,
    NoiseLevel,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
)
from diffusers_fisher.backbones import backbone_of
from diffusers_fisher.files import write_json
from diffusers_fisher.likelihood import (
    DEFAULT_SCHEME,
    SCHEMES,
    Integration,
    LikelihoodOutput,
    integrate_log_likelihood,
    reference_log_likelihood,
    squared_error_log_likelihood,
)
from diffusers_fisher.likelihood.pipeline import unguided_denoiser
from diffusers_fisher.noise import log_noise_to_signal_range, timestep_at
from diffusers_fisher.testing import OracleDenoiser

SHAPE = (4, 8, 8)
BIT = math.prod(SHAPE) * math.log(2)  # nats of one bit/dim
DRAWS = 32
CALLS = (11, 20, 41, 100)
NUM_IMAGES = 16
MORE_IMAGES = 32  # images for the comparison of the trace model with whole Jacobians
GROUP = 4  # images per reference; they share its steps, which the most difficult image determines
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "Stable Diffusion": lambda: diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False
    ),
    "flow matching": diffusers.FlowMatchEulerDiscreteScheduler,
}


def distributions() -> dict[str, GaussianMixture]:
    """Returns distributions of 4x8x8 samples whose noised densities are known, in float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.nn.functional.pixel_unshuffle(small_images()[:20000], 2)
    labels = fashion_mnist.load("train")[1][:20000]
    classes = [images[labels == label].flatten(1) for label in range(10)]
    floor = 1e-3 * torch.eye(256, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(256, 256, dtype=torch.float64, generator=generator)).Q
    spectrum = torch.arange(1, 257, dtype=torch.float64) ** -1.0
    power = rotation @ torch.diag(0.25 * spectrum / spectrum.mean()) @ rotation.T
    centres = torch.randn(20, *SHAPE, dtype=torch.float64, generator=generator)
    variances = torch.logspace(-2, -1, 20, dtype=torch.float64).view(20, 1, 1, 1).expand(20, *SHAPE).clone()
    return {
        "Gaussian, variance 0.05": GaussianMixture(
            torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.isotropic(0.05, SHAPE)
        ),
        "Gaussian, variance 1": GaussianMixture(
            torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.isotropic(1.0, SHAPE)
        ),
        "Gaussian, rotated power law": GaussianMixture(0.3 * centres[:1], Covariance.full(power[None], SHAPE)),
        "300 modes fitted to images": fitted_mixture(images, 300),
        "10 classes of images, full covariances": GaussianMixture(
            torch.stack([pixels.mean(0) for pixels in classes]).view(10, *SHAPE),
            Covariance.full(torch.stack([torch.cov(pixels.T) + floor for pixels in classes]), SHAPE),
        ),
        "20 random modes, variances 0.01 to 0.1": GaussianMixture(0.5 * centres, Covariance.diagonal(variances)),
        "20 far modes, variances 0.01 to 0.1": GaussianMixture(centres, Covariance.diagonal(variances)),
    }


def other_distributions() -> dict[str, GaussianMixture]:
    """Returns distributions that played no part in the choice of the grid and of the error estimate."""
    generator = torch.Generator().manual_seed(77)

    def modes(count: int, scale: float, low: float, high: float) -> GaussianMixture:
        centres = scale * torch.randn(count, *SHAPE, dtype=torch.float64, generator=generator)
        variances = torch.logspace(math.log10(low), math.log10(high), count, dtype=torch.float64)
        return GaussianMixture(centres, Covariance.diagonal(variances.view(-1, 1, 1, 1).expand(count, *SHAPE).clone()))

    def gaussian(variance: float) -> GaussianMixture:
        return GaussianMixture(torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.isotropic(variance, SHAPE))

    return {
        "Gaussian, variance 0.01": gaussian(0.01), "Gaussian, variance 4": gaussian(4.0),
        "2 modes of scale 1.5, variance 0.1": modes(2, 1.5, 0.1, 0.1),
        "3 modes of scale 1, variances 0.01 to 0.1": modes(3, 1.0, 0.01, 0.1),
        "50 modes of scale 0.3, variances 0.003 to 0.1": modes(50, 0.3, 0.003, 0.1),
        "20 modes of scale 2, variances 0.01 to 1": modes(20, 2.0, 0.01, 1.0),
        "200 modes of scale 0.7, variances 0.001 to 0.01": modes(200, 0.7, 0.001, 0.01),
    }  # fmt: skip


def moments(law: GaussianMixture) -> dict[str, torch.Tensor]:
    """Returns the mean and the variance of every element."""
    mean = torch.einsum("k,kchw->chw", law.weights, law.means)
    modes = torch.arange(len(law.covariance))
    variances = torch.stack([law.covariance.select(modes[k : k + 1]).dense()[0].diagonal() for k in modes.tolist()])
    spread = variances.view(-1, *SHAPE) + (law.means - mean).square()
    return {"prior_mean": mean, "prior_variance": torch.einsum("k,kchw->chw", law.weights, spread)}


def practice(law: GaussianMixture, samples: torch.Tensor, scheduler: Any, calls: int) -> torch.Tensor:
    """Returns the log-likelihood by common practice: Euler on equally spaced timesteps, standard prior.

    The trace is integrated by the left rule, and the steps of the sample are those of DDIM inversion.
    """
    low, high = log_noise_to_signal_range(scheduler)
    ends = timestep_at(scheduler, torch.tensor([low, high], dtype=torch.float64))
    denoiser, estimator = OracleDenoiser(law, scheduler), ExactFisher(law)
    timesteps = torch.linspace(float(ends[0]), float(ends[1]), calls + 1, dtype=torch.float64)
    x, integral = samples, torch.zeros(len(samples), dtype=torch.float64)
    for index in range(calls):
        ratio, next_ratio = (denoiser.level(timesteps[i]).noise_to_signal for i in (index, index + 1))
        level = denoiser.level(timesteps[index])
        state = denoiser.state(level.alpha * x, timesteps[index])
        integral = integral + (next_ratio / ratio).log() * level.sigma**2 * estimator(state).trace().value
        x = x + (next_ratio - ratio) * state.epsilon
    normal = torch.distributions.Normal(0.0, float((1 + next_ratio**2).sqrt()))
    return normal.log_prob(x).flatten(1).sum(1) + integral


def closed_forms(laws: dict[str, GaussianMixture], draws: int, schemes: Sequence[str]) -> dict[str, Any]:
    """Returns errors against exact densities by scheme and calls, with the coverage of the error estimates."""
    rows = []
    for schedule, make in SCHEDULERS.items():
        scheduler = make()
        for name, law in laws.items():
            samples = law.sample(draws, torch.Generator().manual_seed(1))
            prior = moments(law)

            def run(calls: int, scheme: str, law=law, prior=prior, samples=samples, scheduler=scheduler):
                denoiser = OracleDenoiser(law, scheduler)
                return integrate_log_likelihood(
                    denoiser, samples, ExactFisher(law), Integration(calls - 1, None, **prior, scheme=scheme)
                )

            reference_run = run(401, "adams4")
            smoothing = NoiseLevel(torch.ones((), dtype=torch.float64), reference_run.noise_to_signal[0])
            exact = law.log_density(samples, smoothing)
            floor = ((reference_run.log_prob - exact) / BIT).abs()
            for calls in CALLS:
                row = {"schedule": schedule, "law": name, "calls": calls, "prior_floor": float(floor.mean())}
                peers = ((practice(law, samples, scheduler, calls) - exact) / BIT).abs()
                rows.append({**row, "scheme": "practice", "errors": peers.tolist()})
                for scheme in schemes:
                    out = run(calls, scheme)
                    rows.append({
                        **row, "scheme": scheme,
                        "errors": ((out.log_prob - exact) / BIT).abs().tolist(),
                        "discretisation_errors": ((out.log_prob - reference_run.log_prob) / BIT).abs().tolist(),
                        "estimates": (out.discretisation_error / BIT).tolist(),
                    })  # fmt: skip
            print(schedule, name, flush=True)
    return {"laws": list(laws), "draws": draws, "summary": _summary(rows), "by_law": [_by_law(row) for row in rows]}


def _summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the errors over all distributions together, by schedule, scheme and calls."""
    result = []
    for schedule in SCHEDULERS:
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            for calls in CALLS:
                group = [
                    row for row in rows if (row["schedule"], row["scheme"], row["calls"]) == (schedule, scheme, calls)
                ]
                errors = _concatenate(group, "errors")
                summary = {
                    "schedule": schedule, "scheme": scheme, "calls": calls, "mean": float(errors.mean()),
                    "worst": float(errors.max()),
                }  # fmt: skip
                if scheme != "practice":
                    true, estimates = _concatenate(group, "discretisation_errors"), _concatenate(group, "estimates")
                    summary |= {
                        "mean_discretisation_error": float(true.mean()),
                        "covered": float((estimates >= true).double().mean()),
                        "median_estimate_over_median_error": float(estimates.median() / true.median()),
                    }
                result.append(summary)
    return result


def _concatenate(rows: list[dict[str, Any]], key: str) -> torch.Tensor:
    return torch.tensor([value for row in rows for value in row[key]], dtype=torch.float64)


def _by_law(row: dict[str, Any]) -> dict[str, Any]:
    summary = {key: row[key] for key in ("schedule", "law", "scheme", "calls", "prior_floor")}
    if row["scheme"] != "practice":
        summary["covered"] = float(
            (_concatenate([row], "estimates") >= _concatenate([row], "discretisation_errors")).double().mean()
        )
    return summary | {
        "mean": float(_concatenate([row], "errors").mean()),
        "worst": float(_concatenate([row], "errors").max()),
    }


def _pipe() -> tuple[Any, torch.Tensor, torch.Tensor]:
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    images, labels = embedded_test_images()
    return pipe, images, labels


def _problem(count: int = NUM_IMAGES) -> tuple[Any, torch.Tensor, list[str]]:
    """Returns the pipeline, latents of the first test images, and their prompts."""
    pipe, images, labels = _pipe()
    prompts = [embedded_prompt(int(label)) for label in labels[:count]]
    return pipe, backbone_of(pipe).samples_of(images[:count]), prompts


def reference() -> dict[str, Any]:
    """Computes likelihoods of the embedded checkpoint by adaptive steps with whole Jacobians."""
    pipe, latents, prompts = _problem()
    results = []
    for first in range(0, NUM_IMAGES, GROUP):
        group = slice(first, first + GROUP)
        denoiser = unguided_denoiser(backbone_of(pipe), latents[group], 1.0, prompts[group], {})
        results.append(reference_log_likelihood(denoiser, latents[group], None, 1e-4, 9, *pipe.latent_statistics))
        print(f"reference of {first + GROUP} images", flush=True)
    return {
        "log_prob": torch.cat([out.log_prob for out in results]).tolist(),
        "bits_per_dim": torch.cat([out.bits_per_dim for out in results]).tolist(),
        "calls": max(out.num_denoiser_calls for out in results),
        "error": float(max(out.discretisation_error.max() for out in results) / BIT),
    }  # fmt: skip


def checkpoint(reference_values: dict[str, Any]) -> dict[str, Any]:
    """Compares every way to a likelihood of the embedded checkpoint with the reference (`reference_values`)."""
    pipe, latents, prompts = _problem()
    expected = torch.tensor(reference_values["log_prob"], dtype=torch.float64)
    result: dict[str, Any] = {"images": NUM_IMAGES, "rows": []}

    def note(name: str, out: LikelihoodOutput) -> None:
        errors = ((out.log_prob - expected) / BIT).abs()
        finite = out.standard_error[out.standard_error.isfinite()]
        result["rows"].append({
            "what": name, "calls": out.num_denoiser_calls, "mean": float(errors.mean()), "worst": float(errors.max()),
            "estimate": float(out.discretisation_error.mean() / BIT),
            "standard_error": float(finite.mean() / BIT) if len(finite) else None,
        })  # fmt: skip
        print(result["rows"][-1], flush=True)

    def score(steps: int, probes: int | None, estimator: Any = None, **options: Any) -> LikelihoodOutput:
        generator = torch.Generator().manual_seed(0)
        estimator = AutodiffFisher(chunk_size=64) if estimator is None else estimator
        return pipe.log_likelihood(
            latents=latents, prompt=prompts, num_inference_steps=steps, num_probes=probes, estimator=estimator,
            generator=generator, **options,
        )  # fmt: skip

    for calls in (20, 40):
        note(f"{DEFAULT_SCHEME}, Jacobian trace", score(calls - 1, None))
    for probes in (2, 16):
        note(f"{DEFAULT_SCHEME}, {probes} probes", score(39, probes))
    single = score(39, 2)
    if pipe.trace_model is not None:
        trace = score(39, None, TraceMatchingFisher(pipe.trace_model))
        note(f"{DEFAULT_SCHEME}, DF-TM (target {pipe.trace_model.target})", trace)
    pipe.to(torch.bfloat16)
    half = score(39, 2)
    note(f"{DEFAULT_SCHEME}, 2 probes, network in bfloat16", half)
    result["bfloat16_less_float32"] = float(((half.log_prob - single.log_prob) / BIT).abs().mean())
    return result


def _at_40_calls(estimator: Any) -> torch.Tensor:
    """Returns log-probabilities of the first `MORE_IMAGES` test images in nats."""
    pipe, latents, prompts = _problem(MORE_IMAGES)
    results = []
    for first in range(0, MORE_IMAGES, GROUP):
        group = slice(first, first + GROUP)
        out = pipe.log_likelihood(
            latents=latents[group], prompt=prompts[group], num_inference_steps=39, num_probes=None, estimator=estimator
        )
        results.append(out.log_prob)
        print(f"{out.trace}: {first + GROUP} images", flush=True)
    return torch.cat(results)


def jacobian() -> dict[str, Any]:
    """Computes likelihoods of the embedded checkpoint by whole Jacobians at 40 calls."""
    return {"images": MORE_IMAGES, "calls": 40, "log_prob": _at_40_calls(AutodiffFisher(chunk_size=64)).tolist()}


def trace_model(jacobian_values: dict[str, Any]) -> dict[str, Any]:
    """Compares DF-TM with the whole Jacobian, `jacobian_values`, at the same 40 calls, image by image."""
    log_prob = _at_40_calls(None)  # the checkpoint's default is its trace model
    errors = (log_prob - torch.tensor(jacobian_values["log_prob"], dtype=torch.float64)) / BIT
    return {
        "images": MORE_IMAGES, "calls": 40, "errors": errors.tolist(), "mean": float(errors.abs().mean()),
        "worst": float(errors.abs().max()), "within_0.05": int((errors.abs() < 0.05).sum()),
    }  # fmt: skip


def comparison() -> dict[str, Any]:
    """Ranks prompts for test images by squared errors with shared draws, and compares with separate draws."""
    pipe, images, labels = _pipe()
    images, labels = images[:16], labels[:16]
    prompts = [embedded_prompt(label) for label in range(len(EMBEDDED_CLASSES))]
    out = pipe.compare_likelihood(images, prompts, num_levels=32, generator=torch.Generator().manual_seed(0))
    _, paired_error = out.behind_best_prompt()
    single_variance = (out.contributions.unflatten(0, (-1, 2)).diff(dim=1)[:, 0].square().sum(0).sqrt() / 32).square()
    unpaired_error = (single_variance + single_variance.gather(0, out.best_prompt[None])).sqrt()
    is_other = paired_error > 0
    against_ode = squared_error_likelihood_against_ode(pipe, images[:8], [prompts[int(label)] for label in labels[:8]])
    return {
        "images": len(images), "prompts": len(prompts), "levels": 32, "denoiser_calls": out.num_denoiser_calls,
        "own_prompt_is_likeliest": float((out.best_prompt == labels).double().mean()),
        "standard_error_nats": float(paired_error[is_other].mean()),
        "standard_error_nats_without_shared_draws": float(unpaired_error[is_other].mean()),
        "squared_error_against_ode": against_ode,
    }  # fmt: skip


def squared_error_likelihood_against_ode(pipe: Any, images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Compares squared errors with the ODE, which estimate the same density.

    The network's squared error is above its Jacobian's r.
    """
    latents = backbone_of(pipe).samples_of(images)
    denoiser = unguided_denoiser(backbone_of(pipe), latents, 1.0, prompts, {})
    mean, variance = pipe.latent_statistics
    squared = squared_error_log_likelihood(denoiser, latents, 256, mean, variance, torch.Generator().manual_seed(0))
    draws = [
        pipe.log_likelihood(
            latents=latents, prompt=prompts, num_inference_steps=32, num_probes=2, noised=True,
            estimator=AutodiffFisher(), generator=torch.Generator().manual_seed(seed),
        ).log_prob
        for seed in range(4)
    ]  # fmt: skip
    difference = (torch.stack(draws).mean(0) - squared.log_prob) / BIT
    return {
        "squared_error_minus_ode_bits": float(difference.mean()),
        "standard_error_bits": float(difference.std() / len(difference) ** 0.5),
        "squared_error_bits_per_dim": float(squared.bits_per_dim.mean()),
    }


PARTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "closed_forms": lambda result: closed_forms(distributions(), DRAWS, tuple(SCHEMES)),
    "other_laws": lambda result: closed_forms(other_distributions(), DRAWS // 2, (DEFAULT_SCHEME,)),
    "reference": lambda result: reference(),
    "checkpoint": lambda result: checkpoint(result["reference"]),
    "jacobian": lambda result: jacobian(),
    "trace_model": lambda result: trace_model(result["jacobian"]),
    "comparison": lambda result: comparison(),
}


def main() -> None:
    names = sys.argv[1:] or list(PARTS)
    path = FOLDER / "likelihood.json"
    result = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoarseGridWarning)  # few calls are intended here
            result[name] = {"machine": machine(), **PARTS[name](result)}
        write_json(path, result)
        print(f"wrote {name} to {path}", flush=True)


if __name__ == "__main__":
    main()
