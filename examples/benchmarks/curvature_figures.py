"""The tables of docs/curvature.md, for document_figures.py."""

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
    scatter = result["scatter_in_bits_per_dim"]
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
