"""The tables of docs/curvature.md, for document_figures.py."""

from typing import Any

from figure_tables import document, read_result, table


def likelihood_bound_fractions() -> str:
    result = read_result("likelihood_bound")
    steps = sorted({row["steps"] for row in result["rows"]})
    cells = {(row["fraction"], row["steps"]): row for row in result["rows"]}
    names = list(dict.fromkeys(row["fraction"] for row in result["rows"]))
    rows = [
        [
            name,
            *(
                f"{cells[name, number]['above_ode']:.3f} ({cells[name, number]['above_trace_model']:+.3f} +- "
                f"{cells[name, number]['above_trace_model_standard_error']:.3f})"
                for number in steps
            ),
        ]
        for name in names
    ]
    error = {number: cells[names[0], number]["standard_error_per_image"] for number in steps}
    scatter, whole, cost = (result[name] for name in ("scatter_in_bits_per_dim", "whole_jacobian", "cost"))
    return document(
        f"Mean bound of {result['images_bounded']} images above the ODE's value ({result['ode_bits_per_dim']:.3f} "
        f"bits/dim) by the number of steps, {result['draws']} draws per step; in parentheses the paired difference "
        "from the bound with the trace model, and its standard error over images. The tables are those of "
        f"{result['images_fitted']} other images.",
        table(["unexplained noise fraction", *(f"{number} steps" for number in steps)], rows),
        "Standard error per image: "
        + ", ".join(f"{error[number]:.3f} at {number} steps" for number in steps)
        + f". The bound of one image by {result['draws']} draws of each of 20 steps scatters by "
        f"{scatter['pairs_in_strata']:.3f} bits/dim with pairs in strata, and by {scatter['independent_draws']:.3f} "
        f"with independent draws; the standard error stated is {scatter['stated_standard_error']:.3f}.",
        f"With whole Jacobians, {whole['images']} images, {whole['steps']} steps and {whole['draws']} draws: the ODE "
        f"gives {whole['ode']:.3f} bits/dim (within {whole['ode_total_error']:.3f}), the bound is "
        f"{whole['bound']:.3f} +- {whole['bound_standard_error']:.3f}, and {whole['bound_by_trace_model']:.3f} with "
        f"the trace model and the same draws. A bound of {cost['bound_calls']} calls takes "
        f"{cost['ratio']['median']:.1f} times as long as the ODE of {cost['ode_calls']} calls.",
    )


def intrinsic_dimension_manifolds() -> str:
    rows = [
        [row["law"], row["schedule"], f"{row['exact_mean']:.2f}", f"{row['exact_worst_relative_error']:.1%}",
         f"{row['probe_mean']:.1f} +- {row['probe_standard_error']:.1f}", f"{row['within_3_standard_errors']:.0%}",
         f"{row['root_mean_square_of_errors_over_stated']:.2f}"]
        for row in read_result("intrinsic_dimension")["closed_forms"]
    ]  # fmt: skip
    columns = [
        "law in 256 dimensions", "schedule", "mean dimension, exact trace", "worst relative error",
        "mean dimension, one direction per level, and its standard error per point", "within 3 standard errors",
        "root mean square of error / stated error",
    ]  # fmt: skip
    return table(columns, rows)


