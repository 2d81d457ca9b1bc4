"""The study of `diffusers-fisher transport`: for which distributions is the PF-ODE's map an optimal transport map?"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..backbones import PipelineDenoiser
from ..checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt
from ..distributions import Covariance, Distribution, GaussianMixture
from ..errors import InputError
from ..files import atomic_path, check_writable, save_figure, write_json
from ..fisher.autodiff import AutodiffFisher
from ..fisher.operator import FisherMatrixOperator, FisherOperator
from ..noise import DenoisingState
from .transport import (
    SCHEDULES,
    FixedSteps,
    Schedule,
    TransportMap,
    asymmetry,
    coupling_cost,
    denoiser_field,
    exact_field,
    import_extra,
    least_eigenvalue,
    model_schedule,
    off_diagonal_asymmetry,
    transport_map,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRIANGLE = ((0.5, 0.0), (0.0, -0.5), (0.0, 0.0))  # the paper's points
AXIS_LINE = ((0.0, 0.0), (0.0, 0.5), (0.0, -0.6))  # the paper's points on a line
STEP_COUNTS = (5, 10, 20, 40, 80, 160)
# Schedule of the picture, its number of trajectories, and the number of points per trajectory.
PLOT_SCHEDULE, PLOT_TRAJECTORIES, PLOT_POINTS = "edm", 60, 60
HEADING = f"{'case':<28}{'schedule':<15}{'asymmetry':>22}{'off-diagonal index':>22}{'least eig.':>12}{'error':>10}"


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds a distribution, and whether theory says that its map is optimal (None: theory says nothing)."""

    name: str
    distribution: Distribution
    optimal: bool | None


def few_points(points: torch.Tensor) -> GaussianMixture:
    """Returns points (N, d) as modes without variance: faster than `DiracMixture`, which is for large banks."""
    return GaussianMixture(points, Covariance.isotropic(0.0, tuple(points.shape[1:])))


def two_dimensional_cases() -> list[Case]:
    """Returns the paper's two point sets, and control cases in which theory knows whether the map is optimal."""
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
    """Returns points in general position, points on a line, and a Gaussian, in more dimensions."""
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
    """Returns the points of a text such as "x,y; x,y; ...", (N, d) float64; None gives None.

    Raises:
        InputError: the text has another form.
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
    """Returns the case of a user's own points (N, d).

    Raises:
        InputError: there are fewer than two points, or they are not a table of finite numbers.
    """
    if points.ndim != 2 or len(points) < 2 or not torch.isfinite(points).all():
        raise InputError(
            f"Points have shape {tuple(points.shape)}; allowed: (N, d), at least two points of finite coordinates."
        )
    return Case(f"{len(points)} given points", few_points(points.double()), None)


def study(
    case: Case, schedule: Schedule, runs: int, seed: int, num_points: int = 2
) -> tuple[dict[str, Any], TransportMap]:
    """Returns the indices of the map at `runs` random points of the noise end with standard errors, and the map."""
    generator = torch.Generator().manual_seed(seed)
    level = schedule.level(schedule.noise_time)
    shape = case.distribution.shape
    # The start is pure noise, as in a sampler and in the paper's experiment, and not noised data.
    start = torch.randn(runs, *shape, generator=generator, dtype=torch.float64) * level.noise_to_signal
    result = transport_map(exact_field(case.distribution), start, schedule, num_points=num_points)
    row: dict[str, Any] = {"case": case.name, "schedule": schedule.name, "optimal": case.optimal, "runs": runs}
    row |= indices(result.jacobian) | {"integration_error": result.error}
    optimal_end = gaussian_map(case.distribution, start, schedule)
    if optimal_end is not None:
        row["distance_to_closed_form"] = float((optimal_end - result.end).abs().max())
    return row, result


def indices(matrices: torch.Tensor) -> dict[str, float]:
    """Returns means and standard errors of the indices over matrices (runs, d, d)."""
    result = {}
    for name, function in (("asymmetry", asymmetry), ("off_diagonal_asymmetry", off_diagonal_asymmetry)):
        values = function(matrices)
        result[name] = float(values.mean())
        result[f"{name}_standard_error"] = float(values.std() / len(values) ** 0.5)
    return result | {"least_eigenvalue": float(least_eigenvalue(matrices).min())}


def gaussian_map(distribution: Distribution, start: torch.Tensor, schedule: Schedule) -> torch.Tensor | None:
    """Returns the optimal map between the noised Gaussians at the schedule's ends; None for more than one mode."""
    if not isinstance(distribution, GaussianMixture) or len(distribution.weights) != 1:
        return None
    mean = distribution.means[0].flatten()
    values, vectors = torch.linalg.eigh(distribution.covariance.dense()[0])
    ends = [schedule.level(t) for t in (schedule.data_time, schedule.noise_time)]
    low, high = (level.noise_to_signal**2 for level in ends)
    factor = vectors @ torch.diag(((values + low) / (values + high)).sqrt()) @ vectors.mT
    return ((start.flatten(1) - mean) @ factor + mean).view_as(start)


