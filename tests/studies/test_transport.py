"""The PF-ODE's map and its Jacobian: closed forms, schedules that are one ODE, indices, couplings."""

import json
import math
import sys
from pathlib import Path

import document_figures
import pytest
import tiny
import torch
from cases import relative
from PIL import Image
from typer.testing import CliRunner

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DiracMixture,
    FiniteDifferenceFisher,
    GaussianMixture,
    InputError,
    PipelineDenoiser,
    UnsupportedError,
)
from diffusers_fisher.cli import app
from diffusers_fisher.studies.transport import (
    SCHEDULES,
    AdaptiveSteps,
    FixedSteps,
    Schedule,
    asymmetry,
    coupling_cost,
    denoiser_field,
    exact_field,
    least_eigenvalue,
    model_schedule,
    off_diagonal_asymmetry,
    transport_map,
)
from diffusers_fisher.studies.transport_study import (
    MatrixFisher,
    gaussian_map,
    learned_map,
    parse_points,
    report_learned,
    run_study,
    two_dimensional_cases,
)
from diffusers_fisher.testing import MixtureOracle, OracleDenoiser

QUICK = AdaptiveSteps(1e-7)
CASES = {case.name: case for case in two_dimensional_cases()}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrate(case, schedule, count=6, integration=QUICK, **options):
    level = schedule.level(schedule.noise_time)
    start = normal(count, *CASES[case].distribution.shape) * level.norm / level.alpha
    return transport_map(exact_field(CASES[case].distribution), start, schedule, integration, **options)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("case", [case.name for case in CASES.values() if case.optimal])
def test_lines_rectangles_and_gaussians_have_symmetric_positive_jacobians(case, schedule):
    result = integrate(case, schedule)
    assert float(asymmetry(result.jacobian).max()) < 1e-6
    assert float(off_diagonal_asymmetry(result.jacobian).max()) < 1e-6
    assert float(least_eigenvalue(result.jacobian).min()) > 0
    assert (
        result.error < 1e-3
    )  # error of a coarser integration; the asymmetry has no such error, because every step is symmetric


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda schedule: schedule.name)
@pytest.mark.parametrize("case", ["triangle", "three Gaussians"])
def test_triangles_have_asymmetric_jacobians(case, schedule):
    result = integrate(case, schedule, count=40)
    assert (
        float(asymmetry(result.jacobian).mean()) > 0.005
    )  # forty starts; three hundred starts of the study give 0.018
    assert float(off_diagonal_asymmetry(result.jacobian).mean()) > 0.1
    assert result.error < 1e-3


def test_rates_are_those_by_hand():
    time = torch.tensor(0.3, dtype=torch.float64)
    beta = 1000 * (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * time) ** 2
    alpha, sigma = SCHEDULES["vp"].alpha(time), SCHEDULES["vp"].sigma(time)
    expected = {
        "vp": (-beta / 2, beta / (2 * sigma)),  # because d log(alpha)/dt = -beta/2 and alpha^2 + sigma^2 = 1
        "sub-vp": (-beta / 2, beta * alpha**2 + (1 - alpha**2) * beta / 2),
        "ve": (0, 0.5 / time.sqrt()),
        "edm": (0, 1),
        "flow-matching": (-1 / (1 - time), 1 + time / (1 - time)),
    }
    for name, pair in expected.items():
        with torch.inference_mode():  # autograd is off here, and would give zeros
            rates = SCHEDULES[name].rates(time)
        assert [float(value) for value in rates] == pytest.approx([float(value) for value in pair], rel=1e-12)


def test_jacobian_is_the_derivative_of_the_map():
    schedule, step = SCHEDULES["edm"], 1e-3
    field, start = exact_field(CASES["three Gaussians"].distribution), normal(3, 2)
    jacobian = transport_map(field, start, schedule).jacobian
    for index in range(2):
        offset = step * torch.eye(2, dtype=torch.float64)[index]
        forward, backward = (transport_map(field, start + sign * offset, schedule).end for sign in (1, -1))
        # Central differences: h^2 of truncation where modes are 0.1 wide, and the integrator's own error over h.
        assert relative((forward - backward) / (2 * step), jacobian[..., index]) < 2e-3


