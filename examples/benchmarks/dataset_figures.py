"""The tables of docs/dataset_likelihood.md, for document_figures.py."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def dataset_sharing() -> str:
    result = json.loads((FOLDER / "dataset_likelihood.json").read_text())
    lines = [
        "| trace by | largest difference of an image's bits/dim from batches of 1 in 1 process | images a second, 1 "
        "and 2 processes | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in result["sharing"].items():
        if name != "machine":
            _, one, two = row["images_per_second"].values()
            away = max(row["largest_difference_bits_per_dim"].values())
            lines.append(f"| {name} | {away:.1e} | {one:.2f}, {two:.2f} | {row['two_processes_over_one']:.2f} |")
    killed, machine = result["killed"], result["sharing"]["machine"]
    lines += [
        "",
        f"Embedded checkpoint, {killed['images']} test images, batches of 1 and 16, 1 and 2 processes "
        f"({machine['device']}, one core a process). Two processes, killed with SIGKILL after "
        f"{killed['records_before']} records and taken up: {killed['computed_after']} more were computed, "
        f"{killed['records_changed']} of the first changed, and no number is further than "
        f"{killed['largest_difference_from_unbroken_bits_per_dim']:.1e} from an unbroken run's.",
    ]
    return "\n".join(lines)


def dataset_report() -> str:
    result = json.loads((FOLDER / "dataset_likelihood.json").read_text())["report"]
    bits, errors = result["bits_per_dim"], result["errors_in_bits_per_dim"]
    lines = [
        f"All {result['images']:,} test images ({result['method']['trace']}, {result['evaluations_an_image']} "
        f"evaluations an image): {bits['mean']:.3f} ± {bits['standard_error']:.3f} bits/dim, standard deviation "
        f"{bits['standard_deviation']:.3f}, from {bits['least']:.2f} to {bits['greatest']:.2f}; error by the steps "
        f"{errors['discretisation_mean']:.4f} on average, {errors['discretisation_greatest']:.3f} at most.",
        "",
        "| caption | images | mean bits/dim | standard deviation |",
        "|---|---|---|---|",
    ]
    for row in result["by_caption"]:
        lines.append(f"| {row['caption']} | {row['images']} | {row['mean']:.3f} | {row['standard_deviation']:.3f} |")
    return "\n".join(lines)


def out_of_distribution() -> str:
    result = json.loads((FOLDER / "likelihood_examples.json").read_text())["out_of_distribution"]
    scores = list(result["auroc"])
    lines = [
        f"{result['images']} images of every set, {result['steps']} steps, trace by {result['trace']}: AUROC against "
        "test images with their own prompts.",
        "",
        "| | bits/dim | " + " | ".join(scores) + " |",
        "|---|---|" + "---|" * len(scores),
    ]
    for name, row in result["bits_per_dim"].items():
        cells = [result["auroc"][score].get(name) for score in scores]
        told = ["" if cell is None else f"{cell['auroc']:.3f} ± {cell['standard_error']:.3f}" for cell in cells]
        lines.append(f"| {name} | {row['mean']:.3f} ({row['standard_deviation']:.3f}) | " + " | ".join(told) + " |")
    return "\n".join(lines)


def sample_ranking() -> str:
    result = json.loads((FOLDER / "likelihood_examples.json").read_text())["sample_ranking"]
    lines = [
        f"{result['samples']} samples, {result['num_inference_steps']} steps at guidance scale "
        f"{result['guidance_scale']:g}, {result['right']:.1%} of them classified as prompted.",
        "",
        "| ranking by | rank correlation with the classifier's confidence | within classes | right of the best "
        "quarter | of the worst |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["rankings"].items():
        own = f"{row['rank_correlation_within_classes']:.2f} ± {row['standard_error_within_classes']:.2f}"
        lines.append(
            f"| {name.replace('|', chr(92) + '|')} | {row['rank_correlation']:.2f} | {own} | "
            f"{row['right_of_best_quarter']:.1%} | {row['right_of_worst_quarter']:.1%} |"
        )
    return "\n".join(lines)


def prompt_matching() -> str:
    result = json.loads((FOLDER / "prompt_matching.json").read_text())
    lines = [
        f"Share of test images whose own prompt, of {result['prompts']}, scores best; network in {result['dtype']}, "
        f"the trace of the ODE by {result['trace']}.",
        "",
        "| method | images | denoiser calls a prompt | right | image classifier, trained for it |",
        "|---|---|---|---|---|",
    ]
    for name, by_calls in result["methods"].items():
        for calls, row in by_calls.items():
            lines.append(
                f"| {name} | {row['images']:,} | {calls} | {row['accuracy']:.1%} ± {row['standard_error']:.1%} | "
                f"{row['image_classifier']:.1%} |"
            )
    return "\n".join(lines)