def coupling(case: Case, schedule: Schedule, count: int, seed: int) -> dict[str, Any]:
    """Compares the cost of the ODE's pairs with the exact plan, from the true marginal at the noise end."""
    generator = torch.Generator().manual_seed(seed)
    noise_to_signal = schedule.level(schedule.noise_time).noise_to_signal
    clean = case.distribution.sample(count, generator)
    start = clean + noise_to_signal * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    # Only the end points are needed, so one direction is enough for the Jacobian.
    result = transport_map(exact_field(case.distribution), start, schedule, directions=torch.ones_like(start)[None])
    cost = coupling_cost(result.start, result.end)
    return {"case": case.name, "schedule": schedule.name, "points": count} | dataclasses.asdict(cost)


def indices_by_steps(case: Case, schedule: Schedule, runs: int, seed: int) -> list[dict[str, Any]]:
    """Returns the indices for coarse integrations, which shows how much of them is integration error."""
    generator = torch.Generator().manual_seed(seed)
    level = schedule.level(schedule.noise_time)
    noise = torch.randn(runs, *case.distribution.shape, generator=generator, dtype=torch.float64)
    start = noise * level.noise_to_signal
    rows = []
    for steps in STEP_COUNTS:
        result = transport_map(exact_field(case.distribution), start, schedule, FixedSteps(steps, order=2))
        rows.append({"case": case.name, "schedule": schedule.name, "steps": steps} | indices(result.jacobian))
    return rows


