"""The tables on random directions and on the flow-matching checkpoint, for document_figures.py."""

from typing import Any

from figure_tables import FOLDER, document, nearest, read_result, table

CHECKPOINTS = {"likelihood_probes": "Stable Diffusion", "likelihood_probes_sd3": "Stable Diffusion 3"}


def likelihood_probes() -> str:
    results = {title: read_result(name) for name, title in CHECKPOINTS.items() if (FOLDER / f"{name}.json").is_file()}
    first = next(iter(results.values()))
    scatter = [
        [title, row["levels"], row["calls"], row["images"], f"{row['scatter']:.4f}", f"{row['largest']:.4f}"]
        for title, result in results.items()
        for row in result["scatter"]["rows"]
    ]
    ways = [
        [title, name, row["calls"], f"{row['processor_seconds']:.2f}", f"{row['scatter']:.4f}",
         f"{row['stated']:.4f}", f"{row['within_1']:.0%}", f"{row['within_1.96']:.1%}", row["seeds"]]
        for title, result in results.items()
        for name, row in result["coverage"]["rows"].items()
    ]  # fmt: skip
    return document(
        f"One direction per level, with the embedded checkpoints: standard deviation over "
        f"{first['scatter']['directions']} draws, in bits/dim.",
        table(["checkpoint", "levels", "calls", "images", "scatter", "largest of an image"], scatter),
        f"Whole likelihoods of {first['coverage']['images']} images: evaluations (with differences, those of the "
        "directions are among them), seconds of processor time per image, the scatter over seeds, the stated standard "
        "error, and how often the error is within 1 and within 1.96 of it.",
        table(
            ["checkpoint", "directions", "calls", "seconds", "scatter", "stated", "within 1", "within 1.96", "seeds"],
            ways,
        ),
        *(_probe_sentences(title, result) for title, result in results.items()),
    )


def _probe_sentences(title: str, result: dict[str, Any]) -> str:
    bias, half, parts = result["bias"], result["half_precision"], [f"{title}:"]
    if "sizes" in result:
        dimensions = ", ".join(str(row["dimensions"]) for row in result["sizes"]["rows"])
        scatter = ", ".join(f"{row['scatter']:.4f}" for row in result["sizes"]["rows"])
        parts.append(
            f"With tiled images of {dimensions} dimensions the scatter is {scatter}, a slope of "
            f"{result['sizes']['slope']:.2f} in the logarithms."
        )
    precisions = ", ".join(f"{name} {_signed(row)}" for name, row in half.items() if name != "machine")
    parts.append(
        f"Differences less back-propagation along the same directions: {_signed(bias)} on average. Half precision "
        f"less float32 along the same directions: {precisions}."
    )
    if "reference" in result:
        row = result["reference"]
        parts.append(
            f"Against adaptive steps with whole Jacobians ({row['images']} images): {row['mean']:+.4f} +- "
            f"{row['standard_error']:.4f} on average, at most {row['largest_in_standard_errors']:.1f} standard errors "
            f"and within `total_error` {row['within_total_error']:.0%}."
        )
    return " ".join(parts)


def _signed(row: dict[str, float]) -> str:
    return f"{row['mean']:+.5f} +- {row['standard_error']:.5f}"


def flow_samples() -> str:
    row = read_result("flow_checkpoint")["samples"]
    return (
        f"{row['count']} samples ({row['steps']} steps, guidance scale {row['guidance_scale']:g}): "
        f"{row['classified_as_prompted']:.1%} are classified as prompted, with a spread within a class of "
        f"{row['spread_relative_to_real']:.2f} of that of real images. With one empty token, {row['stock_samples']} "
        f"images differ from those of the stock call by at most "
        f"{255 * row['largest_difference_from_the_stock_call']:.2g} of 255 grey levels."
    )


