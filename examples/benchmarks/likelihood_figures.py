"""The tables of docs/likelihood.md, for document_figures.py."""

import statistics

from figure_tables import document, read_result, table


def likelihood_closed_forms() -> str:
    result = read_result("likelihood")["closed_forms"]
    rows = result["summary"]
    cells = {(row["schedule"], row["scheme"], row["calls"]): row for row in rows}
    schedules, schemes = (dict.fromkeys(row[key] for row in rows) for key in ("schedule", "scheme"))
    calls = sorted({row["calls"] for row in rows})
    parts = [
        f"{len(result['laws'])} laws, {result['draws']} draws of each: mean (worst) error in bits/dim, by "
        "number of denoiser calls."
    ]
    for schedule in schedules:
        errors, coverage = [], []
        for scheme in schemes:
            scheme_rows = [cells[schedule, scheme, count] for count in calls if (schedule, scheme, count) in cells]
            errors.append([scheme, *(f"{row['mean']:.4f} ({row['worst']:.4f})" for row in scheme_rows)])
            if "covered" in scheme_rows[0]:
                estimates = [
                    f"{row['covered']:.1%}, {row['median_estimate_over_median_error']:.1f}" for row in scheme_rows
                ]
                coverage.append([scheme, *estimates])
        parts += [
            f"Noise levels of {schedule}:",
            table(["scheme", *calls], errors),
            "Error estimate: fraction of samples whose error it covers, and its median divided by the median error.",
            table(["scheme", *calls], coverage),
        ]
    floors = {row["law"]: row["prior_floor"] for row in result["by_law"] if row["schedule"] == rows[0]["schedule"]}
    return document(
        *parts,
        f"Error of the prior at the noise levels of {rows[0]['schedule']}, which is part of every figure above:",
        table(["law", "prior"], [[law, f"{floor:.5f}"] for law, floor in floors.items()]),
    )


def likelihood_other_laws() -> str:
    result = read_result("likelihood")["other_laws"]
    rows = [row for row in result["by_law"] if row["scheme"] != "practice"]
    cells = {(row["law"], row["schedule"], row["calls"]): row for row in rows}
    schedules = dict.fromkeys(row["schedule"] for row in rows)
    runs = [(schedule, count) for schedule in schedules for count in (20, 41, 100)]
    lines = []
    for law in result["laws"]:
        law_rows = [cells[law, *run] for run in runs]
        errors = [f"{row['mean']:.4f} ({row['worst']:.4f}), {row['covered']:.0%}" for row in law_rows]
        lines.append([law, *errors, f"{law_rows[0]['prior_floor']:.4f}"])
    return document(
        f"{len(result['laws'])} laws, {result['draws']} draws of each, {rows[0]['scheme']}: mean (worst) error in "
        "bits/dim, and the fraction of draws whose discretisation error the estimate covers.",
        table(["law", *(f"{schedule}, {count}" for schedule, count in runs), "prior"], lines),
    )


def likelihood_checkpoint() -> str:
    likelihood = read_result("likelihood")
    result, reference, trace_model = likelihood["checkpoint"], likelihood["reference"], likelihood["trace_model"]
    rows = [
        [row["what"], row["calls"], *(f"{row[key]:.4f}" for key in ("mean", "worst", "estimate")),
         None if row["standard_error"] is None else f"{row['standard_error']:.4f}"]
        for row in result["rows"]
    ]  # fmt: skip
    columns = [
        "what",
        "calls",
        "mean error",
        "worst",
        "estimated discretisation error",
        "standard error of the probes",
    ]
    deviation = statistics.pstdev(trace_model["errors"])
    share = 2 * statistics.NormalDist(0, deviation).cdf(-0.05)
    return document(
        f"{result['images']} test images. The reference took up to {reference['calls']} calls with 256 products "
        f"each, and is off by up to {reference['error']:.4f} bits/dim by its tolerance.",
        table(columns, rows),
        f"A network in bfloat16 changes the likelihood by {result['bfloat16_less_float32']:.4f} bits/dim on average. "
        f"Of {trace_model['images']} test images DF-TM is within 0.05 bits/dim of the whole Jacobian at the same "
        f"{trace_model['calls']} calls for {trace_model['within_0.05']}. The difference is "
        f"{trace_model['mean']:.4f} on average, "
        f"{trace_model['worst']:.4f} at most. With a standard deviation of {deviation:.4f}, about {share:.1%} of more "
        "images may be beyond 0.05.",
    )


