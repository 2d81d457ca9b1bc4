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