def intrinsic_dimension_images() -> str:
    result = read_result("intrinsic_dimension")["complexity"]
    names = (
        "png_bytes", "png_bytes_within_classes", "encoder", "excess_with_png_bytes",
        "excess_with_png_bytes_within_classes",
    )  # fmt: skip
    rows = [
        [f"{row['noise_to_signal']:g}", f"{row['dimension']:.1f} ({row['deviation_over_images']:.1f})",
         f"{row['encoder_dimension']:.1f}",
         *(f"{row[name]['correlation']:+.2f} +- {row[name]['standard_error']:.2f}" for name in names)]
        for row in result["levels"]
    ]  # fmt: skip
    columns = [
        "noise to signal", "dimension (deviation over images)", "dimension of the encoder's posterior",
        "dimension with PNG size", "the same within classes", "dimension with the encoder's", "excess with PNG size",
        "the same within classes",
    ]  # fmt: skip
    plateau, model = result["plateau"], result["trace_model"]
    errors = [
        f"{error:.1f} ({stated:.1f})"
        for error, stated in zip(model["root_mean_square_error"], model["stated"], strict=True)
    ]
    return document(
        f"{result['images']} test images with their own prompts, trace by the trace model, {result['dims']} "
        "dimensions; Spearman's rank correlations with standard errors by resampling. The excess is the dimension "
        "without that of the encoder's posterior.",
        table(columns, rows),
        f"With the default levels {plateau['found']} of {plateau['images']} images have a plateau, which ends at a "
        f"noise to signal of {plateau['highest_noise_to_signal']:.2f} or below, with a mean dimension of "
        f"{plateau['dimension']:.0f}. Error of the trace model by level on {model['images']} images, in dimensions "
        f"(and the stated one), from differences by 8 directions: {', '.join(errors)}.",
    )


def intrinsic_dimension_classes() -> str:
    result = read_result("intrinsic_dimension")["complexity"]
    by_class = sorted(result["by_class"].items(), key=lambda item: item[1]["excess"])
    rows = [
        [name, f"{row['excess']:.1f} +- {row['standard_error']:.1f}", f"{row['dimension']:.1f}",
         f"{row['png_bytes']:.0f}"]
        for name, row in by_class
    ]  # fmt: skip
    return document(
        f"Means by class at a noise to signal of {result['class_noise_to_signal']:g}:",
        table(["class", "excess", "dimension", "bytes of the PNG file"], rows),
    )


def intrinsic_dimension_others() -> str:
    result = read_result("intrinsic_dimension")["other_images"]
    rows = [
        [name, f"{result['means'][name]['bits_per_dim']:.2f}", f"{result['means'][name]['dimension']:.0f}",
         *(f"{cells[name]['auroc']:.3f} +- {cells[name]['standard_error']:.3f}" if name in cells else None
           for cells in result["auroc"].values())]
        for name in result["means"]
    ]  # fmt: skip
    return document(
        f"AUROC of finding other kinds of images among test images; {result['images']} images of each set, the "
        f"dimension at a noise to signal of {result['noise_to_signal']:g}, the likelihood by {result['steps']} steps. "
        "Distances are in standard deviations of the training images, for both numbers together by their covariance.",
        table(["images", "bits/dim", "dimension", *result["auroc"]], rows),
    )


def posterior_uncertainty_closed_forms() -> str:
    rows = [
        [row["law"], f"{row['noise_to_signal']:g}", *(f"{share:.1%}" for share in row["covered"].values()),
         *(f"{share:.1%}" for share in row["along_directions"].values()), f"{row['error_of_the_probes']:.1%}"]
        for row in read_result("posterior_uncertainty")["closed_forms"]
    ]  # fmt: skip
    columns = [
        "law", "noise to signal", "elements in their 68% interval", "in their 95% interval",
        "directions in their 68% interval", "in their 95% interval", "error of the variances by the probes",
    ]  # fmt: skip
    return table(columns, rows)


def posterior_uncertainty_checkpoint() -> str:
    result = read_result("posterior_uncertainty")
    first = result["checkpoint"][0]
    rows = [
        [f"{row['noise_to_signal']:g}", f"{row['stated_deviation']:.3f}", f"{row['sampled_over_stated']:.2f}",
         f"{row['rank_correlation']:.2f}", *(f"{share:.1%}" for share in row["covered"].values()),
         ", ".join(f"{ratio:.2f}" for ratio in row["along_directions"]),
         ", ".join(f"{share:.0%}" for share in row["share_of_directions"]),
         f"{row['pixels']['sampled_over_stated']:.2f}", f"{row['pixels']['rank_correlation']:.2f}"]
        for row in result["checkpoint"]
    ]  # fmt: skip
    columns = [
        "noise to signal", "stated deviation per latent", "sampled / stated", "rank correlation over latents",
        "samples in the 68% interval", "in the 95% interval", "sampled / stated along the directions",
        "share of the directions", "pixels: sampled / stated", "rank correlation over pixels",
    ]  # fmt: skip
    return document(
        f"{first['images']} noised test images, {first['draws']} samples of each posterior by {result['steps']} "
        f"steps; stated deviations by {result['probes']} random directions. Where deviations are divided they are "
        "root mean squares.",
        table(columns, rows),
    )


