"""The study of the LML schedulers: its distance agrees with closed forms; its errors and records."""

import json

import lml
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from scipy.linalg import sqrtm

from diffusers_fisher import LMLDDIMScheduler

EXACT = {"rel": 1e-10, "abs": 1e-12}  # float64; roots of nearly zero eigenvalues lose half the digits


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(seed, dimensions=5):
    factor = normal(dimensions, dimensions, seed=seed)
    return factor @ factor.mT


# The distance


def test_distance_of_gaussians_with_common_axes_is_that_of_their_axes():
    rotation = torch.linalg.qr(normal(4, 4))[0]
    first, second = torch.tensor([[0.5, 1.0, 2.0, 0.0], [0.1, 4.0, 2.0, 0.3]], dtype=torch.float64)
    shift = torch.tensor([1.0, 0.0, -2.0, 0.5], dtype=torch.float64)
    gaussians = [
        (shift, rotation @ torch.diag(first) @ rotation.mT),
        (torch.zeros(4, dtype=torch.float64), rotation @ torch.diag(second) @ rotation.mT),
    ]
    expected = float(shift.square().sum() + (first.sqrt() - second.sqrt()).square().sum())
    # The axis without variance is rounded to 1e-16, whose root is 1e-8.
    assert lml.frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-7)
    assert lml.frechet_distance(*reversed(gaussians)) == pytest.approx(expected, rel=1e-7)


def test_distance_of_two_gaussians_agrees_with_scipy():
    means, matrices = normal(2, 5), [covariance(seed) for seed in (1, 2)]
    cross = torch.from_numpy(sqrtm((matrices[0] @ matrices[1]).numpy()).real)
    expected = (means[0] - means[1]).square().sum() + (matrices[0] + matrices[1] - 2 * cross).trace()
    distance = lml.frechet_distance((means[0], matrices[0]), (means[1], matrices[1]))
    assert distance == pytest.approx(float(expected), **EXACT)
    assert lml.frechet_distance((means[0], matrices[0]), (means[0], matrices[0])) == pytest.approx(0, abs=1e-10)


def test_distance_of_samples_is_that_of_their_laws_within_the_jackknife_error():
    factor = torch.linalg.cholesky(covariance(1))
    reference = (torch.zeros(5, dtype=torch.float64), covariance(2))
    features = normal(4000, 5, seed=3) @ factor.mT + 0.5
    exact = lml.frechet_distance((torch.full((5,), 0.5, dtype=torch.float64), factor @ factor.mT), reference)
    distance = lml.frechet_distance(lml.moments(features), reference)
    error = lml.jackknife_error(torch.tensor(lml.jackknife(features, reference)))
    assert 0 < error < 0.1 * exact
    assert abs(distance - exact) < 4 * error  # nine degrees of freedom; the bias, of order d/N, is below it


def test_jackknife_of_a_mean_is_its_standard_error():
    blocks = normal(10)
    left_out = (blocks.sum() - blocks) / 9
    assert lml.jackknife_error(left_out) == pytest.approx(float(blocks.std() / 10**0.5), **EXACT)


# Cells and their records


@pytest.fixture(scope="module")
def models():
    return lml.Models()


CELLS = [
    lml.Cell("DDIM", 2, count=20),
    lml.Cell("LML-DDIM", 2, guidance_scale=2.0, count=20, lml_lambda=1.0, lml_kappa=0.5),
]


