"""Are stated posterior deviations right? In closed form, and against samples of the posterior on a checkpoint.

    python examples/benchmarks/posterior_uncertainty.py

The closed forms are Gaussians fitted to images, one and a mixture, with their exact denoiser: how many elements of the
clean sample lie in their intervals. On the embedded checkpoint the posterior at a noised test image is sampled by the
reverse chain with the optimal variance (that of `likelihood_bound`), from the same state with other noise, and its
deviations and its variance along the stated directions are compared with the stated ones, in latents and in pixels.
Needs Fashion-MNIST for the closed forms. Writes posterior_uncertainty.json and docs/images/posterior_uncertainty.png.
A few minutes on one core.
"""

import math
from typing import Any

import torch
from common import PICTURES, save
from diffusers import DDIMScheduler
from mixtures import fitted_mixture, small_images

from diffusers_fisher import (
    FiniteDifferenceFisher,
    PipelineDenoiser,
    PosteriorUncertainty,
    StableDiffusionFisherPipeline,
    TraceMatchingFisher,
    backbone_of,
    decode_uncertainty,
    embedded_checkpoint,
    embedded_prompt,
    embedded_test_images,
    state_uncertainty,
    uncertainty_pictures,
)
from diffusers_fisher.files import save_figure
from diffusers_fisher.noise import expand, log_noise_to_signal_range, timestep_at
from diffusers_fisher.testing import OracleDenoiser

PICTURE = PICTURES / "posterior_uncertainty.png"
SCHEDULER = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEVELS = (0.5, 1.5, 4.0)
IMAGES, DRAWS, STEPS, PROBES = 3, 48, 32, 128
INTERVALS = {"68%": 1.0, "95%": 1.96}


def covered(clean: torch.Tensor, out: PosteriorUncertainty) -> dict[str, float]:
    """Returns the shares of the elements of clean samples (..., B, C, h, w) that lie in their intervals."""
    ends = {name: out.interval(deviations) for name, deviations in INTERVALS.items()}
    return {name: float(((low <= clean) & (clean <= high)).double().mean()) for name, (low, high) in ends.items()}


