"""The tables of docs/guidance.md, and the README's of guidance, for document_figures.py."""

import json

from figure_tables import FOLDER, document, read_result, table


def guidance() -> str:
    result = read_result("guidance")
    setting, iteration, memory = result["setting"], result["iteration"], result["memory"]
    machine, rewards = result["machine"], result["reward_after_ten_iterations"]
    rows = [
        [method, f"{over['median']:.2f}", *(_before_and_after(reward[method]) for reward in rewards.values())]
        for method, over in iteration["over_floor"].items()
    ]
    direct, stored_graph = memory["direct"], memory["stored graph"]
    return document(
        f"Measured on the embedded checkpoint ({setting['scheduler']}, {setting['steps']} steps, guidance scale "
        f"{setting['guidance_scale']}, batch {setting['batch']}, {machine['device']}, {machine['threads']} threads): "
        "reward before and after "
        f"{setting['iterations']} iterations of normalised ascent, with the same noise and step size for all methods.",
        table(["method", "time of one iteration over the floor*", *rewards], rows),
        "\\* The floor is sampling, decoding, and the reward's gradient at the latents. Stored graph and per-step "
        f"recomputation give the exact gradient; the faster of them here, {iteration['faster_exact_method']}, takes "
        f"{iteration['exact_over_default']['median']:.2f} times as long as one step, the default. A run's graph keeps "
        f"{direct['latent_batches_a_step']:.1f} latent batches per step without a graph of the denoiser, "
        f"and {stored_graph['latent_batches_a_step']:.0f} with a stored graph. `import diffusers_fisher` takes "
        f"{result['import']['ratio']['median']:.2f} times as long as `import diffusers`.",
    )


def _before_and_after(row: dict) -> str:
    return f"{row['before']:.3f} to {row['after']:.3f} ± {row['standard_error']:.3f}"


def guidance_curves() -> str:
    result = read_result("guidance")
    setting = result["setting"]
    parts = [
        f"Embedded checkpoint, {setting['prompts']} prompts, {setting['steps']} steps of {setting['scheduler']}, "
        f"guidance scale {setting['guidance_scale']}, {setting['iterations']} guidance steps. The tables have the "
        "seconds for all prompts, the mean best reward, and the held-out reward of the same images. The held-out "
        "reward is nearness to real images of the class for 'another class', and the log-probability of the prompted "
        "class for the other rewards."
    ]
    for name, rewards in result["reward_after_ten_iterations"].items():
        first = next(iter(rewards.values()))
        rows = [
            [method, f"{row['seconds']:.0f}", f"{row['after']:.3f} ± {row['standard_error']:.3f}",
             f"{row['held_out_after']:.3f} ± {row['held_out_standard_error']:.3f}"]
            for method, row in rewards.items()
        ]  # fmt: skip
        parts.append(f"{name}, without guidance {first['before']:.3f} (held out {first['held_out_before']:.3f}):")
        parts.append(table(["method", "seconds", "reward", "held out"], rows))
    rows = [
        [name, method, *_share_of_exact(by_method[method])]
        for name, by_method in result["time_to_exact"].items()
        for method in ("one step", "direct")
    ]
    columns = ["reward", "method", "fraction of its time", "held out: mean difference", "held out: median difference"]
    return document(
        *parts,
        f"Two methods at the time when they reach the last reward of {result['iteration']['faster_exact_method']}, "
        "the faster exact method: this time as a fraction of its time, and how far their held-out reward differs from "
        f"its held-out reward ({setting['compared_prompts']} prompts; differences prompt by prompt):",
        table(columns, rows),
    )


def _share_of_exact(row: dict) -> list[str]:
    if row["seconds"] is None:
        return ["not reached", "", ""]
    difference = f"{row['held_out_difference']:+.3f} ± {row['held_out_difference_standard_error']:.3f}"
    return [f"{row['share_of_exact']:.0%}", difference, f"{row['held_out_median_difference']:+.4f}"]


def guidance_per_step() -> str:
    result = read_result("guidance")
    setting = result["setting"]
    parts = [f"One run of {setting['steps']} steps for {setting['prompts']} prompts: reward (held-out reward)."]
    for name, estimators in result["per_step"].items():
        strengths = next(iter(estimators.values()))
        rows = []
        for estimator, cells in estimators.items():
            seconds = sum(cell["seconds"] for cell in cells.values()) / len(cells)
            rewards = [f"{cell['reward']:.3f} ({cell['held_out']:.3f})" for cell in cells.values()]
            rows.append([estimator, f"{seconds:.1f}", *rewards])
        columns = ["estimator", "seconds", *(f"strength {value}" for value in strengths)]
        parts += [f"{name}:", table(columns, rows)]
    return document(*parts)


def guidance_gradients() -> str:
    gradients = read_result("guidance")["gradients"]
    rows = [
        [method, *(f"{each[method]['cosine']:.3f} ({each[method]['norm_ratio']:.2g})" for each in gradients.values())]
        for method in next(iter(gradients.values()))
    ]
    worst = max(each["per-step recomputation"]["relative_error"] for each in gradients.values())
    return document(
        "Cosine with the stored graph's gradient at the noise, and in brackets the ratio of the norms:",
        table(["method", *gradients], rows),
        f"Per-step recomputation is the exact gradient: relative error {worst:.0e}.",
    )


def guidance_sd15_size() -> str:
    parts = []
    for path in sorted(FOLDER.glob("guidance_sd15_size_*.json")):
        result = json.loads(path.read_text())
        setting, methods = result["setting"], result["methods"]
        parameters = next(row["unet_parameters"] for row in methods.values() if "unet_parameters" in row)
        rows = [
            [method, "did not fit", "", ""] if "failed" in row
            else [method, f"{row['seconds']:.1f}", f"{row['over_floor']:.3f}", f"{row['peak_memory'] / 1e9:.1f}"]
            for method, row in methods.items()
        ]  # fmt: skip
        parts += [
            f"Random weights, UNet of {parameters / 1e6:.0f} M, {setting['pixels']}x{setting['pixels']}, "
            f"{setting['steps']} steps, guidance scale {setting['guidance_scale']}, {setting['dtype']}, "
            f"{result['machine']['device']}, {result['machine']['threads']} threads: one guidance iteration.",
            table(["method", "seconds", "over the floor", "peak memory, GB"], rows),
            f"The faster exact method that fits into the memory, {result['faster_exact_method']}, takes "
            f"{result['exact_over_default']:.2f} times as long as one step, the default.",
        ]
    return document(*parts)