# `pipe` is Any, because diffusers declares no types for the components of a pipeline.
def learned_map(seed: int, count: int = 4, steps: int = 12, pipe: Any = None) -> dict[str, Any]:
    """Computes the same indices for the embedded checkpoint's map from noise to latents, in 256 dimensions.

    The Jacobian of a score is symmetric, but the network's is not. Its asymmetry is reported separately, and the map
    is integrated a second time with the symmetric part of the Jacobians alone. The trajectories are the same, so the
    Jacobians are used again.

    Cost: 14 `steps` evaluations of the denoiser on `count` samples, and 256 vector-Jacobian products at half of them;
    minutes on two cores.

    Args:
        seed: seed of the noise.
        count: number of samples.
        steps: number of steps.
        pipe: the pipeline; None: that of the embedded checkpoint.
    """
    begin = time.perf_counter()
    if pipe is None:
        from ..pipelines import StableDiffusionFisherPipeline

        pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    prompts = [embedded_prompt(index % len(EMBEDDED_CLASSES)) for index in range(count)]
    denoiser = PipelineDenoiser(pipe, prompt=prompts)
    schedule = model_schedule(denoiser)
    shape = (pipe.unet.config.in_channels, *[pipe.unet.config.sample_size] * 2)
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = schedule.level(schedule.noise_time).noise_to_signal * noise
    matrices: list[torch.Tensor] = []
    integration = FixedSteps(steps)
    evaluations = integration.order * (steps + integration.coarsen().num_steps)

    with tqdm(total=evaluations, desc="Jacobians of the checkpoint") as progress:

        def measure(state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
            matrices.append(AutodiffFisher(denoiser, chunk_size=64)(state).dense().mT)
            progress.update()
            return MatrixOperator(state, matrices[-1])

        result = transport_map(denoiser_field(denoiser, measure), start, schedule, integration)
    remaining_matrices = iter(matrices)

    def symmetrise(state: DenoisingState, endpoint: torch.Tensor | None = None) -> FisherOperator:
        matrix = next(remaining_matrices)
        return MatrixOperator(state, (matrix + matrix.mT) / 2)

    symmetric_result = transport_map(denoiser_field(denoiser, symmetrise), start, schedule, integration)
    step_matrices = matrices[: integration.order * steps : integration.order]  # the first evaluation of each step
    return {
        "samples": count, "steps": steps, "order": integration.order,
        "noise_to_signal": result.noise_to_signal.tolist(),
        "fisher_asymmetry_by_level": [float(asymmetry(matrix).mean()) for matrix in step_matrices],
        "map": indices(result.jacobian), "map_asymmetry_by_level": asymmetry(result.jacobians).mean(1).tolist(),
        "integration_error": result.error, "map_of_symmetrised_jacobians": indices(symmetric_result.jacobian),
        "symmetrised_asymmetry_by_level": asymmetry(symmetric_result.jacobians).mean(1).tolist(),
        "integration_error_symmetrised": symmetric_result.error, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


class MatrixOperator(FisherMatrixOperator):
    """Represents F by one matrix per sample, (B, d, d)."""

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
    """Runs the study, prints its table and writes table.txt, transport.json and plots into `output`.

    Args:
        output: folder of the results.
        runs: number of random start points per case.
        points: points (N, d) to study instead of the cases of the study; None: all cases.
        learned: whether to study the embedded checkpoint's map too, see `learned_map`.
        seed: seed of the start points.

    Raises:
        InputError: there are fewer than two points or runs, or the folder can't be written.
        UnsupportedError: the extra `transport` isn't installed.
    """
    if runs < 2:
        raise InputError(
            f"`runs` is {runs}; allowed: at least 2, and 300 for a standard error like the paper's figures."
        )
    cases = two_dimensional_cases() if points is None else [user_case(points)]
    for name in ("torchdiffeq", "ot"):
        import_extra(name)
    check_writable(output)
    begin = time.perf_counter()
    rows, paths = [], {}
    print(HEADING)
    for case in cases:
        for schedule in SCHEDULES.values():
            is_plotted = schedule.name == PLOT_SCHEDULE and case.distribution.shape == (2,)
            row, result = study(case, schedule, runs, seed, PLOT_POINTS if is_plotted else 2)
            if is_plotted:
                paths[case.name] = result.trajectory[:, :PLOT_TRAJECTORIES].clone()
            rows.append(row)
            print(_line(row), flush=True)
    higher = higher_dimensional_cases() if points is None else []
    for case in higher:
        row, _ = study(case, SCHEDULES["vp"], max(2, runs // 10), seed)
        rows.append(row)
        print(_line(row), flush=True)
    lines = ("line along an axis", "line in general position")  # left out: the rectangle's plan shows the same
    plot_cases = [case for case in cases if case.name not in lines]
    report: dict[str, Any] = {
        "maps": rows,
        "couplings": [coupling(case, SCHEDULES["edm"], 1024, seed) for case in plot_cases + higher],
        "by_steps": [
            row
            for case in plot_cases[:1]
            for name in SCHEDULES
            for row in indices_by_steps(case, SCHEDULES[name], 60, seed)
        ],
    }
    for row in report["couplings"]:
        print(
            f"coupling, {row['case']}: {row['pairs']:.6f} per pair, optimal {row['optimal']:.6f}, "
            f"gap {row['gap']:.2e} ± {row['standard_error']:.1e}"
        )
    _plots(output, report, paths)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    with atomic_path(output / "table.txt") as temporary:
        temporary.write_text("\n".join([HEADING, *map(_line, rows)]) + "\n", encoding="utf-8")
    write_json(output / "transport.json", report)  # written before the long computation of the learned map
    if learned:
        report["learned"] = learned_map(seed)
        report_learned(output, report["learned"])
        write_json(output / "transport.json", report)
    print(f"Table, plots and transport.json are in {output.resolve()} ({time.perf_counter() - begin:.0f} s).")
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


def _plots(output: Path, report: dict[str, Any], paths: dict[str, torch.Tensor]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name in SCHEDULES:
        rows = [row for row in report["by_steps"] if row["schedule"] == name]
        steps, values = [row["steps"] for row in rows], [row["off_diagonal_asymmetry"] for row in rows]
        errors = [row["off_diagonal_asymmetry_standard_error"] for row in rows]
        axes.errorbar(steps, values, errors, marker=".", capsize=2, label=name)
    axes.set(xscale="log", xlabel="steps of the midpoint rule", ylabel="off-diagonal asymmetry")
    axes.set_title(
        f"{report['by_steps'][0]['case']}: what is left of the schedules' differences when integrated finely"
    )
    axes.legend()
    save_figure(figure, output / "index_by_steps.png")
    if not paths:
        return
    asymmetries = {row["case"]: row["asymmetry"] for row in report["maps"] if row["schedule"] == PLOT_SCHEDULE}
    figure = Figure(figsize=(4 * len(paths), 4), layout="constrained")
    for axes, (name, path) in zip(figure.subplots(1, len(paths), squeeze=False)[0], paths.items(), strict=True):
        _draw_paths(axes, path)
        axes.set_title(f"{name}\nasymmetry {asymmetries[name]:.1e}")
    figure.axes[0].set_ylabel(f"{PLOT_SCHEDULE}: noise to data")
    save_figure(figure, output / "maps.png")


def _draw_paths(axes: Axes, path: torch.Tensor) -> None:
    """Draws trajectories (T, N, 2) from noise to data."""
    for index in range(path.shape[1]):
        axes.plot(*path[:, index].T, linewidth=0.6, alpha=0.6, color="tab:blue")
    axes.scatter(path[0, :, 0], path[0, :, 1], s=6, color="tab:gray", label="noise")
    axes.scatter(path[-1, :, 0], path[-1, :, 1], s=14, color="tab:red", label="data")
    axes.set_aspect("equal")
    axes.legend(fontsize=7)


def report_learned(output: Path, result: dict[str, Any]) -> None:
    """Prints the result of `learned_map`, and draws it by noise level in the file learned.png in `output`."""
    from matplotlib.figure import Figure

    fisher = result["fisher_asymmetry_by_level"]
    print(
        f"embedded checkpoint, {result['samples']} samples: asymmetry of the map {result['map']['asymmetry']:.4f}, of "
        f"the network's Fisher {min(fisher):.4f} to {max(fisher):.4f}, of the map with symmetric Jacobians "
        f"{result['map_of_symmetrised_jacobians']['asymmetry']:.4f}"
    )
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    levels = result["noise_to_signal"]
    axes.plot(levels[:-1], fisher, label="the network's Fisher at this level")
    axes.plot(levels[1:], result["map_asymmetry_by_level"][1:], label="the map from noise to this level")
    axes.plot(levels[1:], result["symmetrised_asymmetry_by_level"][1:], "--", label="the same, symmetric Jacobians")
    axes.set(xscale="log", yscale="log", xlabel="noise to signal", ylabel="asymmetry")
    axes.invert_xaxis()
    axes.legend()
    save_figure(figure, output / "learned.png")