def closed_forms(count: int = 50) -> list[dict[str, Any]]:
    """Returns a row per law and noise level: shares of elements in their intervals, and errors by directions."""
    images, rows = small_images()[:10000], []
    for name, modes in (("one Gaussian", 1), ("mixture of 30 Gaussians", 30)):
        law = fitted_mixture(images, modes)
        denoiser, generator = OracleDenoiser(law, SCHEDULER), torch.Generator().manual_seed(0)
        clean = law.sample(count, generator).double()
        for noise_to_signal in (0.2, *LEVELS):
            timestep = timestep_at(SCHEDULER, torch.tensor(noise_to_signal, dtype=torch.float64).log())
            level = denoiser.level(timestep)
            noise = torch.randn(clean.shape, dtype=torch.float64, generator=generator)
            x = expand(level.alpha, clean) * clean + expand(level.sigma, clean) * noise
            operator = FiniteDifferenceFisher(denoiser)(denoiser.state(x, timestep))
            out = state_uncertainty(operator, generator=generator)
            along = torch.einsum("nb...,b...->nb", out.directions, clean - out.mean) / out.eigenvalues.sqrt()
            error = out.variance_error.flatten(1).square().sum(1).sqrt() / out.variance.flatten(1).norm(dim=1)
            rows.append({
                "law": name, "noise_to_signal": noise_to_signal, "samples": count, "covered": covered(clean, out),
                "along_directions": {
                    key: float((along.abs() <= deviations).double().mean()) for key, deviations in INTERVALS.items()
                },
                "error_of_the_probes": float(error.mean()),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


@torch.no_grad()
def sample_posterior(
    denoiser: PipelineDenoiser, trace: TraceMatchingFisher, x: torch.Tensor, log_noise: float, steps: int
) -> torch.Tensor:
    """Draws clean samples from the model's posterior at x~ = `x` (B, ...), float64.

    With V = s^2 a step from t to s has the mean a m + (1 - a) x~ with m = x~ - t eps, a = (V_t - V_s)/V_t, and the
    optimal variance V_s a + a^2 V_t r.
    """
    low, _ = log_noise_to_signal_range(denoiser.scheduler)
    grid = torch.linspace(log_noise, low, steps + 1, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(timestep_at(denoiser.scheduler, grid)):
        begin = float((2 * grid[index]).exp())
        level = denoiser.level(timestep)
        state = denoiser.state((expand(level.alpha, x) * x).float(), timestep.float())
        original = x - math.sqrt(begin) * state.epsilon.double()
        if index == steps:
            return original
        end = float((2 * grid[index + 1]).exp())
        share = 1 - end / begin
        rest = 1 - float(level.sigma) ** 2 * trace(state).trace().value / x[0].numel()
        deviation = (end * share + share**2 * begin * rest.clamp(0, 1)).sqrt()
        noise = torch.randn(x.shape, dtype=torch.float64, generator=generator)
        x = share * original + (1 - share) * x + expand(deviation, x) * noise
    raise AssertionError("the last step returns")


def checkpoint(pipe) -> list[dict[str, Any]]:
    """Returns a row per noise level: what samples of the posterior say of the stated deviations and directions."""
    images, labels = (tensor[:IMAGES] for tensor in embedded_test_images())
    prompts = [embedded_prompt(int(label)) for label in labels]
    latents, rows = backbone_of(pipe).samples_of(images).double(), []
    trace = TraceMatchingFisher(pipe.trace_model)
    single = PipelineDenoiser(pipe, prompt=prompts)
    many = PipelineDenoiser(pipe, prompt=[prompt for prompt in prompts for _ in range(DRAWS)])
    generator = torch.Generator().manual_seed(1)
    for noise_to_signal in LEVELS:
        x = latents + noise_to_signal * torch.randn(latents.shape, dtype=torch.float64, generator=generator)
        timestep = timestep_at(pipe.scheduler, torch.tensor(noise_to_signal, dtype=torch.float64).log())
        level = single.level(timestep)
        operator = FiniteDifferenceFisher(single)(single.state((expand(level.alpha, x) * x).float(), timestep.float()))
        out = state_uncertainty(operator, num_probes=PROBES, generator=generator)
        starts = x.repeat_interleave(DRAWS, 0)
        draws = sample_posterior(many, trace, starts, math.log(noise_to_signal), STEPS)
        draws = draws.view(IMAGES, DRAWS, *latents.shape[1:]).transpose(0, 1)
        rows.append({"noise_to_signal": noise_to_signal, **compare(pipe, out, draws)})
        print(rows[-1], flush=True)
    return rows


def compare(pipe, out: PosteriorUncertainty, draws: torch.Tensor) -> dict[str, Any]:
    """Compares a stated uncertainty with draws (draws, B, C, h, w) of the posterior."""
    sampled = draws.var(0)
    along = torch.einsum("nb...,kb...->knb", out.directions, draws - draws.mean(0)).square().sum(0) / (len(draws) - 1)
    ratio = (sampled.flatten(1).sum(1) / out.total_variance).sqrt()
    directions = (along / out.eigenvalues).sqrt()
    pixels = decode_uncertainty(pipe, out, num_samples=len(draws), generator=torch.Generator().manual_seed(2))
    decoded = torch.stack([backbone_of(pipe).decode(each.float()).detach() for each in draws])
    pixel_deviation = decoded.std(0)
    return {
        "images": draws.shape[1], "draws": len(draws), "stated_deviation": float(out.standard_deviation.mean()),
        "sampled_over_stated": float(ratio.mean()), "by_image": ratio.tolist(),
        "rank_correlation": _correlation(out.standard_deviation, sampled.sqrt()),
        "covered": covered(draws, out),
        "along_directions": directions.mean(1).tolist(),
        "share_of_directions": out.explained.mean(1).tolist(),
        "mean_distance_over_deviation": float(
            (draws.mean(0) - out.mean).flatten(1).norm(dim=1).div(out.total_variance.sqrt()).mean()
        ),
        "pixels": {
            "stated_deviation": float(pixels.standard_deviation.mean()),
            "sampled_over_stated": float(
                (pixel_deviation.square().sum() / pixels.standard_deviation.square().sum()).sqrt()
            ),
            "rank_correlation": _correlation(pixels.standard_deviation, pixel_deviation),
        },
    }  # fmt: skip


def _correlation(left: torch.Tensor, right: torch.Tensor) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr(left.flatten(), right.flatten()).statistic)


def draw_preview(pipe) -> None:
    """Draws what a run of 25 steps leaves open at its tenth step."""
    prompts, kept = [embedded_prompt(label) for label in (1, 8, 9)], {}

    def keep(_, step, timestep, arguments):
        if step == 9:
            kept["latents"], kept["timestep"] = arguments["latents"], pipe.scheduler.timesteps[step + 1]
        return arguments

    pipe(
        prompts, num_inference_steps=25, guidance_scale=1.0, callback_on_step_end=keep,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    denoiser = PipelineDenoiser(pipe, prompt=prompts)
    with torch.no_grad():
        operator = FiniteDifferenceFisher(denoiser)(denoiser.state(kept["latents"], kept["timestep"]))
    out = state_uncertainty(operator, num_directions=2, generator=torch.Generator().manual_seed(0))
    print(out)
    pixels = decode_uncertainty(pipe, out, generator=torch.Generator().manual_seed(1))
    save_figure(uncertainty_pictures(pipe, out, pixels), PICTURE)


def main() -> None:
    rows = closed_forms()
    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    draw_preview(pipe)
    save("posterior_uncertainty", {
        "closed_forms": rows, "checkpoint": checkpoint(pipe), "steps": STEPS, "probes": PROBES,
    })  # fmt: skip


if __name__ == "__main__":
    main()