def test_records_are_written_and_read_again(models, tmp_path, monkeypatch, capsys):
    reference = (torch.zeros(160, dtype=torch.float64), torch.eye(160, dtype=torch.float64))
    first = lml.measure(CELLS[0], models, reference, tmp_path)
    assert first["count"] == 20
    assert 0 <= first["accuracy"] <= 1
    assert first["frechet_distance"] > 0
    compute_features = models.features
    monkeypatch.setattr(models, "features", lambda images: 1 / 0)  # killed within the second cell
    with pytest.raises(ZeroDivisionError):
        lml.measure(CELLS[1], models, reference, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{CELLS[0].name}.json"]
    assert lml.measure(CELLS[0], models, reference, tmp_path) == first  # read, without sampling
    monkeypatch.setattr(models, "features", compute_features)
    second = lml.measure(CELLS[1], models, reference, tmp_path)
    assert second["lml_kappa"] == 0.5
    assert json.loads((tmp_path / f"{CELLS[1].name}.json").read_text()) == second
    assert "accuracy" in capsys.readouterr().out


def test_cells_differ_in_their_names_and_make_their_schedulers(models):
    options = {name: {"lml_lambda": 3.0, "lml_kappa": 0.2} for name in ("LML-DDIM", "LML-DPM-Solver++")}
    cells = [*lml.sweep_cells(), *lml.study_cells(options), *CELLS]
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.seed for cell in lml.sweep_cells()}.isdisjoint({cell.seed for cell in lml.study_cells(options)})
    scheduler = CELLS[1].scheduler(models.config)
    assert type(scheduler) is LMLDDIMScheduler
    assert (scheduler.config.lml_lambda, scheduler.config.lml_kappa) == (1.0, 0.5)
    assert type(CELLS[0].scheduler(models.config)) is DDIMScheduler
    for cell in lml.study_cells(options):  # every sampler starts from the last training timestep
        cell_scheduler = cell.scheduler(models.config)
        cell_scheduler.set_timesteps(cell.calls)
        assert (int(cell_scheduler.timesteps[0]), len(cell_scheduler.timesteps)) == (999, cell.calls)


def test_differences_from_the_parent_compare_the_same_noise():
    """Replicates that differ by a constant have a difference without an error, although each has a large error."""
    replicates = normal(10).tolist()
    cells = [row("DDIM", 5, 2.0, frechet_jackknife=replicates, seed=seed) for seed in (0, 2)]
    shifted = [value + 0.5 for value in replicates]
    cells.append(row("LML-DDIM", 5, 2.5, frechet_jackknife=shifted, seed=2))
    (difference,) = lml.differences(cells)
    assert (difference["sampler"], difference["seed"], difference["difference"]) == ("LML-DDIM", 2, 0.5)
    assert difference["standard_error"] == pytest.approx(0, abs=1e-6)  # replicates in float32
    assert lml.differences(cells[2:]) == []  # the cells of an unfinished study


def row(sampler, calls, distance, **options):
    options = {"guidance_scale": 1.0, "seed": 0, "lml_lambda": None, "lml_kappa": None, "accuracy": 0.9, **options}
    errors = {"frechet_standard_error": 0.1, "accuracy_standard_error": 0.01}
    return {"sampler": sampler, "calls": calls, "frechet_distance": distance, **errors, **options}


def test_the_cell_of_least_distance_is_chosen_and_the_picture_is_drawn(tmp_path):
    sweep = [row("DDIM", 10, 2.0), row("DPM-Solver++", 10, 1.5)]
    for sampler in ("LML-DDIM", "LML-DPM-Solver++"):
        sweep += [
            row(sampler, 10, 2 + kappa, lml_lambda=damping, lml_kappa=kappa)
            for damping in (1.0, 10.0)
            for kappa in (0.1, 0.5)
        ]
    sweep[4]["frechet_distance"] = 0.5
    options = lml.chosen_options(sweep)
    assert options["LML-DDIM"] == {"lml_lambda": 10.0, "lml_kappa": 0.1}
    cells = [row(name, calls, 10 / calls) for name in lml.SAMPLERS for calls in (5, 10)]
    lml.draw({"cells": cells, "sweep": sweep, "floors": {"reconstructed_half": 0.2}}, tmp_path / "lml.png")
    with Image.open(tmp_path / "lml.png") as picture:
        assert min(picture.size) > 300
