"""The tables of docs/transport.md and docs/lml.md, for document_figures.py."""

from figure_tables import document, nearest, read_result, table


def transport() -> str:
    result = read_result("transport")
    rows = [
        [row["case"], row["schedule"], f"{row['asymmetry']:.2g} ± {row['asymmetry_standard_error']:.1g}",
         *_map_cells(row, row["integration_error"])]
        for row in result["maps"]
    ]  # fmt: skip
    columns = ["data", "schedule", "asymmetry", "off-diagonal index", "least eigenvalue", "integration error"]
    items = [
        f"- {row['case']}, {row['points']} pairs: mean squared distance {row['pairs']:.6f}, optimal "
        f"{row['optimal']:.6f}, gap {row['gap']:.1e} ± {row['standard_error']:.0e}."
        for row in result["couplings"]
    ]
    machine = result["machine"]
    items.append(
        f"- The study took {result['seconds']:.0f} s on {machine['threads']} thread(s) of {machine['processor']}."
    )
    return document(table(columns, rows), "\n".join(items))


def transport_learned() -> str:
    study = read_result("transport")["learned"]
    asymmetries, levels = study["fisher_asymmetry_by_level"], study["noise_to_signal"]
    rows = []
    for title, key, error in (
        ("the checkpoint's map", "map", "integration_error"),
        ("the same with every Jacobian symmetrised", "map_of_symmetrised_jacobians", "integration_error_symmetrised"),
    ):
        row = study[key]
        asymmetry = f"{row['asymmetry']:.4f} ± {row['asymmetry_standard_error']:.4f}"
        rows.append([title, asymmetry, *_map_cells(row, study[error])])
    values = ", ".join(
        f"{asymmetries[index]:.4f} at {levels[index]:.2g}" for index in nearest(levels[: len(asymmetries)])
    )
    return document(
        f"{study['samples']} samples, noise to signal {levels[0]:.3g} to {levels[-1]:.2g}, {study['steps']} steps "
        f"of a Runge-Kutta rule of order {study['order']}.",
        table(["", "asymmetry", "off-diagonal index", "least eigenvalue", "integration error"], rows),
        f"Asymmetry of the network's own Fisher by noise to signal: {values}.",
    )


def _map_cells(row: dict, integration_error: float) -> list[str]:
    off_diagonal = f"{row['off_diagonal_asymmetry']:.3f} ± {row['off_diagonal_asymmetry_standard_error']:.3f}"
    return [off_diagonal, f"{row['least_eigenvalue']:.2g}", f"{integration_error:.0e}"]


def lml_cells() -> str:
    result = read_result("lml")
    floors, cells = result["floors"], result["cells"]
    options = ", ".join(
        f"{name} lambda {row['lml_lambda']:g}, kappa {row['lml_kappa']:g}" for name, row in result["chosen"].items()
    )
    parts = [
        f"{cells[0]['count']:,} samples per cell, equally many of each class. Chosen: {options}. For scale: two "
        f"halves of the real images are {floors['real_halves']:.3f} apart (standard deviation over splits "
        f"{floors['real_halves_standard_deviation']:.3f}), and {floors['reconstructed_half']:.3f} when one half has "
        "been through the autoencoder.",
    ]
    for scale, seed in sorted({(row["guidance_scale"], row["seed"]) for row in cells}):
        by_place = {
            (row["sampler"], row["calls"]): row
            for row in cells
            if (row["guidance_scale"], row["seed"]) == (scale, seed)
        }
        samplers, calls = (dict.fromkeys(names) for names in zip(*by_place, strict=True))
        rows = [[name, *(_lml_cell(by_place.get((name, count))) for count in sorted(calls))] for name in samplers]
        parts += [
            f"Guidance scale {scale:g}, noise of seed {seed}: Frechet distance, and accuracy in brackets.",
            table(["sampler", *(f"{count} calls" for count in sorted(calls))], rows),
        ]
    items = [
        f"- {row['sampler']}, {row['calls']} calls, guidance scale {row['guidance_scale']:g}, seed {row['seed']}: "
        f"{row['difference']:+.4f} ± {row['standard_error']:.4f}"
        for row in result["differences"]
    ]
    return document(*parts, "Distance minus the distance of the parent from the same noise:", "\n".join(items))


def _lml_cell(row: dict | None) -> str:
    if row is None:
        return ""
    return f"{row['frechet_distance']:.3f} ± {row['frechet_standard_error']:.3f} ({row['accuracy']:.1%})"


def lml_sweep() -> str:
    sweep = read_result("lml")["sweep"]
    names = ("DDIM", "DPM-Solver++")
    cells = {(row["sampler"], row["lml_lambda"], row["lml_kappa"]): _lml_cell(row) for row in sweep}
    options = sorted({key[1:] for key in cells if key[1] is not None}, key=lambda pair: pair[1] / pair[0])
    rows = [["0", "", "", *(cells[name, None, None] for name in names)]]
    for damping, kappa in options:
        numbers = [f"{kappa / damping:g}", f"{damping:g}", f"{kappa:g}"]
        rows.append([*numbers, *(cells[f"LML-{name}", damping, kappa] for name in names)])
    return document(
        f"{sweep[0]['calls']} calls, {sweep[0]['count']:,} samples, other noise: Frechet distance, and accuracy in "
        "brackets.",
        table(["kappa/lambda", "lambda", "kappa", *(f"LML-{name}" for name in names)], rows),
    )
