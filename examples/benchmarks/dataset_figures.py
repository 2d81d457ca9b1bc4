"""The tables of docs/dataset_likelihood.md, for document_figures.py."""

from figure_tables import document, read_result, table


def dataset_sharing() -> str:
    result = read_result("dataset_likelihood")
    rows = []
    for name, row in result["sharing"].items():
        if name != "machine":
            _, single_rate, double_rate = row["images_per_second"].values()
            away = max(row["largest_difference_bits_per_dim"].values())
            rows.append(
                [name, f"{away:.1e}", f"{single_rate:.2f}, {double_rate:.2f}", f"{row['two_processes_over_one']:.2f}"]
            )
    kill, machine = result["killed"], result["sharing"]["machine"]
    columns = [
        "trace by", "largest difference of an image's bits/dim from batches of 1 in 1 process",
        "images per second with 1 and with 2 processes", "ratio",
    ]  # fmt: skip
    return document(
        table(columns, rows),
        f"Embedded checkpoint, {kill['images']} test images, batches of 1 and 16, 1 and 2 processes "
        f"({machine['device']}, one core per process). Two processes were killed with SIGKILL after "
        f"{kill['records_before']} records, and the same command resumed the run: it computed "
        f"{kill['computed_after']} more records, {kill['records_changed']} of the first ones changed, and no "
        f"number differs by more than {kill['largest_difference_from_unbroken_bits_per_dim']:.1e} from that of an "
        "unbroken run.",
    )


def dataset_report() -> str:
    result = read_result("dataset_likelihood")["report"]
    bits, errors = result["bits_per_dim"], result["errors_in_bits_per_dim"]
    rows = [
        [row["caption"], row["images"], f"{row['mean']:.3f}", f"{row['standard_deviation']:.3f}"]
        for row in result["by_caption"]
    ]
    return document(
        f"All {result['images']:,} test images ({result['method']['trace']}, {result['levels']} "
        f"levels): {bits['mean']:.3f} ± {bits['standard_error']:.3f} bits/dim, standard deviation "
        f"{bits['standard_deviation']:.3f}, from {bits['least']:.2f} to {bits['greatest']:.2f}; discretisation error "
        f"{errors['discretisation_mean']:.4f} on average, {errors['discretisation_greatest']:.3f} at most.",
        table(["caption", "images", "mean bits/dim", "standard deviation"], rows),
    )


def out_of_distribution() -> str:
    result = read_result("likelihood_examples")["out_of_distribution"]
    scores = result["auroc"]
    rows = [
        [name, f"{row['mean']:.3f} ({row['standard_deviation']:.3f})",
         *(f"{each[name]['auroc']:.3f} ± {each[name]['standard_error']:.3f}" if name in each else None
           for each in scores.values())]
        for name, row in result["bits_per_dim"].items()
    ]  # fmt: skip
    return document(
        "AUROC of three scores against test images with their own prompts, and bits/dim with their standard deviation "
        f"in brackets; {result['images']} images of every set, {result['steps']} steps, trace by {result['trace']}.",
        table(["", "bits/dim", *scores], rows),
    )


def sample_ranking() -> str:
    result = read_result("likelihood_examples")["sample_ranking"]
    rows = [
        [name.replace("|", "\\|"), f"{row['rank_correlation']:.2f}",
         f"{row['rank_correlation_within_classes']:.2f} ± {row['standard_error_within_classes']:.2f}",
         f"{row['right_of_best_quarter']:.1%}", f"{row['right_of_worst_quarter']:.1%}"]
        for name, row in result["rankings"].items()
    ]  # fmt: skip
    columns = [
        "ranking by", "rank correlation with the classifier's confidence", "rank correlation within classes",
        "classified as prompted, best quarter", "classified as prompted, worst quarter",
    ]  # fmt: skip
    return document(
        f"{result['samples']} samples, {result['num_inference_steps']} steps at guidance scale "
        f"{result['guidance_scale']:g}, {result['right']:.1%} of them classified as prompted.",
        table(columns, rows),
    )


def prompt_matching() -> str:
    result = read_result("prompt_matching")
    rows = [
        [name, f"{row['images']:,}", calls, f"{row['accuracy']:.1%} ± {row['standard_error']:.1%}",
         f"{row['image_classifier']:.1%}"]
        for name, by_calls in result["methods"].items()
        for calls, row in by_calls.items()
    ]  # fmt: skip
    return document(
        f"Accuracy is the fraction of test images whose own prompt, of {result['prompts']}, scores best. The network "
        f"runs in {result['dtype']}; the trace of the ODE is by {result['trace']}.",
        table(["method", "images", "denoiser calls per prompt", "accuracy", "accuracy of the image classifier"], rows),
    )
