"""The study behind `diffusers-fisher transport`: where the PF-ODE's map is an optimal transport map, and where not."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch

from ..denoiser import PipelineDenoiser
from ..errors import InputError
from ..files import check_writable, save_figure, write_json
from ..fisher.autodiff import AutodiffFisher
from ..fisher.covariance import Covariance
from ..fisher.exact import GaussianMixture
from ..fisher.operator import FisherMatrixOperator, FisherOperator
from ..state import DenoisingState
from ..transport import (
    SCHEDULES,
    FixedSteps,
    Schedule,
    TransportMap,
    asymmetry,
    coupling_cost,
    denoiser_field,
    exact_field,
    least_eigenvalue,
    model_schedule,
    off_diagonal_asymmetry,
    transport_map,
)

TRIANGLE = ((0.5, 0.0), (0.0, -0.5), (0.0, 0.0))  # the paper's points
AXIS_LINE = ((0.0, 0.0), (0.0, 0.5), (0.0, -0.6))  # its affine ones
STEP_COUNTS = (5, 10, 20, 40, 80, 160)


@dataclasses.dataclass(frozen=True)
class Case:
    """A distribution and what theory says of its map (None: nothing)."""

    name: str
    distribution: Any
    optimal: bool | None


def few_points(points: torch.Tensor) -> GaussianMixture:
    """Points (N, d) as modes without variance: faster than `DiracMixture`, which is made for banks of them."""
    return GaussianMixture(points, Covariance.isotropic(0.0, tuple(points.shape[1:])))


def two_dimensional_cases() -> list[Case]:
    """The paper's two point sets, and controls: known to be optimal although not on a line, or known not to be."""
    turn = _rotation(0.4)
    corners = torch.tensor([[x, y] for x in (-0.5, 0.5) for y in (-0.3, 0.3)], dtype=torch.float64)
    line = torch.tensor([[0.1], [0.6], [-0.5]], dtype=torch.float64) * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    mean = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    covariance = turn @ torch.diag(torch.tensor([0.4, 0.05], dtype=torch.float64)) @ turn.mT
    modes = torch.tensor(TRIANGLE, dtype=torch.float64)
    return [
        Case("triangle", few_points(torch.tensor(TRIANGLE, dtype=torch.float64)), False),
        Case("line along an axis", few_points(torch.tensor(AXIS_LINE, dtype=torch.float64)), True),
        Case("line in general position", few_points(line + 0.2), True),
        Case("rotated rectangle", few_points(corners @ turn.mT), True),
        Case("Gaussian", GaussianMixture(mean, Covariance.full(covariance[None], (2,))), True),
        Case("three Gaussians", GaussianMixture(modes, Covariance.isotropic(0.01, (2,))), False),
    ]


def higher_dimensional_cases(dimensions: int = 16, generator: torch.Generator | None = None) -> list[Case]:
    """Points in general position, points on a line, and a Gaussian, in more dimensions."""
    generator = torch.Generator().manual_seed(1) if generator is None else generator
    points = 0.5 * torch.randn(8, dimensions, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(points[:1], dim=1)
    line = torch.randn(8, 1, generator=generator, dtype=torch.float64) * direction
    factor = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64) / dimensions**0.5
    covariance = factor @ factor.mT + 0.01 * torch.eye(dimensions, dtype=torch.float64)
    return [
        Case(f"8 points in {dimensions}-d", few_points(points), False),
        Case(f"8 points on a line in {dimensions}-d", few_points(line + 0.1), True),
        Case(
            f"Gaussian in {dimensions}-d",
            GaussianMixture(points[:1], Covariance.full(covariance[None], (dimensions,))),
            True,
        ),
    ]


def parse_points(text: str | None) -> torch.Tensor | None:
    """Points written as "x,y; x,y; ...", (N, d) float64; None for None.

    Raises:
        InputError: something else.
    """
    if text is None:
        return None
    try:
        return torch.tensor([[float(number) for number in row.split(",")] for row in text.split(";")]).double()
    except ValueError as error:
        raise InputError(
            f"Points {text!r} can't be read ({error}); allowed: coordinates between commas, points between "
            'semicolons, all of one dimension, such as "0.5,0; 0,-0.5; 0,0".'
        ) from error


