"""Runs the study of `diffusers-fisher transport`: where the map of the PF-ODE is an optimal transport map."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas
import torch
from tqdm.auto import tqdm

from ..backbones import PipelineDenoiser
from ..checkpoints import EMBEDDED_CLASSES, embedded_checkpoint, embedded_prompt
from ..console import say
from ..distributions import Covariance, Distribution, GaussianMixture
from ..errors import InputError
from ..figures import make_figure
from ..files import check_writable, save_figure, write_json, write_text
from ..fisher import AutodiffFisher, FisherEstimator, FisherMatrixOperator
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
    from ..pipelines import StableDiffusionFisherPipeline

TRIANGLE = ((0.5, 0.0), (0.0, -0.5), (0.0, 0.0))  # the paper's points
AXIS_LINE = ((0.0, 0.0), (0.0, 0.5), (0.0, -0.6))  # the paper's points on a line
STEP_COUNTS = (5, 10, 20, 40, 80, 160)
PLOT_SCHEDULE, PLOT_TRAJECTORIES, PLOT_POINTS = "edm", 60, 60  # schedule, trajectories, points of each
HEADING = f"{'case':<28}{'schedule':<15}{'asymmetry':>22}{'off-diagonal index':>22}{'least eig.':>12}{'error':>10}"


@dataclasses.dataclass(frozen=True)
class Case:
    """Holds a distribution, and whether theory says that its map is optimal (None: theory says nothing)."""

    name: str
    distribution: Distribution
    optimal: bool | None


def few_points(points: torch.Tensor) -> GaussianMixture:
    """Returns points (N, d) as modes without variance: faster than `DiracMixture`, which serves many points."""
    return GaussianMixture(points, Covariance.isotropic(0.0, tuple(points.shape[1:])))


def _gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> GaussianMixture:
    return GaussianMixture(mean[None], Covariance.full(covariance[None], tuple(mean.shape)))


def two_dimensional_cases() -> list[Case]:
    """Returns the paper's two point sets, and controls whose maps are known to be optimal or known not to be."""
    cosine, sine = math.cos(0.4), math.sin(0.4)
    rotation = torch.tensor([[cosine, -sine], [sine, cosine]], dtype=torch.float64)
    corners = torch.tensor([[x, y] for x in (-0.5, 0.5) for y in (-0.3, 0.3)], dtype=torch.float64)
    line = torch.tensor([[0.1], [0.6], [-0.5]], dtype=torch.float64) * torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    mean = torch.tensor([0.3, -0.2], dtype=torch.float64)
    covariance = rotation @ torch.diag(torch.tensor([0.4, 0.05], dtype=torch.float64)) @ rotation.mT
    triangle = torch.tensor(TRIANGLE, dtype=torch.float64)
    return [
        Case("triangle", few_points(triangle), False),
        Case("line along an axis", few_points(torch.tensor(AXIS_LINE, dtype=torch.float64)), True),
        Case("line in general position", few_points(line + 0.2), True),
        Case("rotated rectangle", few_points(corners @ rotation.mT), True),
        Case("Gaussian", _gaussian(mean, covariance), True),
        Case("three Gaussians", GaussianMixture(triangle, Covariance.isotropic(0.01, (2,))), False),
    ]


