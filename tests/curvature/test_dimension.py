"""Local intrinsic dimensions against laws on manifolds of known dimension, in float64."""

import math

import diffusers
import pytest
import torch
from cases import STABLE_DIFFUSION
from manifolds import CURVED, SHAPE, curved, on_subspace, subspaces

from diffusers_fisher import (
    AutodiffFisher,
    Covariance,
    DiracMixture,
    ExactFisher,
    FiniteDifferenceFisher,
    GaussianMixture,
    InputError,
    NumericalError,
)
from diffusers_fisher.curvature import denoiser_intrinsic_dimension
from diffusers_fisher.curvature.plateau import find_plateau
from diffusers_fisher.denoiser import Denoiser
from diffusers_fisher.fisher import LevelFisher
from diffusers_fisher.fisher.calibration import TraceCalibration
from diffusers_fisher.testing import OracleDenoiser

SCHEDULERS = {
    "epsilon": diffusers.DDIMScheduler(**STABLE_DIFFUSION),
    "v": diffusers.DDIMScheduler(**STABLE_DIFFUSION, prediction_type="v_prediction"),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "k-diffusion": diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION),
}
VP = SCHEDULERS["epsilon"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dimension(law, samples, estimator=None, scheduler=VP, num_probes=None, **options):
    estimator = ExactFisher(law) if estimator is None else estimator
    denoiser = OracleDenoiser(law, scheduler)
    return denoiser_intrinsic_dimension(denoiser, samples, estimator, num_probes=num_probes, **options)


@pytest.mark.parametrize(
    ("size", "scheduler"),
    [*((size, name) for size in (1, 4, 16, 64) for name in ("epsilon", "flow")), (16, "v"), (16, "k-diffusion")],
)
def test_subspaces_have_their_dimension_by_exact_traces(size, scheduler):
    law = subspaces(size)
    out = dimension(law, law.sample(8, seeded(1)), scheduler=SCHEDULERS[scheduler])
    assert float((out.value / size - 1).abs().max()) < 0.05
    assert bool((out.standard_error == 0).all()) and bool((out.curve_error == 0).all())
    assert (out.dims, out.space, out.num_denoiser_calls) == (256, "latent", 16)
    assert out.curve.shape == (16, 8)
    assert out.trace == "ExactFisher, no probes"


@pytest.mark.parametrize(
    ("size", "probes", "scheduler"), [(1, 1, "flow"), (4, 4, "epsilon"), (16, 1, "flow"), (64, 1, "epsilon")]
)
def test_probes_are_right_within_their_standard_errors(size, probes, scheduler):
    law = subspaces(size)
    samples = law.sample(32, seeded(1))
    options = {"scheduler": SCHEDULERS[scheduler], "generator": seeded(2)}
    out = dimension(law, samples, FiniteDifferenceFisher(), num_probes=probes, **options)
    distances = (out.value - size) / out.standard_error
    assert float((distances.abs() <= 3).double().mean()) >= 0.9
    assert 0.7 < float(distances.square().mean().sqrt()) < 1.6  # the errors are neither too small nor too large
    exact = dimension(law, samples, scheduler=SCHEDULERS[scheduler])
    by_level = (out.curve - exact.curve) / out.curve_error
    assert float((by_level.abs() <= 3).double().mean()) > 0.97
    assert out.num_denoiser_calls == 16 * (1 + probes)


@pytest.mark.parametrize(("name", "scheduler"), [*((name, "epsilon") for name in CURVED), ("Swiss roll", "flow")])
def test_curved_manifolds_have_their_dimension_by_exact_traces(name, scheduler):
    """At the lowest levels of flow matching the clouds are single points."""
    law, size, samples = curved(name)
    out = dimension(law, samples, scheduler=SCHEDULERS[scheduler])
    assert float((out.value / size - 1).abs().max()) < 0.15
    assert bool(out.has_plateau.all())


def test_points_of_a_union_have_the_dimension_of_their_own_part():
    law = subspaces(2, 24)
    samples = torch.cat([on_subspace(5, 2), on_subspace(5, 24, number=1)])
    out = dimension(law, samples)
    sizes = torch.tensor([2.0] * 5 + [24.0] * 5, dtype=torch.float64)
    assert float((out.value / sizes - 1).abs().max()) < 0.05
    whole = out.value[7]
    alone = dimension(law, samples[7:8])
    assert torch.allclose(whole, alone.value[0], rtol=1e-9)


def test_points_without_neighbours_have_no_dimension_and_full_laws_have_all():
    points = DiracMixture(3 * torch.randn(3, *SHAPE, dtype=torch.float64, generator=seeded()))
    assert float(dimension(points, points.sample(2, seeded())).value.abs().max()) < 0.05
    full = GaussianMixture(torch.zeros(1, *SHAPE, dtype=torch.float64), Covariance.isotropic(1.0, SHAPE))
    assert float((dimension(full, full.sample(2, seeded())).value / 256 - 1).abs().max()) < 0.05


# The plateau

LOG_NOISE = torch.linspace(-4, 0, 17, dtype=torch.float64)


def plateau_of(*values, error=0.0):
    curve = torch.tensor(values, dtype=torch.float64)[:, None]
    return find_plateau(LOG_NOISE, curve, torch.full_like(curve, error), 100)


def test_the_plateau_is_the_widest_flat_range():
    plateau = plateau_of(*[60, 50, 40, 30], *[20.5, 20, 19.5, 20, 20, 20, 20], *[15, 12, 9, 6, 3, 1])
    assert float(plateau.value) == pytest.approx(20)
    assert plateau.ends[0].tolist() == [-3.0, -1.5]
    assert plateau.member[:, 0].tolist() == [False] * 4 + [True] * 7 + [False] * 6
    assert float(plateau_of(*[20.0] * 8, *[10.0] * 9).value) == 10.0
    assert float(plateau_of(*[20.0] * 8, 1.0, *[10.0] * 8).value) == 20.0  # of two the one at lower noise


def test_noise_of_the_data_and_single_points_are_a_plateau_only_where_there_is_no_other():
    assert float(plateau_of(*[0.0] * 9, 1, *[2.0] * 7).value) == 2.0
    assert float(plateau_of(*[0.0] * 9, 1, 2, 4, 8, 16, 32, 64, 90).value) == 0.0
    assert float(plateau_of(*[99.0] * 9, 60, *[30.0] * 5, 20, 10).value) == 30.0
    assert float(plateau_of(*[99.0] * 9, 60, 40, 30, 20, 10, 7, 5, 3).value) == 99.0


def test_random_errors_do_not_break_a_plateau():
    noisy = [16 + (3 if number % 2 else -3) for number in range(12)] + [9, 7, 5, 3, 1]
    assert int(plateau_of(*noisy, error=0.0).member.sum()) == 1
    assert plateau_of(*noisy, error=2.0).ends[0].tolist() == [-4.0, -1.25]


# Errors and levels


def test_levels_of_the_caller():
    law = subspaces(3)
    samples = law.sample(2, seeded())
    out = dimension(law, samples, noise_to_signal=[0.05, 0.1, 0.2])
    assert torch.allclose(out.noise_to_signal, torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64))
    assert out.num_denoiser_calls == 3
    single = dimension(law, samples, noise_to_signal=0.1)
    assert torch.equal(single.curve[0], single.value)
    assert torch.allclose(single.value, out.curve[1], rtol=1e-9)
    assert single.has_plateau.tolist() == [False, False]
    default = dimension(law, samples)
    again = dimension(law, samples, noise_to_signal=default.noise_to_signal)
    assert torch.allclose(again.curve, default.curve, rtol=1e-9)  # the ends of the schedule, rounded
    one = dimension(law, samples, FiniteDifferenceFisher(), num_probes=1, noise_to_signal=0.1)
    assert bool(one.standard_error.isinf().all())
    several = dimension(law, samples, FiniteDifferenceFisher(), num_probes=4, noise_to_signal=0.1)
    assert bool(several.standard_error.isfinite().all())
    assert "plateau    found for 2 of 2" in str(default)


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([0.01, 0.1], "`noise_to_signal` goes from 0.01 to 0.1; the schedule of DDIMScheduler has 0.02917 to 14.61"),
        (20.0, "`noise_to_signal` goes from 20 to 20; the schedule"),
        (
            [0.2, 0.1],
            r"`noise_to_signal` is \[0.2, 0.1\]; allowed: one positive sigma/alpha, or several that increase",
        ),
        ([], r"`noise_to_signal` is \[\]; allowed"),
        ([-0.1, 0.1], "allowed: one positive sigma/alpha"),
        (torch.tensor([0.1, math.nan]), "allowed: one positive sigma/alpha"),
        ("low", "`noise_to_signal` is 'low'"),
    ],
)
def test_wrong_levels_are_refused(levels, message):
    law = subspaces(3)
    with pytest.raises(InputError, match=message):
        dimension(law, law.sample(1, seeded()), noise_to_signal=levels)