def user_case(points: torch.Tensor) -> Case:
    """A user's own points (N, d).

    Raises:
        InputError: fewer than two points, or not a table of finite numbers.
    """
    if points.ndim != 2 or len(points) < 2 or not torch.isfinite(points).all():
        raise InputError(
            f"Points have shape {tuple(points.shape)}; allowed: (N, d), at least two points of finite coordinates."
        )
    return Case(f"{len(points)} given points", few_points(points.double()), None)


def study(case: Case, schedule: Schedule, runs: int, seed: int) -> tuple[dict[str, Any], TransportMap]:
    """Indices of the map at `runs` random points of the noise end, with their standard errors."""
    generator = torch.Generator().manual_seed(seed)
    level = schedule.level(schedule.noise_time)
    shape = case.distribution.shape
    # Pure noise, as a sampler starts (and as the paper's experiment does), not the noised data.
    start = torch.randn(runs, *shape, generator=generator, dtype=torch.float64) * level.noise_to_signal
    found = transport_map(exact_field(case.distribution), start, schedule)
    row: dict[str, Any] = {"case": case.name, "schedule": schedule.name, "optimal": case.optimal, "runs": runs}
    row |= indices(found.jacobian) | {"integration_error": found.error}
    closed = gaussian_map(case.distribution, start, schedule)
    if closed is not None:
        row["distance_to_closed_form"] = float((closed - found.end).abs().max())
    return row, found


def indices(matrices: torch.Tensor) -> dict[str, float]:
    """Means and standard errors of the indices over (runs, d, d)."""
    result = {}
    for name, function in (("asymmetry", asymmetry), ("off_diagonal_asymmetry", off_diagonal_asymmetry)):
        values = function(matrices)
        result[name] = float(values.mean())
        result[f"{name}_standard_error"] = float(values.std() / len(values) ** 0.5)
    return result | {"least_eigenvalue": float(least_eigenvalue(matrices).min())}


def gaussian_map(distribution: Any, start: torch.Tensor, schedule: Schedule) -> torch.Tensor | None:
    """The optimal map between the noised Gaussians at the schedule's ends; None where there is more than one mode."""
    if not isinstance(distribution, GaussianMixture) or len(distribution.weights) != 1:
        return None
    mean = distribution.means[0].flatten()
    values, vectors = torch.linalg.eigh(distribution.covariance.dense()[0])
    ends = [schedule.level(t) for t in (schedule.data_time, schedule.noise_time)]
    low, high = (level.noise_to_signal**2 for level in ends)
    factor = vectors @ torch.diag(((values + low) / (values + high)).sqrt()) @ vectors.mT
    return ((start.flatten(1) - mean) @ factor + mean).view_as(start)


def coupling(case: Case, schedule: Schedule, count: int, seed: int) -> dict[str, Any]:
    """The cost of the ODE's pairs against the exact plan, from the true marginal at the noise end."""
    generator = torch.Generator().manual_seed(seed)
    noise_to_signal = schedule.level(schedule.noise_time).noise_to_signal
    clean = case.distribution.sample(count, generator)
    start = clean + noise_to_signal * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    # Only the end points are needed: one direction stands for the Jacobian.
    found = transport_map(
        exact_field(case.distribution), start, schedule, directions=torch.zeros_like(start)[None] + 1
    )
    cost = coupling_cost(found.start, found.end)
    return {"case": case.name, "schedule": schedule.name, "points": count} | dataclasses.asdict(cost)


def by_steps(case: Case, schedule: Schedule, runs: int, seed: int) -> list[dict[str, Any]]:
    """The indices when the integration is coarse: how much of them is the integrator's."""
    generator = torch.Generator().manual_seed(seed)
    level = schedule.level(schedule.noise_time)
    noise = torch.randn(runs, *case.distribution.shape, generator=generator, dtype=torch.float64)
    start = noise * level.noise_to_signal
    rows = []
    for steps in STEP_COUNTS:
        found = transport_map(exact_field(case.distribution), start, schedule, FixedSteps(steps))
        rows.append({"case": case.name, "schedule": schedule.name, "steps": steps} | indices(found.jacobian))
    return rows


