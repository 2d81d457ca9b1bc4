"""Writes the tables of the README from the benchmarks' JSON files; `--check` only compares.

python examples/benchmarks/readme_figures.py
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
README = FOLDER.parent.parent / "README.md"


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


def filled(text: str) -> str:
    """The README with every block of figures made anew."""
    for make in (guidance, embedded_checkpoint):
        start, end = f"<!-- figures: {make.__name__} -->\n", "<!-- end of figures -->"
        before, rest = text.split(start, 1)
        text = f"{before}{start}\n{make()}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    current = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        sys.exit(0 if filled(current) == current else "README.md differs from the benchmarks' JSON; run this script")
    README.write_text(filled(current), encoding="utf-8")


if __name__ == "__main__":
    main()