def memorisation_auroc() -> str:
    result = read_result("memorisation")
    config = result["config"]
    cells = {(row["level"], row["score"], row["draws"], row["kinds"]): row for row in result["auroc"]}
    numbers = sorted({key[2] for key in cells})
    rows = [
        [f"{score}, {level}",
         *(f"{row['auroc']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}] ({row['evaluations']})"
           for row in (cells[level, score, number, "whole+half"] for number in numbers)),
         *(f"{cells[level, score, numbers[-1], kind]['auroc']:.3f}" for kind in ("whole", "half"))]
        for level, score in dict.fromkeys(key[:2] for key in cells)
    ]  # fmt: skip
    columns = [
        "score, noise to signal", *(f"{number} draw{'s' * (number > 1)} (evaluations)" for number in numbers),
        f"whole images, {numbers[-1]} draws", f"halves, {numbers[-1]} draws",
    ]  # fmt: skip
    return document(
        f"AUROC of memorised prompts ({config['whole_prompts']} whole images, {config['half_prompts']} halves) "
        f"against {config['many_prompts']} others that were trained on as often, each with many images; mean of "
        f"{len(result['seeds'])} seeds of the fine-tuning, with 95% intervals by resampling prompts.",
        table(columns, rows),
    )


def memorisation_maps() -> str:
    result = read_result("memorisation")

    def cell(entry: dict[str, Any]) -> str:
        return f"{entry['mean']:.3f} [{entry['interval'][0]:.3f}, {entry['interval'][1]:.3f}]"

    overlaps = table(
        ["noise to signal", *next(iter(result["overlap"].values()))],
        [[level, *map(cell, scores.values())] for level, scores in result["overlap"].items()],
    )
    distances = result["distance_to_first_image"]
    kinds = list(next(iter(distances.values())))
    samples = table(
        ["initial noise", *(f"prompts of kind '{kind}'" for kind in kinds)],
        [[noise, *(cell(row[kind]) for kind in kinds)] for noise, row in distances.items()],
    )
    return document(
        "Intersection over union of the heat maps' upper half of pixels with the half of the image that is repeated "
        "(a random map has 1/3), by the mean of 16 draws:",
        overlaps,
        "Distance of samples to the prompt's first image, root mean square of grey levels in [0, 1], where it is "
        "repeated. The least memorised noise is the best of 16 by the score difference.",
        samples,
    )


def stochastic_samplers() -> str:
    return document(_samplers("stochastic_samplers"), _samplers("stochastic_samplers_sd3"))


def _samplers(name: str) -> str:
    result = read_result(name)
    cells = {(row["sampler"], row["steps"]): row for row in result["rows"]}
    steps, names = sorted({key[1] for key in cells}), dict.fromkeys(key[0] for key in cells)

    def cell(row: dict[str, Any] | None) -> str | None:
        if row is None:
            return None
        distance = f"{row['distance']:.2f} +- {row['distance_standard_error']:.2f}"
        return f"{distance}, {row['accuracy']:.1%}, {row['spread']:.3f}"

    rows = [[sampler, *(cell(cells.get((sampler, number))) for number in steps)] for sampler in names]
    checkpoint = "second embedded checkpoint" if name.endswith("sd3") else "embedded checkpoint"
    return document(
        f"The {checkpoint}, {result['count']} samples without guidance, {result['rows'][0]['seeds']} seeds: Frechet "
        "distance of a classifier's features to those of the test images with its standard error over seeds, share "
        "classified as prompted, and deviation of pixels within a class.",
        table(["sampler", *(f"{number} steps" for number in steps)], rows),
    )