@pytest.mark.parametrize("names", [("vp", "sub-vp"), ("ve", "edm")])
def test_schedules_are_the_same_ode_between_the_same_levels(names):
    pair, low, high = [SCHEDULES[name] for name in names], 0.05, 0.9

    def with_ends(schedule):
        times = torch.linspace(schedule.data_time, schedule.noise_time, 20001, dtype=torch.float64)
        ratios = schedule.level(times).noise_to_signal
        ends = [float(times[(ratios - value).abs().argmin()]) for value in (low, high)]
        exact = []
        for value, time in zip((low, high), ends, strict=True):  # Newton steps from the grid's answer
            for _ in range(4):
                ratio = schedule.level(time).noise_to_signal
                slope = (schedule.level(time + 1e-6).noise_to_signal - ratio) / 1e-6
                time = float(time + (value - ratio) / slope)
            exact.append(time)
        return Schedule(schedule.name, schedule.alpha, schedule.sigma, *exact)

    start = normal(5, 2)
    maps = [
        transport_map(exact_field(CASES["triangle"].distribution), start, with_ends(schedule_of_pair))
        for schedule_of_pair in pair
    ]
    assert (
        relative(maps[0].end, maps[1].end) < 1e-6
    )  # the levels at the ends are exact to 1e-9; near points an error grows
    assert relative(maps[0].jacobian, maps[1].jacobian) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=lambda schedule: schedule.name)
def test_gaussian_map_is_the_optimal_one_pointwise(schedule):
    case = CASES["Gaussian"]
    result = integrate("Gaussian", schedule, integration=AdaptiveSteps())
    optimal = gaussian_map(case.distribution, result.start, schedule)
    assert float((optimal - result.end).abs().max()) < 1e-6
    assert gaussian_map(CASES["triangle"].distribution, result.start, schedule) is None


def test_adaptive_steps_end_at_the_end():
    """The last step lands at the end. An interpolation from a step beyond the end would have a larger error."""
    for name in ("triangle", "rotated rectangle"):
        exact, result = (
            integrate(name, SCHEDULES["sub-vp"], 20, AdaptiveSteps(tolerance)) for tolerance in (1e-11, 1e-8)
        )
        assert float((exact.end - result.end).abs().max()) < 1e-8
        assert (
            relative(result.jacobian, exact.jacobian) < result.error < 1e-4
        )  # the reported error is that of a tolerance ten times as large


@pytest.mark.parametrize(("order", "steps"), [(2, (80, 160)), (4, (40, 80))])
def test_fixed_steps_converge_at_their_order(order, steps):
    schedule = SCHEDULES["edm"]
    exact = integrate("three Gaussians", schedule).jacobian
    errors = [
        relative(integrate("three Gaussians", schedule, integration=FixedSteps(n, order)).jacobian, exact)
        for n in steps
    ]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    result = integrate("three Gaussians", schedule, integration=FixedSteps(steps[0], order))
    assert result.trajectory.shape == (steps[0] + 1, 6, 2)
    assert errors[0] < result.error  # the reported error is that of the worst sample, against fewer steps


def test_directions_give_the_products_alone():
    schedule, start = SCHEDULES["vp"], 10 * normal(4, 2)
    field, directions = exact_field(CASES["triangle"].distribution), normal(1, 4, 2, seed=3)
    full_map = transport_map(field, start, schedule)
    products = transport_map(field, start, schedule, directions=directions)
    assert products.jacobian.shape == (4, 2, 1)
    expected = torch.einsum("bde,be->bd", full_map.jacobian, directions[0])
    assert relative(products.jacobian[..., 0], expected) < 10 * (
        full_map.error + products.error
    )  # each integration takes its own steps


