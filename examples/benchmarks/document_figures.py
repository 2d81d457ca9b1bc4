"""Writes the tables of README and docs from the benchmarks' JSON files; `--check` only compares.

python examples/benchmarks/document_figures.py
"""

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dataset_figures import dataset_report, dataset_sharing, out_of_distribution, prompt_matching, sample_ranking
from trace_figures import trace_cost, trace_embedded, trace_mixture

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
        f"{iteration['exact_over_default']['median']:.2f} times as long as one step, the default. A run's graph keeps "
        f"{direct['latent_batches_a_step']:.1f} latent batches a step without one of the denoiser, "
        f"{stored['latent_batches_a_step']:.0f} with a stored graph. `import diffusers_fisher` takes "
        f"{result['import']['ratio']['median']:.2f} times as long as `import diffusers`.",
    ]
    return "\n".join(lines)


def guidance_curves() -> str:
    result = json.loads((FOLDER / "guidance.json").read_text())
    setting, table = result["setting"], result["reward_after_ten_iterations"]
    lines = [
        f"Embedded checkpoint, {setting['prompts']} prompts, {setting['steps']} steps of {setting['scheduler']}, "
        f"guidance scale {setting['guidance_scale']}, {setting['iterations']} guidance steps: seconds in all, the "
        "mean best reward, and the held-out reward at it (another class: nearness to real images of it; the others: "
        "the prompted class's log-probability)."
    ]
    for name, rows in table.items():
        first = next(iter(rows.values()))
        lines += [
            "", f"{name}, from {first['before']:.3f} ({first['held_out_before']:.3f}):", "",
            "| method | seconds | reward | held out |", "|---|---|---|---|",
        ]  # fmt: skip
        for method, row in rows.items():
            lines.append(
                f"| {method} | {row['seconds']:.0f} | {row['after']:.3f} ± {row['standard_error']:.3f} | "
                f"{row['held_out_after']:.3f} ± {row['held_out_standard_error']:.3f} |"
            )
    exact = result["iteration"]["faster_exact_method"]
    lines += [
        "", f"Where {exact}'s last reward is reached, the faster exact method's "
        f"({setting['compared_prompts']} prompts; differences of the held-out reward prompt by prompt):", "",
        "| reward | method | share of its time | held out: mean difference | median difference |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, rows in result["time_to_exact"].items():
        for method in ("one step", "direct"):
            row = rows[method]
            if row["seconds"] is None:
                lines.append(f"| {name} | {method} | not reached | | |")
                continue
            lines.append(
                f"| {name} | {method} | {row['share_of_exact']:.0%} | {row['held_out_difference']:+.3f} ± "
                f"{row['held_out_difference_standard_error']:.3f} | {row['held_out_median_difference']:+.4f} |"
            )
    return "\n".join(lines)


def guidance_per_step() -> str:
    result = json.loads((FOLDER / "guidance.json").read_text())
    setting = result["setting"]
    lines = [f"One run of {setting['steps']} steps for {setting['prompts']} prompts: reward (held out)."]
    for name, rows in result["per_step"].items():
        strengths = list(next(iter(rows.values())))
        lines += [
            "", f"{name}:", "",
            "| estimator | seconds | " + " | ".join(f"strength {value}" for value in strengths) + " |",
            "|---|---|" + "---|" * len(strengths),
        ]  # fmt: skip
        for estimator, cells in rows.items():
            seconds = sum(cell["seconds"] for cell in cells.values()) / len(cells)
            shown = [f"{cell['reward']:.3f} ({cell['held_out']:.3f})" for cell in cells.values()]
            lines.append(f"| {estimator} | {seconds:.1f} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def guidance_gradients() -> str:
    table = json.loads((FOLDER / "guidance.json").read_text())["gradients"]
    lines = [
        "Cosine with the stored graph's gradient at the noise, and the ratio of norms:", "",
        "| method | " + " | ".join(table) + " |", "|---|" + "---|" * len(table),
    ]  # fmt: skip
    for method in next(iter(table.values())):
        cells = [f"{rows[method]['cosine']:.3f} ({rows[method]['norm_ratio']:.2g})" for rows in table.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    worst = max(rows["per-step recomputation"]["relative_error"] for rows in table.values())
    return "\n".join([*lines, "", f"Per-step recomputation is the exact gradient: relative error {worst:.0e}."])


def guidance_sd15_size() -> str:
    lines = []
    for path in sorted(FOLDER.glob("guidance_sd15_size_*.json")):
        result = json.loads(path.read_text())
        setting, rows = result["setting"], result["methods"]
        parameters = next(row["unet_parameters"] for row in rows.values() if "unet_parameters" in row)
        lines += [
            "", f"Random weights, UNet of {parameters / 1e6:.0f} M, {setting['pixels']}x{setting['pixels']}, "
            f"{setting['steps']} steps, guidance scale {setting['guidance_scale']}, {setting['dtype']}, "
            f"{result['machine']['device']}, {result['machine']['threads']} threads: one guidance iteration.", "",
            "| method | seconds | over the floor | peak memory, GB |", "|---|---|---|---|",
        ]  # fmt: skip
        for method, row in rows.items():
            if "failed" in row:
                lines.append(f"| {method} | did not fit | | |")
            else:
                cells = f"{row['seconds']:.1f} | {row['over_floor']:.3f} | {row['peak_memory'] / 1e9:.1f}"
                lines.append(f"| {method} | {cells} |")
        lines += ["", f"The faster exact method that fits, {result['faster_exact_method']}, takes "
                  f"{result['exact_over_default']:.2f} times as long as one step, the default."]  # fmt: skip
    return "\n".join(lines[1:])


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
    machine = result["machine"]
    lines.append(
        f"- All of this: {result['seconds']:.0f} s on {machine['threads']} thread(s) of {machine['processor']}."
    )
    return "\n".join(lines)


def transport_learned() -> str:
    found = json.loads((FOLDER / "transport.json").read_text())["learned"]
    own, levels = found["fisher_asymmetry_by_level"], found["noise_to_signal"]
    lines = [
        f"{found['samples']} samples, noise to signal {levels[0]:.3g} to {levels[-1]:.2g}, {found['steps']} steps of "
        f"a Runge-Kutta rule of order {found['order']}.",
        "",
        "| | asymmetry | off-diagonal index | least eigenvalue | integration error |",
        "|---|---|---|---|---|",
    ]
    for title, key, error in (
        ("the checkpoint's map", "map", "integration_error"),
        ("the same with every Jacobian symmetrised", "map_of_symmetrised_jacobians", "integration_error_symmetrised"),
    ):
        row = found[key]
        lines.append(
            f"| {title} | {row['asymmetry']:.4f} ± {row['asymmetry_standard_error']:.4f} | "
            f"{row['off_diagonal_asymmetry']:.3f} ± {row['off_diagonal_asymmetry_standard_error']:.3f} | "
            f"{row['least_eigenvalue']:.2g} | {found[error]:.0e} |"
        )
    chosen = [min(range(len(own)), key=lambda index: abs(math.log(levels[index] / at))) for at in (10, 1, 0.1)]
    values = ", ".join(f"{own[index]:.4f} at {levels[index]:.2g}" for index in chosen)
    return "\n".join([*lines, "", f"Asymmetry of the network's own Fisher by noise to signal: {values}."])


def lml_cells() -> str:
    result = json.loads((FOLDER / "lml.json").read_text())
    floors, cells = result["floors"], result["cells"]
    chosen = ", ".join(
        f"{name} lambda {row['lml_lambda']:g}, kappa {row['lml_kappa']:g}" for name, row in result["chosen"].items()
    )
    lines = [
        f"{cells[0]['count']:,} samples a cell, equally many of each class. Chosen: {chosen}. For scale: two halves "
        f"of the real images are {floors['real_halves']:.3f} apart (standard deviation over splits "
        f"{floors['real_halves_standard_deviation']:.3f}), and {floors['reconstructed_half']:.3f} when one half has "
        "been through the autoencoder.",
    ]
    settings = sorted({(row["guidance_scale"], row["seed"]) for row in cells})
    for scale, seed in settings:
        rows = [row for row in cells if (row["guidance_scale"], row["seed"]) == (scale, seed)]
        calls = sorted({row["calls"] for row in rows})
        lines += [
            "",
            f"Guidance scale {scale:g}, noise of seed {seed}: Frechet distance, and accuracy in brackets.",
            "",
        ]
        lines += [
            "| sampler | " + " | ".join(f"{count} calls" for count in calls) + " |",
            "|---|" + "---|" * len(calls),
        ]
        for name in dict.fromkeys(row["sampler"] for row in rows):
            own = {row["calls"]: row for row in rows if row["sampler"] == name}
            lines.append(f"| {name} | " + " | ".join(_lml_cell(own.get(count)) for count in calls) + " |")
    lines += ["", "Distance minus that of the parent from the same noise:", ""]
    for row in result["differences"]:
        lines.append(
            f"- {row['sampler']}, {row['calls']} calls, guidance scale {row['guidance_scale']:g}, seed {row['seed']}: "
            f"{row['difference']:+.4f} ± {row['standard_error']:.4f}"
        )
    return "\n".join(lines)


def _lml_cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['frechet_distance']:.3f} ± {row['frechet_standard_error']:.3f} ({row['accuracy']:.1%})"


def lml_sweep() -> str:
    sweep = json.loads((FOLDER / "lml.json").read_text())["sweep"]
    names = ("DDIM", "DPM-Solver++")
    found = {(row["sampler"], row["lml_lambda"], row["lml_kappa"]): row for row in sweep}
    lines = [
        f"{sweep[0]['calls']} calls, {sweep[0]['count']:,} samples, other noise: Frechet distance, and accuracy in "
        "brackets.",
        "",
        "| kappa/lambda | lambda | kappa | " + " | ".join(f"LML-{name}" for name in names) + " |",
        "|---|---|---|" + "---|" * len(names),
    ]
    lines.append("| 0 | | | " + " | ".join(_lml_cell(found[name, None, None]) for name in names) + " |")
    options = sorted({key[1:] for key in found if key[1] is not None}, key=lambda pair: pair[1] / pair[0])
    for damping, kappa in options:
        cells = [_lml_cell(found[f"LML-{name}", damping, kappa]) for name in names]
        lines.append(f"| {kappa / damping:g} | {damping:g} | {kappa:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def likelihood_closed_forms() -> str:
    result = json.loads((FOLDER / "likelihood.json").read_text())["closed_forms"]
    rows = result["summary"]
    calls = sorted({row["calls"] for row in rows})
    lines = [f"{len(result['laws'])} laws, {result['draws']} draws of each; bits/dim, mean (worst) by denoiser calls."]
    for schedule in dict.fromkeys(row["schedule"] for row in rows):
        lines += ["", f"Noise levels of {schedule}:", "", "| scheme | " + " | ".join(map(str, calls)) + " |"]
        lines.append("|---|" + "---|" * len(calls))
        for scheme in dict.fromkeys(row["scheme"] for row in rows):
            found = [row for row in rows if (row["schedule"], row["scheme"]) == (schedule, scheme)]
            cells = [f"{row['mean']:.4f} ({row['worst']:.4f})" for row in sorted(found, key=lambda row: row["calls"])]
            lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
        lines += ["", "Error estimate: share of samples it covers, and its median over the median error.", ""]
        lines += ["| scheme | " + " | ".join(map(str, calls)) + " |", "|---|" + "---|" * len(calls)]
        for scheme in dict.fromkeys(row["scheme"] for row in rows if "covered" in row):
            found = [row for row in rows if (row["schedule"], row["scheme"]) == (schedule, scheme)]
            cells = [
                f"{row['covered']:.1%}, {row['median_estimate_over_median_error']:.1f}"
                for row in sorted(found, key=lambda row: row["calls"])
            ]
            lines.append(f"| {scheme} | " + " | ".join(cells) + " |")
    floors = {row["law"]: row["prior_floor"] for row in result["by_law"] if row["schedule"] == rows[0]["schedule"]}
    lines += ["", f"What the prior leaves at the noise levels of {rows[0]['schedule']}, in every figure above:", ""]
    lines += ["| law | prior |", "|---|---|", *(f"| {law} | {floor:.5f} |" for law, floor in floors.items())]
    return "\n".join(lines)


def likelihood_other_laws() -> str:
    result = json.loads((FOLDER / "likelihood.json").read_text())["other_laws"]
    rows = [row for row in result["by_law"] if row["scheme"] != "practice"]
    schedules, calls = (list(dict.fromkeys(row[key] for row in rows)) for key in ("schedule", "calls"))
    calls = [each for each in calls if each in (20, 41, 100)]
    lines = [
        f"{len(result['laws'])} laws, {result['draws']} draws of each, {rows[0]['scheme']}; bits/dim, mean (worst), "
        "and the share of draws whose error by the steps is covered.", "",
        "| law | " + " | ".join(f"{schedule}, {each}" for schedule in schedules for each in calls) + " | prior |",
        "|---|" + "---|" * (len(schedules) * len(calls) + 1),
    ]  # fmt: skip
    found = {(row["law"], row["schedule"], row["calls"]): row for row in rows}
    for law in result["laws"]:
        chosen = [found[law, schedule, each] for schedule in schedules for each in calls]
        cells = [f"{row['mean']:.4f} ({row['worst']:.4f}), {row['covered']:.0%}" for row in chosen]
        lines.append(f"| {law} | " + " | ".join(cells) + f" | {chosen[0]['prior_floor']:.4f} |")
    return "\n".join(lines)


def likelihood_checkpoint() -> str:
    found = json.loads((FOLDER / "likelihood.json").read_text())
    result, reference, more = found["checkpoint"], found["reference"], found["trace_model"]
    lines = [
        f"{result['images']} test images. The reference took up to {reference['calls']} calls with 256 products "
        f"each, and is off by up to {reference['error']:.4f} bits/dim by its tolerance.", "",
        "| what | calls | mean error | worst | estimated error by the steps | standard error of the probes |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        probes = "" if row["standard_error"] is None else f"{row['standard_error']:.4f}"
        lines.append(
            f"| {row['what']} | {row['calls']} | {row['mean']:.4f} | {row['worst']:.4f} | {row['estimate']:.4f} | "
            f"{probes} |"
        )
    difference = result["bfloat16_less_float32"]
    deviation = statistics.pstdev(more["errors"])
    beyond = 2 * statistics.NormalDist(0, deviation).cdf(-0.05)
    lines += [
        "", f"A network in bfloat16 changes the likelihood by {difference:.4f} bits/dim on average. Of "
        f"{more['images']} test images DF-TM is within 0.05 bits/dim of the whole Jacobian at the same "
        f"{more['calls']} calls for {more['within_0.05']}: {more['mean']:.4f} on average, "
        f"{more['worst']:.4f} at most. With a standard deviation of {deviation:.4f}, about {beyond:.1%} of more "
        "images may be beyond 0.05.",
    ]  # fmt: skip
    return "\n".join(lines)


def likelihood_comparison() -> str:
    result = json.loads((FOLDER / "likelihood.json").read_text())["comparison"]
    ode = result["squared_error_against_ode"]
    return (
        f"Embedded checkpoint, {result['images']} test images under the prompts of all {result['prompts']} classes, "
        f"{result['levels']} levels: the image's own class is likeliest for {result['own_prompt_is_likeliest']:.0%}. "
        f"Differences between prompts have a standard error of {result['standard_error_nats']:.2f} nats; without "
        f"shared draws it would be {result['standard_error_nats_without_shared_draws']:.1f}. By squared errors noised "
        f"latents have {ode['squared_error_minus_ode_bits']:+.3f} ± {ode['standard_error_bits']:.3f} bits/dim more "
        "than by the ODE."
    )


DOCUMENTS = {
    ROOT / "README.md": (guidance, embedded_checkpoint),
    ROOT / "docs" / "guidance.md": (guidance_curves, guidance_per_step, guidance_gradients, guidance_sd15_size),
    ROOT / "docs" / "estimators.md": (fisher_levels, fisher_gradients, fisher_ascents),
    ROOT / "docs" / "transport.md": (transport, transport_learned),
    ROOT / "docs" / "lml.md": (lml_cells, lml_sweep),
    ROOT / "docs" / "likelihood.md": (
        likelihood_closed_forms,
        likelihood_other_laws,
        likelihood_checkpoint,
        likelihood_comparison,
    ),
    ROOT / "docs" / "dataset_likelihood.md": (
        dataset_report,
        dataset_sharing,
        out_of_distribution,
        sample_ranking,
        prompt_matching,
    ),
    ROOT / "docs" / "training.md": (trace_mixture, trace_embedded, trace_cost),
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