def test_dimensions_that_are_not_finite_are_refused():
    class Broken(Denoiser):
        def model_output(self, x, timestep):
            return torch.full_like(x, torch.inf)

    table = LevelFisher(torch.ones(1), torch.full((1,), 0.5))
    with pytest.raises(NumericalError, match=r"Intrinsic dimensions by level are not finite: .* Check the network's"):
        denoiser_intrinsic_dimension(Broken(VP), subspaces(3).sample(1, seeded()), table, num_probes=None)


def test_a_batch_has_the_numbers_of_each_sample_alone():
    law = subspaces(5)
    samples = law.sample(3, seeded(1))
    options = {"num_probes": 1, "generator": seeded(3)}
    whole = dimension(law, samples, AutodiffFisher(), **options)
    alone = dimension(law, samples[2:], AutodiffFisher(), num_probes=1, generator=seeded(3))
    assert torch.allclose(whole.curve[:, 2], alone.curve[:, 0], rtol=1e-9)
    assert torch.allclose(whole.standard_error[2], alone.standard_error[0], rtol=1e-6)


def test_errors_of_a_calibration():
    calibration = TraceCalibration(0.1, 8, (-1.0, 0.0, 1.0), (0.03, 0.0, 0.0), (0.04, 0.05, 0.0), (0.1, 0.1, 0.1))
    at = calibration.error_at(torch.tensor([-2.0, 0.0, 0.5], dtype=torch.float64))
    mean = math.sqrt((0.05**2 + 0.05**2) / 3)
    assert torch.allclose(at, torch.full((3,), mean, dtype=torch.float64))