def higher_dimensional_cases(dimensions: int = 16) -> list[Case]:
    """Returns points in general position, points on a line, and a Gaussian, in more than two dimensions."""
    generator = torch.Generator().manual_seed(1)
    points = 0.5 * torch.randn(8, dimensions, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(points[:1], dim=1)
    line = torch.randn(8, 1, generator=generator, dtype=torch.float64) * direction
    factor = torch.randn(dimensions, dimensions, generator=generator, dtype=torch.float64) / dimensions**0.5
    covariance = factor @ factor.mT + 0.01 * torch.eye(dimensions, dtype=torch.float64)
    return [
        Case(f"8 points in {dimensions}-d", few_points(points), False),
        Case(f"8 points on a line in {dimensions}-d", few_points(line + 0.1), True),
        Case(f"Gaussian in {dimensions}-d", _gaussian(points[0], covariance), True),
    ]


def parse_points(text: str | None) -> torch.Tensor | None:
    """Reads points written as "x,y; x,y; ..." and returns them (N, d) float64; returns None for None.

    Raises:
        InputError: the text is not of that form.
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


def pure_noise(schedule: Schedule, shape: Sequence[int], count: int, seed: int) -> torch.Tensor:
    """Returns points (count, *shape) at the noise end, in units of the data: pure noise, as a sampler starts (and as
    the paper's experiment does), not the noised data."""
    noise = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return schedule.level(schedule.noise_time).noise_to_signal * noise


def study(
    case: Case, schedule: Schedule, runs: int, seed: int, num_points: int = 2
) -> tuple[dict[str, Any], TransportMap]:
    """Returns indices of the map at `runs` random points of the noise end with their standard errors, and the map."""
    start = pure_noise(schedule, case.distribution.shape, runs, seed)
    flow = transport_map(exact_field(case.distribution), start, schedule, num_points=num_points)
    row: dict[str, Any] = {"case": case.name, "schedule": schedule.name, "optimal": case.optimal, "runs": runs}
    row |= indices(flow.jacobian) | {"integration_error": flow.error}
    closed_form = gaussian_map(case.distribution, start, schedule)
    if closed_form is not None:
        row["distance_to_closed_form"] = float((closed_form - flow.end).abs().max())
    return row, flow


def indices(matrices: torch.Tensor) -> dict[str, float]:
    """Returns means and standard errors of the indices over matrices (runs, d, d)."""
    result = {}
    for name, function in (("asymmetry", asymmetry), ("off_diagonal_asymmetry", off_diagonal_asymmetry)):
        values = function(matrices)
        result[name] = float(values.mean())
        result[f"{name}_standard_error"] = float(values.std() / len(values) ** 0.5)
    return result | {"least_eigenvalue": float(least_eigenvalue(matrices).min())}


def gaussian_map(distribution: Distribution, start: torch.Tensor, schedule: Schedule) -> torch.Tensor | None:
    """Applies the optimal map between the noised Gaussians at the schedule's ends to points `start` (N, ...); returns
    None where the distribution has more than one mode."""
    if not isinstance(distribution, GaussianMixture) or len(distribution.weights) != 1:
        return None
    mean = distribution.means[0].flatten()
    values, vectors = torch.linalg.eigh(distribution.covariance.dense()[0])
    low, high = (schedule.level(time).noise_to_signal ** 2 for time in (schedule.data_time, schedule.noise_time))
    factor = vectors @ torch.diag(((values + low) / (values + high)).sqrt()) @ vectors.mT
    return ((start.flatten(1) - mean) @ factor + mean).view_as(start)


def coupling(case: Case, schedule: Schedule, count: int, seed: int) -> dict[str, Any]:
    """Compares the cost of the ODE's pairs with that of the exact plan, from the true marginal at the noise end."""
    generator = torch.Generator().manual_seed(seed)
    noise_to_signal = schedule.level(schedule.noise_time).noise_to_signal
    clean = case.distribution.sample(count, generator)
    start = clean + noise_to_signal * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    # Only the end points are needed: one direction stands for the Jacobian.
    flow = transport_map(exact_field(case.distribution), start, schedule, directions=torch.ones_like(start)[None])
    cost = dataclasses.asdict(coupling_cost(start, flow.end))
    return {"case": case.name, "schedule": schedule.name, "points": count, **cost}


def indices_by_steps(case: Case, schedule: Schedule, runs: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yields the indices by number of steps, which show how much of an index is the integrator's error."""
    start = pure_noise(schedule, case.distribution.shape, runs, seed)
    for steps in STEP_COUNTS:
        flow = transport_map(exact_field(case.distribution), start, schedule, FixedSteps(steps, order=2))
        yield {"case": case.name, "schedule": schedule.name, "steps": steps} | indices(flow.jacobian)


def learned_map(
    seed: int, count: int = 4, steps: int = 12, pipe: "StableDiffusionFisherPipeline | None" = None
) -> dict[str, Any]:
    """Returns the same indices for the embedded checkpoint's own map, in 256 dimensions, from noise to latents.

    The Jacobian of a score is symmetric, but the Jacobian of the network is not. The report has its asymmetry, and the
    map is computed once more with symmetrised Jacobians. The trajectories are the same, so the Jacobians are used
    again.

    Cost: 14 `steps` evaluations of the denoiser on `count` samples, and 256 vector-Jacobian products at half of them;
    minutes on two cores.

    Args:
        seed: seed of the noise.
        count: number of samples.
        steps: number of steps of the Runge-Kutta rule.
        pipe: pipeline to study; None: that of the embedded checkpoint.
    """
    begin = time.perf_counter()
    if pipe is None:
        from ..pipelines import StableDiffusionFisherPipeline

        pipe = StableDiffusionFisherPipeline.from_pretrained(embedded_checkpoint())
    prompts = [embedded_prompt(index % len(EMBEDDED_CLASSES)) for index in range(count)]
    denoiser = PipelineDenoiser(pipe, prompt=prompts)
    schedule = model_schedule(denoiser)
    backbone = denoiser.backbone
    shape = (backbone.latent_channels, *(side // backbone.factor for side in backbone.image_size()))
    start = pure_noise(schedule, shape, count, seed)
    matrices: list[torch.Tensor] = []
    integration = FixedSteps(steps)
    evaluations = integration.order * (steps + integration.coarsen().num_steps)

    with tqdm(total=evaluations, desc="Jacobians of the checkpoint") as progress:

        def jacobian_matrix(state: DenoisingState) -> torch.Tensor:
            matrices.append(AutodiffFisher(denoiser, chunk_size=64)(state).dense().mT)
            progress.update()
            return matrices[-1]

        flow = transport_map(denoiser_field(denoiser, MatrixFisher(jacobian_matrix)), start, schedule, integration)
    symmetrised = ((matrix + matrix.mT) / 2 for matrix in matrices)
    in_order = MatrixFisher(lambda state: next(symmetrised))
    symmetric_flow = transport_map(denoiser_field(denoiser, in_order), start, schedule, integration)
    first = matrices[: integration.order * steps : integration.order]  # of each step's evaluations
    return {
        "samples": count, "steps": steps, "order": integration.order,
        "noise_to_signal": flow.noise_to_signal.tolist(),
        "fisher_asymmetry_by_level": [float(asymmetry(matrix).mean()) for matrix in first],
        "map": indices(flow.jacobian), "map_asymmetry_by_level": asymmetry(flow.jacobians).mean(1).tolist(),
        "integration_error": flow.error, "map_of_symmetrised_jacobians": indices(symmetric_flow.jacobian),
        "symmetrised_asymmetry_by_level": asymmetry(symmetric_flow.jacobians).mean(1).tolist(),
        "integration_error_symmetrised": symmetric_flow.error, "seconds": round(time.perf_counter() - begin, 1),
    }  # fmt: skip


class MatrixOperator(FisherMatrixOperator):
    """Represents F by one matrix per sample (B, d, d)."""

    def __init__(self, state: DenoisingState, matrix: torch.Tensor):
        super().__init__(state)
        self.matrix = matrix

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bde,be->bd", self.matrix, v.flatten(1)).view_as(v)

    def dense(self) -> torch.Tensor:
        return self.matrix


class MatrixFisher(FisherEstimator):
    """Takes the Fisher's matrices (B, d, d) from a function of the state."""

    def __init__(self, matrices: Callable[[DenoisingState], torch.Tensor]):
        self.matrices = matrices

    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> MatrixOperator:
        return MatrixOperator(state, self.matrices(state))


def run_study(
    output: Path, runs: int = 300, points: torch.Tensor | None = None, learned: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Runs the two-dimensional study, or a study of a user's points alone; prints its table and writes its files.

    Args:
        output: folder of table.txt, transport.json and the plots.
        runs: number of random points of the noise end per case and schedule.
        points: the user's points (N, d); None: the study's own cases.
        learned: whether the embedded checkpoint's map is studied too, see `learned_map`.
        seed: seed of all draws.

    Returns:
        The content of transport.json.

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
    say(HEADING)
    higher = higher_dimensional_cases() if points is None else []
    studies = [(case, schedule, runs) for case in cases for schedule in SCHEDULES.values()]
    studies += [(case, SCHEDULES["vp"], max(2, runs // 10)) for case in higher]
    for case, schedule, count in studies:
        has_picture = schedule.name == PLOT_SCHEDULE and case.distribution.shape == (2,)
        row, flow = study(case, schedule, count, seed, PLOT_POINTS if has_picture else 2)
        if has_picture:
            paths[case.name] = flow.trajectory[:, :PLOT_TRAJECTORIES].clone()
        rows.append(row)
        say(_format_row(row))
    lines = ("line along an axis", "line in general position")  # the plan of the rectangle shows as much
    coupling_cases = [case for case in cases + higher if case.name not in lines]
    couplings = [coupling(case, SCHEDULES["edm"], 1024, seed) for case in coupling_cases]
    by_steps = [row for schedule in SCHEDULES.values() for row in indices_by_steps(cases[0], schedule, 60, seed)]
    report: dict[str, Any] = {"maps": rows, "couplings": couplings, "by_steps": by_steps}
    for row in couplings:
        say(
            f"coupling, {row['case']}: {row['pairs']:.6f} per pair, optimal {row['optimal']:.6f}, "
            f"gap {row['gap']:.2e} ± {row['standard_error']:.1e}"
        )
    _draw_plots(output, report, paths)
    report["seconds"] = round(time.perf_counter() - begin, 1)
    write_text(output / "table.txt", "\n".join([HEADING, *map(_format_row, rows)]) + "\n")
    write_json(output / "transport.json", report)  # before the checkpoint's map, which takes minutes
    if learned:
        report["learned"] = learned_map(seed)
        report_learned(output, report["learned"])
        write_json(output / "transport.json", report)
    say(f"Table, plots and transport.json are in {output.resolve()} ({time.perf_counter() - begin:.0f} s).")
    return report


def _format_row(row: dict[str, Any]) -> str:
    first = f"{row['asymmetry']:.2e} ± {row['asymmetry_standard_error']:.0e}"
    second = f"{row['off_diagonal_asymmetry']:.3f} ± {row['off_diagonal_asymmetry_standard_error']:.3f}"
    return (
        f"{row['case']:<28}{row['schedule']:<15}{first:>22}{second:>22}{row['least_eigenvalue']:>12.1e}"
        f"{row['integration_error']:>10.0e}"
    )


def _draw_plots(output: Path, report: dict[str, Any], paths: dict[str, torch.Tensor]) -> None:
    figure, (axes,) = make_figure(7, 4)
    index = "off_diagonal_asymmetry"
    for name, rows in pandas.DataFrame(report["by_steps"]).groupby("schedule", sort=False):
        axes.errorbar(rows["steps"], rows[index], rows[f"{index}_standard_error"], marker=".", capsize=2, label=name)
    axes.set(xscale="log", xlabel="steps of the midpoint rule", ylabel="off-diagonal asymmetry")
    axes.set_title(
        f"{report['by_steps'][0]['case']}: what is left of the schedules' differences when integrated finely"
    )
    axes.legend()
    save_figure(figure, output / "index_by_steps.png")
    if not paths:
        return
    indices_by_case = {row["case"]: row["asymmetry"] for row in report["maps"] if row["schedule"] == PLOT_SCHEDULE}
    figure, row = make_figure(4 * len(paths), 4, columns=len(paths))
    for axes, (name, path) in zip(row, paths.items(), strict=True):
        axes.plot(path[..., 0], path[..., 1], linewidth=0.6, alpha=0.6, color="tab:blue")
        for points, size, color, label in ((path[0], 6, "tab:gray", "noise"), (path[-1], 14, "tab:red", "data")):
            axes.scatter(points[:, 0], points[:, 1], s=size, color=color, label=label)
        axes.set(aspect="equal", title=f"{name}\nasymmetry {indices_by_case[name]:.1e}")
        axes.legend(fontsize=7)
    row[0].set_ylabel(f"{PLOT_SCHEDULE}: noise to data")
    save_figure(figure, output / "maps.png")


def report_learned(output: Path, report: dict[str, Any]) -> None:
    """Prints the report of `learned_map`, and draws it by noise level in the file learned.png of `output`."""
    values = report["fisher_asymmetry_by_level"]
    say(
        f"embedded checkpoint, {report['samples']} samples: asymmetry of the map {report['map']['asymmetry']:.4f}, of "
        f"the network's own Fisher {min(values):.4f} to {max(values):.4f}; of the map with symmetrised Jacobians "
        f"{report['map_of_symmetrised_jacobians']['asymmetry']:.4f}"
    )
    figure, (axes,) = make_figure(7, 4)
    levels = report["noise_to_signal"]
    axes.plot(levels[:-1], values, label="the network's own Fisher at this level")
    axes.plot(levels[1:], report["map_asymmetry_by_level"][1:], label="the map from noise to this level")
    axes.plot(levels[1:], report["symmetrised_asymmetry_by_level"][1:], "--", label="the same, Jacobians symmetrised")
    axes.set(xscale="log", yscale="log", xlabel="noise to signal", ylabel="asymmetry")
    axes.invert_xaxis()
    axes.legend()
    save_figure(figure, output / "learned.png")
