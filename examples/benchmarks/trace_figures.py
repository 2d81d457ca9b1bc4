"""The tables of docs/training.md, from the benchmarks' JSON files; see document_figures.py."""

import json
import math
from pathlib import Path

FOLDER = Path(__file__).parent


def trace_mixture() -> str:
    result = json.loads((FOLDER / "trace_matching_mixture.json").read_text())
    lines = []
    for kind, title in (
        ("one variance", f"One variance for all modes ({result['fitted_variance']:.3f}, fitted to the images)."),
        ("variance a class", "The harder case: a variance for each of the ten classes, 0.01 to 0.1."),
    ):
        rows = [row for row in result["rows"] if row["mixture"] == kind]
        lines += [
            "", f"{title} Mean relative error of tr F by timestep (of 1000, Stable Diffusion's schedule):", "",
            "| recipe | seconds* | " + " | ".join(map(str, result["timesteps"])) + " |",
            "|---|---|" + "---|" * len(result["timesteps"]),
        ]  # fmt: skip
        for row in rows:
            cells = " | ".join(f"{value:.2g}" for value in row["relative_error"])
            lines.append(f"| {row['recipe']} | {row['processor_seconds']:.0f} | {cells} |")
    lines += [
        "",
        f"\\* of processor time, one thread: {result['steps']} steps of {result['denoiser_calls_a_step']} denoiser "
        f"evaluations, {result['parameters']:,} parameters, the same for every recipe; "
        f"{result['evaluation_samples']} fresh samples at every timestep.",
    ]
    return "\n".join(lines[1:])


def trace_embedded() -> str:
    result = json.loads((FOLDER / "trace_embedded.json").read_text())
    errors, jacobians = result["squared_errors"], result["full_jacobians"]
    lines = [
        f"Mean absolute difference of r, the means of test images, over {result['levels']} noise levels equal in "
        f"log(sigma/alpha): from squared errors ({errors['images']} images) and from full Jacobians "
        f"({jacobians['images']} images).",
        "",
        "| target | parameters | from squared errors | from full Jacobians |",
        "|---|---|---|---|",
    ]
    for name, training in result["training"].items():
        away = [part["mean_absolute_difference"][name] for part in (errors, jacobians)]
        lines.append(f"| {name} | {training['parameters']:,} | " + " | ".join(f"{value:.4f}" for value in away) + " |")
    norm, least = result["norm_estimate"], errors["mean"]["squared error"]
    off, clipped = (
        sum(abs(min(estimate, most) - truth) for estimate, truth in zip(norm["mean"], least, strict=True)) / len(least)
        for most in (math.inf, 1.0)
    )
    lines += [
        "", "What target norm estimates, by the same images with mirrored noise: at the three smallest noise levels "
        + ", ".join(f"{m:.2f} +- {e:.2f}" for m, e in zip(norm["mean"][:3], norm["standard_error"][:3], strict=True))
        + ", where squared errors give " + ", ".join(f"{value:.2f}" for value in least[:3]) + ". The denoiser's own "
        "error in |x_0|^2 is divided by s^2 there, so no model of that target can be right: over all levels its mean "
        f"is off by {off:.3f}, and by {clipped:.4f} where values above 1 are taken for 1.",
    ]  # fmt: skip
    own = result["squared_errors_of_images"]
    lines += [
        "", f"Single images ({own['images']}): the integral of r over log(sigma/alpha) against that of the image's "
        f"own squared errors, means over the same {own['draws']} draws of the noise, in bits/dim (a model sees the "
        "noised image alone, so that even a perfect one's correlation is below 1):", "",
        "| target | correlation over images | mean difference | mean absolute |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, row in own["bits_per_dim"].items():
        lines.append(
            f"| {name} | {row['correlation']:.3f} | {row['mean_difference']:+.4f} | "
            f"{row['mean_absolute_difference']:.4f} |"
        )
    rows, gap = result["likelihoods"], result["residual_less_jacobian_bits_per_dim"]
    lines += [
        "", f"At noised images the residual model adds {gap:+.3f} bits/dim to what the jacobian model gives.",
        "", f"Integrated trace of a likelihood ({rows['images']} test images, {rows['steps']} steps), against the "
        "full Jacobian on the same path, in bits/dim:", "",
        "| trace by | correlation over images | mean difference | mean absolute | largest |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in rows["bits_per_dim"].items():
        lines.append(
            f"| {name} | {row['correlation']:.3f} | {row['mean_difference']:+.4f} | "
            f"{row['mean_absolute_difference']:.4f} | {row['largest_difference']:.4f} |"
        )
    ratios = result["times"]["ratio"]
    lines += [
        "",
        f"Time of a likelihood over that by the trace model ({result['times']['images']} images, {result['threads']} "
        + f"threads): {ratios['1 probe']['median']:.2f} with 1 probe, {ratios['16 probes']['median']:.1f} with 16.",
    ]
    return "\n".join(lines)


def trace_cost() -> str:
    result = json.loads((FOLDER / "trace_cost.json").read_text())
    calls, inversion = result["trace_model_over_denoiser"], result["trace_model_over_inversion"]
    probe, memory = result["probe_over_trace_model"], result["memory_over_inversion"]
    return "\n".join(
        [
            f"Stable Diffusion 1.5's shapes with random weights ({result['denoiser_parameters'] / 1e6:.0f} M "
            f"parameters, latents {result['shape']}, {result['machine']['device']}, {result['threads']} threads), a "
            f"trace model of {result['trace_parameters'] / 1e6:.1f} M parameters; medians of paired runs, smallest to "
            "largest in brackets.",
            "",
            "| | ratio |",
            "|---|---|",
            f"| trace model's call over the denoiser's | {_ratio(calls)} |",
            f"| likelihood by the trace model over plain inversion | {_ratio(inversion)} |",
            f"| likelihood by one Hutchinson probe over that by the trace model | {_ratio(probe)} |",
            f"| peak memory over inversion's: trace model | {memory['trace model']:.3f} |",
            f"| peak memory over inversion's: one probe | {memory['1 probe']:.3f} |",
        ]
    )


def _ratio(row: dict) -> str:
    return f"{row['median']:.3f} ({row['min']:.3f} to {row['max']:.3f})"
