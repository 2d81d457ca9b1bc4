"""The tables of docs/estimators.md, for document_figures.py."""

from figure_tables import document, nearest, read_result, table


def fisher_levels() -> str:
    """Returns tables of three of the noise levels, for both parts."""
    parts = []
    for name, title in (
        ("mixture", "(a) mixture of 300 Gaussians fitted to 16x16 images"),
        ("checkpoint", "(b) embedded checkpoint"),
    ):
        result = read_result("fisher_accuracy")[name]
        ratios = result["noise_to_signal"]
        indices = nearest(ratios)
        heads = [f"{ratios[index]:.2g}" for index in indices]
        rows = [
            [estimator, *(f"{row[quantity][index]:.2g}" for quantity in ("trace", "matvec") for index in indices)]
            for estimator, row in result["levels"].items()
        ]
        parts += [
            f"{title}: relative error of the trace, and of a product with a random vector, at noise to signal "
            f"{', '.join(heads)}.",
            table(["estimator", *(f"{measure}, {head}" for measure in ("trace", "product") for head in heads)], rows),
        ]
    return document(*parts)


def fisher_gradients() -> str:
    result = read_result("fisher_accuracy")
    parts = []
    for title, gradients in (
        ("(a) mixture, by steps", result["mixture"]["gradients"]),
        ("(b) embedded checkpoint", result["checkpoint"]["gradients"]),
    ):
        rows = [
            [name, *(_gradient_cell(each[name]) for each in gradients.values())]
            for name in next(iter(gradients.values()))
        ]
        parts.append(
            f"{title}: cosine with the exact gradient at the noise, and in brackets log10 of the ratio of norms."
        )
        parts.append(table(["estimator", *gradients], rows))
    asymmetry = result["checkpoint"]["asymmetry_of_the_networks_jacobian"]
    return document(
        *parts,
        f"The network's own Jacobian is not symmetric: |F - F^T|/(2|F|) is {min(asymmetry):.3f} to "
        f"{max(asymmetry):.3f} along a run. This limits how exact products with J in place of J^T can be; the row of "
        "forward-mode products shows the limit.",
    )


def _gradient_cell(row: dict) -> str:
    return "overflow" if "failed" in row else f"{row['cosine']:.3f} ({row['log10_norm_ratio']:+.1f})"


def fisher_ascents() -> str:
    result = read_result("fisher_accuracy")
    part, machine = result["checkpoint"], result["machine"]
    ascents = part["ascents"]
    estimators = next(iter(ascents.values()))
    parts = [
        f"Embedded checkpoint, {part['batch']} prompts, {part['iterations']} iterations of normalised ascent, step "
        f"{part['step_size']} of the noise's norm, {machine['device']}, {machine['threads']} "
        "threads: gain of the reward, and the gain per second in brackets."
    ]
    for reward in next(iter(estimators.values())):
        rows = [[name, *(_ascent_cell(each[name][reward]) for each in ascents.values())] for name in estimators]
        parts += [f"Reward: {reward}.", table(["estimator", *ascents], rows)]
    return document(*parts)


def _ascent_cell(row: dict) -> str:
    return "overflow" if "failed" in row else f"{row['gained']:.3f} ({row['gained_per_second']:.3f})"
