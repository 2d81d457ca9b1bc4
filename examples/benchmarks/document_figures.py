"""Writes the tables of README and docs from the benchmarks' JSON files; `--check` only compares.

python examples/benchmarks/document_figures.py
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent


def guidance() -> str:
    result = json.loads((FOLDER / "guidance.json").read_text())
    setting, iteration, memory = result["setting"], result["iteration"], result["memory"]
    machine = result["machine"]
    lines = [
        f"Measured on the embedded checkpoint ({setting['scheduler']}, {setting['steps']} steps, guidance scale "
        f"{setting['guidance_scale']}, batch {setting['batch']}, {machine['device']}, {machine['threads']} threads): "
        "reward before and after "
        f"{setting['iterations']} iterations of normalised ascent, the same noise and step size for all.",
        "",
        "| method | time of an iteration over the floor* | "
        + " | ".join(result["reward_after_ten_iterations"])
        + " |",
        "|---|---|" + "---|" * len(result["reward_after_ten_iterations"]),
    ]
    for method, over in iteration["over_floor"].items():
        cells = []
        for rows in result["reward_after_ten_iterations"].values():
            row = rows[method]
            cells.append(f"{row['before']:.3f} to {row['after']:.3f} ± {row['standard_error']:.3f}")
        lines.append(f"| {method} | {over['median']:.2f} | " + " | ".join(cells) + " |")
    direct, stored = memory["direct"], memory["stored graph"]
    lines += [
        "",
        "\\* sampling, decoding, and the reward's gradient at the latents. Stored graph and per-step recomputation "
        f"give the exact gradient; the faster of them here, {iteration['faster_exact_method']}, takes "
        f"{iteration['exact_over_direct']['median']:.2f} times as long as the default. A run's graph keeps "
        f"{direct['latent_batches_a_step']:.1f} latent batches a step with the default, "
        f"{stored['latent_batches_a_step']:.0f} with a stored graph. `import diffusers_fisher` takes "
        f"{result['import']['ratio']['median']:.2f} times as long as `import diffusers`.",
    ]
    return "\n".join(lines)


def embedded_checkpoint() -> str:
    result = json.loads((FOLDER / "embedded_checkpoint.json").read_text())
    rebuilt = result["reconstruction"]
    lines = [
        f"A Stable Diffusion in small: 32x32 images, 4x8x8 latents, a UNet of {result['unet_parameters'] / 1e6:.1f} M "
        f"parameters, {result['bytes'] / 1e6:.1f} MB in all. Reconstructions of the 10,000 test images reach "
        f"{rebuilt['psnr_of_mean_error_db']:.1f} dB on the central 28x28, and "
        f"{rebuilt['reconstructions_classified_right']:.1%} of them are classified right "
        f"({rebuilt['images_classified_right']:.1%} of the images themselves).",
        "",
        "| guidance scale | samples classified as prompted | spread within a class, relative to real images |",
        "|---|---|---|",
    ]
    for scale, row in result["generation"].items():
        lines.append(f"| {scale} | {row['classified_as_prompted']:.1%} | {row['spread_relative_to_real']:.2f} |")
    count = next(iter(result["generation"].values()))["count"]
    return "\n".join([*lines, "", f"{count} samples each, DDIM, 25 steps."])


def fisher_levels() -> str:
    """Three of the levels, both parts."""
    lines = []
    for part, title in (
        ("mixture", "(a) mixture of 300 Gaussians fitted to 16x16 images"),
        ("checkpoint", "(b) embedded checkpoint"),
    ):
        result = json.loads((FOLDER / "fisher_accuracy.json").read_text())[part]
        ratios = result["noise_to_signal"]
        chosen = [min(range(len(ratios)), key=lambda index: abs(math.log(ratios[index] / at))) for at in (10, 1, 0.1)]
        heads = [f"{ratios[index]:.2g}" for index in chosen]
        lines += [
            "", f"{title}: relative error of the trace, and of a product with a random vector, at noise to signal "
            + ", ".join(heads) + ".", "", "| estimator | " + " | ".join(f"trace, {head}" for head in heads) + " | "
            + " | ".join(f"product, {head}" for head in heads) + " |", "|---|" + "---|" * 6,
        ]  # fmt: skip
        for name, row in result["levels"].items():
            cells = [f"{row[quantity][index]:.2g}" for quantity in ("trace", "matvec") for index in chosen]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines[1:])


def fisher_gradients() -> str:
    result = json.loads((FOLDER / "fisher_accuracy.json").read_text())
    tables = [("(a) mixture, by steps", result["mixture"]["gradients"])]
    tables.append(("(b) embedded checkpoint", result["checkpoint"]["gradients"]))
    lines = []
    for title, table in tables:
        lines += ["", f"{title}: cosine with the exact gradient at the noise, and log10 of the ratio of norms.", ""]
        lines += ["| estimator | " + " | ".join(table) + " |", "|---|" + "---|" * len(table)]
        for name in next(iter(table.values())):
            cells = [_gradient_cell(rows[name]) for rows in table.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    asymmetry = result["checkpoint"]["asymmetry_of_the_networks_jacobian"]
    lines += [
        "",
        f"The network's own Jacobian is not symmetric: |F - F^T|/(2|F|) is {min(asymmetry):.3f} to "
        f"{max(asymmetry):.3f} along a run, which bounds what products with J in place of J^T can reach; the row of "
        "forward-mode products shows that bound.",
    ]
    return "\n".join(lines[1:])


def _gradient_cell(row: dict) -> str:
    return "overflow" if "failed" in row else f"{row['cosine']:.3f} ({row['log10_norm_ratio']:+.1f})"


def fisher_ascents() -> str:
    result = json.loads((FOLDER / "fisher_accuracy.json").read_text())
    part = result["checkpoint"]
    rewards = list(next(iter(next(iter(part["ascents"].values())).values())))
    lines = [
        f"Embedded checkpoint, {part['batch']} prompts, {part['iterations']} iterations of normalised ascent, step "
        f"{part['step_size']} of the noise's norm, {result['machine']['device']}, {result['machine']['threads']} "
        "threads: reward gained, and gained a second in brackets."
    ]
    for reward in rewards:
        settings = list(part["ascents"])
        lines += ["", f"Reward: {reward}.", "", "| estimator | " + " | ".join(settings) + " |"]
        lines.append("|---|" + "---|" * len(settings))
        for name in part["ascents"][settings[0]]:
            rows = [part["ascents"][setting][name][reward] for setting in settings]
            cells = [
                "overflow" if "failed" in row else f"{row['gained']:.3f} ({row['gained_per_second']:.3f})"
                for row in rows
            ]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def transport() -> str:
    result = json.loads((FOLDER / "transport.json").read_text())
    lines = [
        "| data | schedule | asymmetry | off-diagonal index | least eigenvalue | integration error |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["maps"]:
        lines.append(
            f"| {row['case']} | {row['schedule']} | {row['asymmetry']:.2g} ± {row['asymmetry_standard_error']:.1g} | "
            f"{row['off_diagonal_asymmetry']:.3f} ± {row['off_diagonal_asymmetry_standard_error']:.3f} | "
            f"{row['least_eigenvalue']:.2g} | {row['integration_error']:.0e} |"
        )
    lines.append("")
    for row in result["couplings"]:
        lines.append(
            f"- {row['case']}, {row['points']} pairs: mean squared distance {row['pairs']:.6f}, optimal "
            f"{row['optimal']:.6f}, gap {row['gap']:.1e} ± {row['standard_error']:.0e}."
        )
    return "\n".join(lines)


DOCUMENTS = {
    ROOT / "README.md": (guidance, embedded_checkpoint),
    ROOT / "docs" / "estimators.md": (fisher_levels, fisher_gradients, fisher_ascents),
    ROOT / "docs" / "transport.md": (transport,),
}


def filled(text: str, makers: Sequence[Callable[[], str]]) -> str:
    """The document with every block of figures made anew."""
    for make in makers:
        start, end = f"<!-- figures: {make.__name__} -->\n", "<!-- end of figures -->"
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{make()}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    for path, makers in DOCUMENTS.items():
        current = path.read_text(encoding="utf-8")
        new = filled(current, makers)
        if "--check" not in sys.argv[1:]:
            path.write_text(new, encoding="utf-8")
        elif new != current:
            sys.exit(f"{path.name} differs from the benchmarks' JSON; run this script")


if __name__ == "__main__":
    main()