def learned_map(seed: int, count: int = 4, steps: int = 20) -> dict[str, Any]:
    """The same indices for the embedded checkpoint's own map, in 256 dimensions, from noise to latents.

    The asymmetry of the network's own Jacobian, which no score would have, is shown separately, and the map is carried
    once more with that part taken out. Cost: 256 vector-Jacobian products an evaluation; minutes on two cores.
    """
    from ..checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt
    from ..pipelines import StableDiffusionFisherPipeline

    pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    labels = [index % len(EMBEDDED_CLASSES) for index in range(count)]
    denoiser = PipelineDenoiser(pipe, prompt=[embedded_prompt(label) for label in labels])
    schedule = model_schedule(denoiser)
    generator = torch.Generator().manual_seed(seed)
    noise_to_signal = schedule.level(schedule.noise_time).noise_to_signal
    start = noise_to_signal * torch.randn(count, 4, 8, 8, generator=generator, dtype=torch.float64)
    by_level: list[float] = []

    def own(state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
        operator = MatrixOperator(state, AutodiffFisher(denoiser, chunk_size=64)(state).dense().mT)
        by_level.append(float(asymmetry(operator.matrix).mean()))
        return operator

    def symmetric(state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
        matrix = AutodiffFisher(denoiser, chunk_size=64)(state).dense()
        return MatrixOperator(state, (matrix + matrix.mT) / 2)

    found = transport_map(denoiser_field(denoiser, own), start, schedule, FixedSteps(steps))
    jacobian_asymmetry = by_level[: 2 * steps : 2]  # the first of each step's two evaluations
    without = transport_map(denoiser_field(denoiser, symmetric), start, schedule, FixedSteps(steps))
    return {
        "samples": count, "steps": steps, "map": indices(found.jacobian), "integration_error": found.error,
        "fisher_asymmetry_by_level": jacobian_asymmetry, "noise_to_signal": found.noise_to_signal[:-1].tolist(),
        "map_of_symmetrised_jacobians": indices(without.jacobian), "integration_error_symmetrised": without.error,
    }  # fmt: skip


class MatrixOperator(FisherMatrixOperator):
    """F as a matrix a sample, (B, d, d), taken as it is."""

    def __init__(self, state: DenoisingState, matrix: torch.Tensor):
        super().__init__(state)
        self.matrix = matrix

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bde,be->bd", self.matrix, v.flatten(1)).view_as(v)

    def dense(self) -> torch.Tensor:
        return self.matrix


def run_study(
    output: Path, runs: int = 300, points: torch.Tensor | None = None, learned: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Runs the two-dimensional study (or the given points alone), prints its table and writes `output`.

    Args:
        learned: also the embedded checkpoint's map, see `learned_map`.

    Raises:
        InputError: fewer than two points or runs; a folder that can't be written.
    """
    if runs < 2:
        raise InputError(
            f"`runs` is {runs}; allowed: at least 2, and 300 for a standard error like the paper's figures."
        )
    check_writable(output)
    begin = time.perf_counter()
    cases = two_dimensional_cases() if points is None else [user_case(points)]
    rows, maps = [], {}
    print(f"{'case':<28}{'schedule':<15}{'asymmetry':>22}{'off-diagonal index':>22}{'least eig.':>12}{'error':>10}")
    for case in cases:
        for schedule in SCHEDULES.values():
            row, maps[case.name, schedule.name] = study(case, schedule, runs, seed)
            rows.append(row)
            print(_line(row), flush=True)
    if points is None:
        for case in higher_dimensional_cases():
            row, _ = study(case, SCHEDULES["vp"], max(2, runs // 10), seed)
            rows.append(row)
            print(_line(row), flush=True)
    chosen = [case for case in cases if case.name in ("triangle", "rotated rectangle", "Gaussian")] or cases
    report: dict[str, Any] = {
        "maps": rows,
        "couplings": [coupling(case, SCHEDULES["edm"], 1024, seed) for case in chosen],
        "by_steps": [
            row for case in chosen[:1] for name in SCHEDULES for row in by_steps(case, SCHEDULES[name], 60, seed)
        ],
    }
    for row in report["couplings"]:
        print(
            f"coupling, {row['case']}: {row['pairs']:.6f} a pair, optimal {row['optimal']:.6f}, gap {row['gap']:.2e} "
            f"± {row['standard_error']:.1e}"
        )
    _plots(output, report, maps, cases, seed)
    if learned:
        report["learned"] = found = learned_map(seed)
        print(
            f"embedded checkpoint, {found['samples']} samples: asymmetry of the map {found['map']['asymmetry']:.3f}, "
            f"of the network's own Fisher {min(found['fisher_asymmetry_by_level']):.3f} to "
            f"{max(found['fisher_asymmetry_by_level']):.3f}; of the map with that taken out "
            f"{found['map_of_symmetrised_jacobians']['asymmetry']:.3f}"
        )
    report["seconds"] = round(time.perf_counter() - begin, 1)
    write_json(output / "transport.json", report)
    print(f"Table, plots and transport.json are in {output.resolve()} ({report['seconds']} s).")
    return report


def _line(row: dict[str, Any]) -> str:
    first = f"{row['asymmetry']:.2e} ± {row['asymmetry_standard_error']:.0e}"
    second = f"{row['off_diagonal_asymmetry']:.3f} ± {row['off_diagonal_asymmetry_standard_error']:.3f}"
    return (
        f"{row['case']:<28}{row['schedule']:<15}{first:>22}{second:>22}{row['least_eigenvalue']:>12.1e}"
        f"{row['integration_error']:>10.0e}"
    )


def _rotation(angle: float) -> torch.Tensor:
    cosine, sine = math.cos(angle), math.sin(angle)
    return torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)


def _plots(
    output: Path, report: dict[str, Any], maps: dict[tuple[str, str], TransportMap], cases: list[Case], seed: int
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in SCHEDULES:
        rows = [row for row in report["by_steps"] if row["schedule"] == name]
        steps, values = [row["steps"] for row in rows], [row["off_diagonal_asymmetry"] for row in rows]
        errors = [row["off_diagonal_asymmetry_standard_error"] for row in rows]
        axes.errorbar(steps, values, errors, marker=".", capsize=2, label=name)
    axes.set(xscale="log", xlabel="steps of the midpoint rule", ylabel="off-diagonal asymmetry")
    axes.set_title(f"{cases[0].name}: what is left of the schedules' differences when integrated finely")
    axes.legend()
    save_figure(figure, output / "index_by_steps.png")
    flat = [case for case in cases if case.distribution.shape == (2,)]
    if not flat:
        return
    figure = Figure(figsize=(4 * len(flat), 4), layout="constrained")
    for place, (axes, case) in enumerate(zip(figure.subplots(1, len(flat), squeeze=False)[0], flat, strict=True)):
        _draw_map(axes, case, seed)
        axes.set_title(f"{case.name}\nasymmetry {float(asymmetry(maps[case.name, 'edm'].jacobian).mean()):.1e}")
        if place == 0:
            axes.set_ylabel("EDM: noise to data")
    save_figure(figure, output / "maps.png")


def _draw_map(axes: Any, case: Case, seed: int) -> None:
    """Trajectories, coloured by where they end."""
    start = torch.randn(60, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = transport_map(exact_field(case.distribution), start, SCHEDULES["edm"], num_points=60)
    for index in range(len(start)):
        path = found.trajectory[:, index]
        axes.plot(path[:, 0], path[:, 1], linewidth=0.6, alpha=0.6, color="tab:blue")
    axes.scatter(*found.start.T, s=6, color="tab:gray", label="noise")
    axes.scatter(*found.end.T, s=14, color="tab:red", label="data")
    axes.set_aspect("equal")
    axes.legend(fontsize=7)