def likelihood_comparison() -> str:
    result = read_result("likelihood")["comparison"]
    ode = result["squared_error_against_ode"]
    return (
        f"Embedded checkpoint, {result['images']} test images under the prompts of all {result['prompts']} classes, "
        f"{result['levels']} levels: the image's own class is likeliest for {result['own_prompt_is_likeliest']:.0%}. "
        f"Differences between prompts have a standard error of {result['standard_error_nats']:.2f} nats; without "
        f"shared draws it would be {result['standard_error_nats_without_shared_draws']:.1f}. Bits/dim of noised "
        f"latents by squared errors minus those by the ODE are {ode['squared_error_minus_ode_bits']:+.3f} ± "
        f"{ode['standard_error_bits']:.3f}."
    )


def likelihood_discretisation() -> str:
    result = read_result("discretisation")
    cells = {(row["family"], row["class"], row["way"]): row for row in result["summary"]}
    families, classes = (dict.fromkeys(row[key] for row in result["summary"]) for key in ("family", "class"))
    parts = [
        f"{len(result['laws'])} laws of {len(result['by_seed'])} seeds, {result['points_per_class_and_family']} points"
        " of each class and family; share of settled points whose error is covered (share that is wrong by more than "
        f"0.05 bits/dim with less than 0.05 stated). One grid and step halving take {result['steps']} steps.",
    ]
    for family in families:
        lines = []
        for name in classes:
            own = [cells[family, name, way] for way in ("one grid", "step halving", "tolerance")]
            last = own[-1]
            lines.append([
                name, *(f"{row['covered']:.1%} ({row['wrong_unwarned']:.1%})" for row in own),
                f"{last['median_stated']:.5f} / {last['median_true']:.5f}", f"{last['within_40_calls']:.0%}",
                f"{last['reached']:.0%}", f"{last['mean_calls']:.0f}",
                f"{last['not_settled_unwarned']} of {last['not_settled']}",
            ])  # fmt: skip
        columns = [
            "points", "one grid", "step halving", f"`tolerance={result['tolerance']}`", "median stated / true",
            "converged by 40 calls", "converged", "mean calls", "not settled, with less than 0.05 stated",
        ]  # fmt: skip
        parts += [f"Noise levels of {family}:", table(columns, lines)]
    return document(*parts)


def likelihood_total_error() -> str:
    result = read_result("total_error")
    cells = {(row["family"], row["class"], row["way"]): row for row in result["summary"]}
    families, classes, ways = (
        dict.fromkeys(row[key] for row in result["summary"]) for key in ("family", "class", "way")
    )
    parts = [
        f"{result['laws']} laws, {result['points']} points of each class and family, one random direction per level: "
        "share of settled points whose error is at most `total_error` (share that is wrong by more than 0.05 bits/dim "
        "with less than 0.05 stated). The columns behind are about the default."
    ]
    for family in families:
        lines = []
        for name in classes:
            own, default = [cells[family, name, way] for way in ways], cells[family, name, "default"]
            lines.append([
                name, *(f"{row['covered']:.1%} ({row['wrong_unwarned']:.1%})" for row in own),
                f"{default['median_stated']:.4f} / {default['median_true']:.4f}",
                f"{default['median_directions']:.4f}", f"{default['mean_levels']:.0f}",
                f"{default['not_settled_unwarned']} of {default['not_settled']}",
            ])  # fmt: skip
        columns = [
            "points", f"one grid of {result['steps']} steps", "default", f"`tolerance={result['tolerance']}`",
            "median stated / true", "of it the directions", "mean levels", "not settled, with less than 0.05 stated",
        ]  # fmt: skip
        parts += [f"Noise levels of {family}:", table(columns, lines)]
    return document(*parts)