def test_learned_denoisers_take_every_estimator_in_the_models_own_coordinates():
    """An oracle as network, with a scheduler's timesteps and levels, has the same map as the closed form."""
    oracle = MixtureOracle(0.4 * normal(3, 1, 2, 2), 0.05 * torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    mixture = GaussianMixture(oracle.means.view(3, 1, 2, 2), Covariance.isotropic(0.05, (1, 2, 2)))
    denoiser = OracleDenoiser(oracle, tiny.scheduler())
    schedule, steps = model_schedule(denoiser), FixedSteps(24)
    start = normal(3, 1, 2, 2) * float(schedule.level(schedule.noise_time).noise_to_signal)
    exact = transport_map(exact_field(mixture), start, schedule, steps)
    for estimator in (AutodiffFisher(denoiser), AutodiffFisher(denoiser, forward_mode=True)):
        result = transport_map(denoiser_field(denoiser, estimator), start, schedule, steps)
        assert relative(result.end, exact.end) < 1e-4  # float32, and levels interpolated between timesteps
        assert relative(result.jacobian, exact.jacobian) < 1e-3
    products = transport_map(
        denoiser_field(denoiser, FiniteDifferenceFisher(denoiser, central=True)), start, schedule, steps
    )
    assert relative(products.jacobian, exact.jacobian) < 0.05  # differences of float32 outputs


def test_products_with_directions_are_not_transposed_for_a_pipeline():
    pipe = tiny.stable_diffusion(unet=tiny.unet(sample_size=4))
    denoiser = PipelineDenoiser(pipe, prompt="a b")
    schedule = model_schedule(denoiser)
    start = normal(1, 4, 4, 4)
    field = denoiser_field(denoiser, AutodiffFisher(denoiser, chunk_size=64))
    full_map = transport_map(field, start, schedule, FixedSteps(3))
    products = transport_map(field, start, schedule, FixedSteps(3), directions=normal(2, 1, 4, 4, 4, seed=2))
    expected = torch.einsum("bde,kbe->bdk", full_map.jacobian, normal(2, 1, 4, 4, 4, seed=2).flatten(2))
    assert relative(products.jacobian, expected) < 1e-3  # float32 products of an untrained network, in another order
    assert float(asymmetry(full_map.jacobian)) > 1e-3  # the output of a network is not a gradient


def test_learned_study_has_the_map_by_own_and_by_symmetrised_jacobians(tmp_path, capsys):
    pipe = tiny.stable_diffusion(unet=tiny.unet(sample_size=4))
    study = learned_map(0, count=2, steps=2, pipe=pipe)
    denoiser = PipelineDenoiser(pipe, prompt=["a photo of a t-shirt", "a photo of a trouser"])
    schedule, integration = model_schedule(denoiser), FixedSteps(2)
    start = schedule.level(schedule.noise_time).noise_to_signal * normal(2, 4, 4, 4)
    estimator = AutodiffFisher(denoiser, chunk_size=64)

    def symmetrised(state):
        matrix = estimator(state).dense()  # computed anew at every state, while the study keeps the matrices
        return (matrix + matrix.mT) / 2

    for key, fisher in (("map", estimator), ("map_of_symmetrised_jacobians", MatrixFisher(symmetrised))):
        expected = transport_map(denoiser_field(denoiser, fisher), start, schedule, integration)
        # Float32 products in other orders.
        assert study[key]["asymmetry"] == pytest.approx(float(asymmetry(expected.jacobian).mean()), rel=1e-3)
    assert study["map_of_symmetrised_jacobians"]["asymmetry"] < study["map"]["asymmetry"]
    assert study["fisher_asymmetry_by_level"][0] > 1e-4
    assert len(study["noise_to_signal"]) == len(study["map_asymmetry_by_level"]) == 3
    assert study["map_asymmetry_by_level"][-1] == pytest.approx(study["map"]["asymmetry"], rel=1e-12)
    report_learned(tmp_path, study)
    assert f"2 samples: asymmetry of the map {study['map']['asymmetry']:.4f}" in capsys.readouterr().out
    with Image.open(tmp_path / "learned.png") as picture:
        assert min(picture.size) > 300


# Indices and couplings


def test_indices_are_those_by_hand():
    quarter_turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    upper = torch.tensor([[3.0, 2.0], [0.0, 5.0]], dtype=torch.float64)
    symmetric = torch.tensor([[2.0, 1.0], [1.0, -3.0]], dtype=torch.float64)
    assert asymmetry(torch.stack([quarter_turn, symmetric])).tolist() == [1.0, 0.0]
    assert float(asymmetry(upper)) == pytest.approx(math.sqrt(8) / (2 * math.sqrt(38)), rel=1e-14)
    assert float(off_diagonal_asymmetry(upper)) == pytest.approx(1.0, rel=1e-14)
    assert float(off_diagonal_asymmetry(quarter_turn)) == pytest.approx(math.sqrt(2), rel=1e-14)
    assert float(off_diagonal_asymmetry(torch.eye(3, dtype=torch.float64))) == 0.0
    values = torch.linalg.eigvalsh(symmetric)
    assert float(least_eigenvalue(symmetric)) == pytest.approx(float(values[0] / values.abs().max()), rel=1e-14)
    orthogonal = torch.linalg.qr(normal(2, 2))[0]
    assert float(asymmetry(orthogonal @ upper @ orthogonal.mT)) == pytest.approx(float(asymmetry(upper)), rel=1e-12)


def test_coupling_gap_is_zero_for_the_optimal_map_and_positive_for_another():
    start = normal(64, 2)
    optimal_end = start @ torch.tensor(
        [[2.0, 0.3], [0.3, 1.0]], dtype=torch.float64
    )  # a gradient of a convex function
    optimal = coupling_cost(start, optimal_end, batches=4)
    assert abs(optimal.gap) < 1e-12
    rotated_end = start @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    rotation = coupling_cost(start, rotated_end, batches=4)
    assert rotation.gap > 4 * rotation.standard_error > 0
    assert rotation.gap == pytest.approx(rotation.pairs - rotation.optimal, rel=1e-12)


# Bad input


def test_singular_ends_raise_an_error():
    with pytest.raises(InputError, match=r"Schedule 'flow' has alpha 0, sigma 1 at time 1; both must be positive"):
        Schedule("flow", lambda t: 1 - t, lambda t: t * 1.0, 0.01, 1.0)
    for ends in ((0.0, 1.0), (1.0, 0.1), (0.5, 0.5), (0.1, math.inf)):
        with pytest.raises(InputError, match=r"allowed: 0 < data_time < noise_time\. Stop short of a singular end"):
            Schedule("edm", torch.ones_like, lambda t: t * 1.0, *ends)


def test_schedules_that_are_singular_or_turn_between_their_ends_raise_an_error():
    with pytest.raises(InputError, match=r"alpha -?\S+, sigma \S+ at time \S+; both must be positive and finite"):
        Schedule("dip", lambda t: 0.5 - t, lambda t: t * 1.0, 0.1, 0.9)
    with pytest.raises(InputError, match=r"sigma/alpha \S+ at time .* before it; allowed: growing with time"):
        Schedule("turning", torch.ones_like, lambda t: t * (1.2 - t), 0.1, 0.9)


def test_too_many_dimensions_raise_an_error_that_names_directions():
    field = exact_field(DiracMixture(normal(2, 70, 70)))
    with pytest.raises(InputError, match=r"Jacobian of 4900 dimensions is too large \(limit 4096\)\. Pass `direc"):
        transport_map(field, normal(1, 70, 70), SCHEDULES["edm"])


def test_too_few_steps_or_pairs_raise_an_error():
    with pytest.raises(InputError, match="`num_steps` is 1; allowed: at least 2"):
        FixedSteps(1)
    with pytest.raises(InputError, match="`order` is 3; allowed: 2 or 4"):
        FixedSteps(4, order=3)
    with pytest.raises(InputError, match="3 pairs in 2 batches; allowed: two batches or more of two pairs or more"):
        coupling_cost(normal(3, 2), normal(3, 2), batches=2)
    assert AdaptiveSteps(1e-6).coarsen().tolerance > 1e-6


@pytest.mark.parametrize("name", ["torchdiffeq", "ot"])
def test_missing_extra_raises_an_error_before_any_work(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)  # as though it were not installed
    with pytest.raises(
        UnsupportedError, match=rf"need the package '{name}'.*pip install 'diffusers_fisher.transport.'"
    ):
        if name == "ot":
            coupling_cost(normal(8, 2), normal(8, 2), batches=2)
        else:
            integrate("Gaussian", SCHEDULES["edm"])
    with pytest.raises(UnsupportedError, match=f"need the package '{name}'"):
        run_study(tmp_path)
    assert not list(tmp_path.iterdir())


def test_points_of_the_user_are_read_or_raise_an_error(tmp_path):
    assert parse_points("0.5,0; 0,-0.5; 0,0").tolist() == [[0.5, 0.0], [0.0, -0.5], [0.0, 0.0]]
    assert parse_points(None) is None
    for text in ("0.5,0; x,1", "1,2; 3", ""):
        with pytest.raises(InputError, match="allowed: coordinates between commas, points between semicolons"):
            parse_points(text)
    with pytest.raises(InputError, match=r"Points have shape \(1, 2\); allowed: \(N, d\), at least two points"):
        run_study(tmp_path, points=parse_points("1,2"))
    with pytest.raises(InputError, match="`runs` is 1; allowed: at least 2"):
        run_study(tmp_path, runs=1)


def test_command_writes_table_report_and_plots(tmp_path):
    result = CliRunner().invoke(
        app, ["transport", "--output", str(tmp_path), "--runs", "3", "--points", "0.5,0; 0,-0.5; 0,0"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "transport.json").read_text())
    assert [row["schedule"] for row in report["maps"]] == list(SCHEDULES)
    assert "3 given points" in result.output
    assert (tmp_path / "table.txt").read_text() in result.output
    for name in ("maps", "index_by_steps"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert min(picture.size) > 300
    result = CliRunner().invoke(app, ["transport", "--output", str(tmp_path), "--points", "1"])
    assert result.exit_code == 1
    assert "at least two points" in result.output


def test_the_stored_study_agrees_with_theory():
    """The figures of the docs are zero where the map is optimal, and the paper's indices for the paper's triangle."""
    report = json.loads((Path(document_figures.FOLDER) / "transport.json").read_text())
    rows = {(row["case"], row["schedule"]): row for row in report["maps"]}
    for row in report["maps"]:
        if row["optimal"]:
            assert max(row["asymmetry"], row["off_diagonal_asymmetry"]) < 1e-6
        else:
            assert row["asymmetry"] > 0.01
        assert row.get("distance_to_closed_form", 0) < 1e-6
    for name, value in (("vp", 0.236), ("sub-vp", 0.236), ("ve", 0.240), ("edm", 0.240)):
        row = rows["triangle", name]
        assert row["runs"] >= 300
        assert abs(row["off_diagonal_asymmetry"] - value) < 2 * row["off_diagonal_asymmetry_standard_error"]
    for one, other in (("vp", "sub-vp"), ("ve", "edm")):
        pair = [rows["triangle", name]["off_diagonal_asymmetry"] for name in (one, other)]
        assert abs(pair[0] - pair[1]) < 2 * rows["triangle", one]["off_diagonal_asymmetry_standard_error"]
    gaps = {row["case"]: row for row in report["couplings"]}
    assert gaps["triangle"]["gap"] > 2 * gaps["triangle"]["standard_error"]
    assert {row["case"] for row in report["maps"] if row["optimal"]} - set(gaps) == {
        "line along an axis", "line in general position"
    }  # fmt: skip
    assert (
        max(abs(gaps[row["case"]]["gap"]) for row in report["maps"] if row["optimal"] and row["case"] in gaps) < 1e-12
    )
    assert report["seconds"] < 60 and report["learned"]["seconds"] < 600  # as the docs say of their machine