def flow_likelihood() -> str:
    result = read_result("flow_checkpoint")["likelihood"]
    rows = [
        [row["what"], row["calls"], f"{row['mean']:.4f}", f"{row['largest']:.4f}", f"{row['stated']:.4f}",
         f"{row['within_total_error']:.0%}"]
        for row in result["rows"]
    ]  # fmt: skip
    return document(
        f"{result['images']} test images, against adaptive steps with whole Jacobians (up to "
        f"{result['reference_calls']} calls, with an error of at most {result['reference_error']:.4f}), in bits/dim:",
        table(
            [
                "trace",
                "calls",
                "mean error",
                "largest",
                "mean `total_error`",
                "within `total_error`",
            ],
            rows,
        ),
    )


def flow_products() -> str:
    result = read_result("flow_checkpoint")["products"]
    levels = nearest(result["noise_to_signal"])
    rows = [
        [name, *(f"{values['cosine'][level]:.3f} ({values['trace'][level]:.3f})" for level in levels)]
        for name, values in result["levels"].items()
    ]
    columns = [f"sigma/alpha = {result['noise_to_signal'][level]:.2g}" for level in levels]
    asymmetry = ", ".join(f"{result['asymmetry'][level]:.3f}" for level in levels)
    return document(
        "Cosine of products with those of the network's whole Jacobian, and in brackets the relative error of "
        "sigma^2 tr F, along a run without guidance:",
        table(["estimator", *columns], rows),
        f"The antisymmetric part of the network's Jacobian is {asymmetry} of its size at these levels.",
    )


def flow_gradients() -> str:
    result = read_result("flow_checkpoint")["gradients"]
    keys = [key for key in result if key != "machine"]
    rows = [[name, *(_cosine(result[key][name]) for key in keys)] for name in result[keys[0]]]
    return document(
        "Cosine of the reward's gradient at the noise with the exact one, and in brackets the ratio of their lengths:",
        table(["estimator", *keys], rows),
    )


def _cosine(row: dict[str, Any]) -> str:
    return "fails" if "failed" in row else f"{row['cosine']:.3f} ({10 ** row['log10_norm_ratio']:.2g})"


def flow_guidance() -> str:
    result = read_result("flow_checkpoint")["guidance"]
    names = ("another class", "left minus right")
    rows = [[way, *(_curve(result[name][way]) for name in names)] for way in result[names[0]]]
    return document(
        f"Best reward before and after {result['iterations']} guidance steps ({result['prompts']} prompts, "
        f"{result['steps']} steps, guidance scale {result['guidance_scale']:g}), and in brackets the time:",
        table(["estimator", *names], rows),
    )


def _curve(row: dict[str, Any]) -> str:
    curve = row["curve"]
    return f"{curve[0]:.3f} to {curve[-1]:.3f} ± {row['standard_error']:.3f} ({row['seconds']:.0f} s)"


def few_steps() -> str:
    parts = []
    names = {
        "few_steps": "Stable Diffusion",
        "few_steps_sd3": "Stable Diffusion 3",
        "few_steps_student": "The student",
    }
    for name, title in names.items():
        if not (FOLDER / f"{name}.json").is_file():
            continue
        result = read_result(name)
        estimators = list(result["rows"][0]["cosine"])
        rows = [
            [row["scheduler"], row["steps"], *(f"{row['cosine'][each]:.3f}" for each in estimators)]
            for row in result["rows"]
        ]
        parts += [
            f"{title}, {result['batch']} prompts, guidance scale {result['guidance_scale']:g}: cosine with the exact "
            "gradient at the noise.",
            table(["scheduler", "steps", *estimators], rows),
        ]
        shares = [row for row in result["rows"] if "classified_as_prompted" in row]
        if shares:
            words = ", ".join(f"{row['classified_as_prompted']:.1%} at {row['steps']}" for row in shares)
            parts.append(f"Of its samples the classifier sees the class of the prompt in {words} steps.")
        gains = [row for row in result["rows"] if "guidance" in row]
        if gains:
            ways = list(gains[0]["guidance"])
            cells = [[row["scheduler"], row["steps"], *(_gain(row["guidance"][way]) for way in ways)] for row in gains]
            parts += [
                "Gain of the reward in ten guidance steps, and in brackets the seconds:",
                table(["scheduler", "steps", *ways], cells),
            ]
    return document(*parts)


def _gain(row: dict[str, float]) -> str:
    return f"{row['gain']:.2f} ± {row['standard_error']:.2f} ({row['seconds']:.0f})"
