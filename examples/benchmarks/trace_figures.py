"""The tables of docs/training.md, for document_figures.py."""

import math

from figure_tables import document, read_result, table


def trace_mixture() -> str:
    result = read_result("trace_matching_mixture")
    parts = []
    for kind, title in (
        ("one variance", f"One variance for all modes ({result['fitted_variance']:.3f}, fitted to the images)."),
        ("variance a class", "The harder case: each of the ten classes has its own variance, from 0.01 to 0.1."),
    ):
        rows = [
            [row["recipe"], f"{row['processor_seconds']:.0f}", *(f"{value:.2g}" for value in row["relative_error"])]
            for row in result["rows"]
            if row["mixture"] == kind
        ]
        parts += [
            f"{title} Mean relative error of tr F by timestep (of 1000, Stable Diffusion's schedule):",
            table(["recipe", "seconds*", *result["timesteps"]], rows),
        ]
    return document(
        *parts,
        f"\\* of processor time on one thread, for {result['steps']} steps of {result['denoiser_calls_a_step']} "
        f"denoiser evaluations and {result['parameters']:,} parameters, the same for every recipe. Errors are over "
        f"{result['evaluation_samples']} fresh samples at every timestep.",
    )


def trace_embedded() -> str:
    result = read_result("trace_embedded")
    errors, jacobians = result["squared_errors"], result["full_jacobians"]
    norm, least, images = result["norm_estimate"], errors["mean"]["squared error"], result["squared_errors_of_images"]
    offset, clipped_offset = (
        sum(abs(min(estimate, maximum) - truth) for estimate, truth in zip(norm["mean"], least, strict=True))
        / len(least)
        for maximum in (math.inf, 1.0)
    )
    likelihoods, gap = result["likelihoods"], result["residual_less_jacobian_bits_per_dim"]
    ratios = result["times"]["ratio"]
    differences = [
        [name, training["parameters"], *(part["mean_absolute_difference"][name] for part in (errors, jacobians))]
        for name, training in result["training"].items()
    ]
    columns = ["target", "correlation over images", "mean difference", "mean absolute difference"]
    likelihood_columns = [
        "trace by",
        "correlation over images",
        "mean difference",
        "mean absolute difference",
        "largest",
    ]
    return document(
        f"Mean absolute difference of r over {result['levels']} noise levels, equally spaced in log(sigma/alpha). The "
        f"mean r of test images is compared with that by squared errors ({errors['images']} images) and by full "
        f"Jacobians ({jacobians['images']} images).",
        table(
            ["target", "parameters", "from squared errors", "from full Jacobians"],
            [[name, f"{count:,}", *(f"{value:.4f}" for value in values)] for name, count, *values in differences],
        ),
        "The estimate of target norm, on the same images with mirrored noise, is at the three smallest noise levels "
        + ", ".join(f"{m:.2f} +- {e:.2f}" for m, e in zip(norm["mean"][:3], norm["standard_error"][:3], strict=True))
        + "; squared errors give " + ", ".join(f"{value:.2f}" for value in least[:3]) + ". The denoiser's own "
        "error in |x_0|^2 is divided by s^2 there, so no model with this target can be right. On average over all "
        f"levels the mean is off by {offset:.3f}, and by {clipped_offset:.4f} if values above 1 are replaced by 1.",
        f"Single images ({images['images']}): the integral of r over log(sigma/alpha), compared with the integral of "
        f"the image's own squared errors. Both are means over the same "
        f"{images['draws']} draws of the noise, in bits/dim. "
        "A model sees only the noised image, so even a perfect model has a correlation below 1:",
        table(columns, [[name, *_agreement(row)] for name, row in images["bits_per_dim"].items()]),
        "On noised images the integral of the residual model minus that of the jacobian model is "
        f"{gap:+.3f} bits/dim.",
        f"Integrated trace of a likelihood ({likelihoods['images']} test images, {likelihoods['steps']} steps), "
        "compared with the full Jacobian on the same path, in bits/dim:",
        table(
            likelihood_columns,
            [[name, *_agreement(row), f"{row['largest_difference']:.4f}"]
             for name, row in likelihoods["bits_per_dim"].items()],
        ),
        f"Time of a likelihood relative to its time with the trace model ({result['times']['images']} images, "
        f"{result['threads']} threads): {ratios['1 probe']['median']:.2f} with 1 probe, "
        f"{ratios['16 probes']['median']:.1f} with 16.",
    )  # fmt: skip


def _agreement(row: dict) -> list[str]:
    return [f"{row['correlation']:.3f}", f"{row['mean_difference']:+.4f}", f"{row['mean_absolute_difference']:.4f}"]


def trace_cost() -> str:
    result = read_result("trace_cost")
    memory = result["memory_over_inversion"]
    rows = [
        ["time of a call: trace model over denoiser", _ratio(result["trace_model_over_denoiser"])],
        [
            "time: likelihood by the trace model, without its checks, over plain inversion",
            _ratio(result["trace_model_over_inversion"]),
        ],
        [
            "time: likelihood by one difference per level over plain inversion",
            _ratio(result["difference_over_inversion"]),
        ],
        [
            "time: likelihood by one difference per level over one Hutchinson probe",
            _ratio(result["difference_over_probe"]),
        ],
        [
            "time: likelihood by one Hutchinson probe over likelihood by the trace model",
            _ratio(result["probe_over_trace_model"]),
        ],
        ["peak memory: likelihood by the trace model over plain inversion", f"{memory['trace model']:.3f}"],
        ["peak memory: likelihood by one difference per level over plain inversion", f"{memory['1 difference']:.3f}"],
        ["peak memory: likelihood by one Hutchinson probe over plain inversion", f"{memory['1 probe']:.3f}"],
    ]
    return document(
        f"Stable Diffusion 1.5's shapes with random weights ({result['denoiser_parameters'] / 1e6:.0f} M "
        f"parameters, latents {result['shape']}, {result['machine']['device']}, {result['threads']} threads), a "
        f"trace model of {result['trace_parameters'] / 1e6:.1f} M parameters. Ratios of times are medians of paired "
        "runs, with the smallest and the largest in brackets.",
        table(["", "ratio"], rows),
    )


def _ratio(row: dict) -> str:
    return f"{row['median']:.3f} ({row['min']:.3f} to {row['max']:.3f})"


def trace_check() -> str:
    result = read_result("trace_check")
    rows = [
        [
            name, f"{row['flagged']:.0%}", f"{row['covered']:.0%}", f"{row['stated_median']:.3f}",
            f"{row['error_mean']:+.3f}", f"{row['error_root_mean_square']:.3f}", f"{row['error_largest']:.3f}",
        ]
        for name, row in result["kinds"].items()
    ]  # fmt: skip
    test, calibration, others = result["kinds"]["test images"], result["calibration"], result["others"]
    return document(
        f"{test['samples']} samples of each kind, bits/dim. The error is the trace model's log-likelihood minus that "
        f"by differences along many directions on the same path, whose own standard error is "
        f"{test['standard_error_of_error']:.3f} for test images and at most "
        f"{max(row['standard_error_of_error'] for row in result['kinds'].values()):.3f}. The calibration, on "
        f"{calibration['samples']} other test images, states {calibration['error']:.3f}. Of {others['images']} more "
        f"test images {others['flagged']:.1%} are flagged.",
        table(
            ["samples", "flagged", "error within `trace_error`", "median `trace_error`", "mean error",
             "root mean square", "largest"],
            rows,
        ),
    )  # fmt: skip
