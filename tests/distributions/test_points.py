"""Tests points in chunks, in memory, in files and in float32, and the banks that raise an error."""

import numpy
import pytest
import torch
from cases import relative
from fisher.exact_cases import LEVELS, check_posterior, noisy, normal
from safetensors.torch import save_file

from diffusers_fisher import CheckpointError, Covariance, DiracMixture, GaussianMixture, InputError, NoiseLevel
from diffusers_fisher.distributions import points as points_module
from diffusers_fisher.testing import MixtureOracle

BANK = 403


def bank(dtype=torch.float64, count=BANK):
    """Returns points with near neighbours, so that several points have weight at low noise."""
    centres = normal(31, 3, 2, 2, seed=7).repeat(count // 31, 1, 1, 1)
    return (centres + 0.05 * normal(len(centres), 3, 2, 2, seed=8)).to(dtype)


REPRESENTATIONS = {  # A `PointPosterior` holds pairs, a cache of weights, or neither.
    "pairs": ({}, {}),
    "cache": ({}, {"MIN_PAIRS": 0, "PAIRS_SHARE": 10**9}),
    "computed again": ({"memory": 20000}, {}),
}


@pytest.mark.parametrize("level", LEVELS.values(), ids=list(LEVELS))
@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("rows", [None, 1, 57, 403, 1000])
def test_chunks_and_representations_change_nothing(representation, rows, level, monkeypatch):
    arguments, constants = REPRESENTATIONS[representation]
    for name, value in constants.items():
        monkeypatch.setattr(points_module, name, value)
    weights = normal(BANK, seed=6).softmax(0)
    oracle = MixtureOracle.points(bank(), weights)
    posterior = DiracMixture(bank(), weights, chunk_rows=rows, **arguments)
    x = noisy(oracle, level)
    posterior = posterior.posterior(x, level)
    check_posterior(posterior, oracle, x, level)
    assert (posterior._pairs is not None) == (representation == "pairs")
    assert (posterior._weight_cache is not None) == (representation == "cache")


def write_npy(folder, data):
    numpy.save(folder / "bank.npy", data.numpy())
    return {"points": folder / "bank.npy"}


def write_memmap(folder, data):
    numpy.save(folder / "bank.npy", data.numpy())
    return {"points": numpy.load(folder / "bank.npy", mmap_mode="r")}


def write_safetensors(folder, data):
    save_file({"latents": data}, folder / "bank.safetensors")
    return {"points": str(folder / "bank.safetensors")}


def write_named(folder, data):
    save_file({"latents": data, "labels": torch.zeros(3)}, folder / "bank.safetensors")
    return {"points": folder / "bank.safetensors", "name": "latents"}


def write_several(folder, data):
    numpy.save(folder / "a.npy", data[:100].numpy())
    save_file({"x": data[100:101].contiguous()}, folder / "b.safetensors")
    numpy.save(folder / "c.npy", data[101:].numpy())
    return {"points": [folder / "a.npy", folder / "b.safetensors", folder / "c.npy"]}


def array(folder, data):
    return {"points": data.numpy()}


STORAGES = [write_npy, write_memmap, write_safetensors, write_named, write_several, array]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("storage", STORAGES)
def test_banks_in_files_give_the_results_of_banks_in_memory(storage, dtype, tmp_path):
    data, level = bank(dtype), LEVELS["middle"]
    x = noisy(MixtureOracle.points(bank()), level).to(dtype)
    v = normal(*x.shape, seed=9).to(dtype)
    reference = DiracMixture(data).posterior(x, level)
    weights = torch.full((BANK,), 1 / BANK, dtype=torch.float64)
    for arguments in ({}, {"chunk_rows": 57}, {"memory": 20000}, {"weights": weights}):
        distribution = DiracMixture(**storage(tmp_path, data), **arguments)
        posterior = distribution.posterior(x, level)
        assert (distribution.count, distribution.shape) == (BANK, (3, 2, 2))
        for name in ("mean", "score", "log_density"):
            assert relative(getattr(posterior, name), getattr(reference, name)) < 1e-6
        assert relative(posterior.covariance(v), reference.covariance(v)) < 1e-6
        assert relative(posterior.fisher_trace(), reference.fisher_trace()) < 1e-6
    draws = distribution.sample(20, torch.Generator().manual_seed(0))
    assert draws.dtype is dtype
    assert all(any(torch.equal(draw, point) for point in data) for draw in draws)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("storage", [lambda folder, data: {"points": data}, write_safetensors])
def test_banks_in_half_precision_are_widened(storage, dtype, tmp_path):
    data, level = bank(dtype), LEVELS["middle"]
    x = noisy(MixtureOracle.points(bank()), level).float()
    distribution = DiracMixture(**storage(tmp_path, data), chunk_rows=57)
    reference = MixtureOracle.points(data.double())
    assert relative(distribution.score(x, level), reference.score(x.double(), level)) < 1e-5  # float32
    assert distribution.sample(2, torch.Generator().manual_seed(0)).dtype is torch.float32


def test_a_bank_is_never_read_whole(tmp_path, monkeypatch):
    """The bank has ten times the bytes of `memory`: every slice, with its work arrays, must fit `memory`."""
    data = normal(4030, 3, 2, 2, seed=7)
    memory, reads = data.numel() * 8 // 10, []
    distribution = DiracMixture(**write_npy(tmp_path, data), memory=memory)
    read_rows = distribution.bank.read
    monkeypatch.setattr(distribution.bank, "read", lambda *rows: reads.append(rows[1] - rows[0]) or read_rows(*rows))
    x = noisy(MixtureOracle.points(data[:10]), LEVELS["middle"])
    posterior = distribution.posterior(x, LEVELS["middle"])
    posterior.covariance(x)
    posterior.fisher_trace()
    assert 3 * 4030 <= sum(reads) < 4 * 4030  # one reading for the posterior, one for the product, one to search pairs
    assert max(reads) * 12 * 8 < memory // 4


# Precision


def cluster_points(count=6000, dimensions=64):
    """Returns far clusters of 20 points that are nearer to each other than the smallest sigma: all 20 have weight."""
    centres = 1.5 * normal(count // 20, dimensions, seed=3).repeat_interleave(20, 0)
    return (centres + 0.01 * normal(count, dimensions, seed=4)).float()


def stable_diffusion_level(timestep):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alpha_bar = (1 - betas).cumprod(0)[timestep]
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("timestep", [0, 10, 50, 150, 400, 700, 999])
def test_float32_is_as_good_as_float64_at_every_level(timestep, offset):
    level, data = stable_diffusion_level(timestep), cluster_points() + offset
    centres = data[::401].double()
    x = (level.alpha * centres + level.sigma * normal(*centres.shape, seed=5)).float()
    v = normal(*x.shape, seed=9).float()
    single, double = DiracMixture(data).posterior(x, level), DiracMixture(data.double()).posterior(x.double(), level)
    # Rounding of the centred rows, 6e-8 times their norm of 12, is measured against sigma sqrt(d) = 0.2 in the score.
    tolerance = 1e-5
    assert single.mean.dtype is single.covariance(v).dtype is torch.float32
    assert single.log_density.dtype is torch.float64
    assert relative(single.mean, double.mean) < 1e-6
    assert relative(single.score, double.score) < tolerance
    assert float((single.log_density - double.log_density).abs().max()) < 1e-4
    unit = float(level.noise_to_signal) ** 2
    difference = single.covariance(v).double() - double.covariance(v.double())
    assert float(difference.norm()) < tolerance * unit * float(v.norm())
    assert relative(single.fisher_trace(), double.fisher_trace()) < tolerance


def test_logits_of_near_points_are_computed_again(monkeypatch):
    """Without the second computation of near points' logits, float32 loses what the test above measures."""
    level, data = stable_diffusion_level(0), cluster_points()
    centres = data[::401].double()
    x = (level.alpha * centres + level.sigma * normal(*centres.shape, seed=5)).float()
    exact = DiracMixture(data.double()).score(x.double(), level)
    monkeypatch.setattr(points_module, "LOGIT_ERROR", torch.inf)
    assert relative(DiracMixture(data).score(x, level), exact) > 1e-4


def test_reduced_precision_products_and_autocast_change_nothing():
    level, data = stable_diffusion_level(400), cluster_points()
    x = (level.alpha * data[::401].double() + level.sigma * normal(15, 64, seed=5)).float()
    mixture = GaussianMixture(data[:3], Covariance.isotropic(0.1, (64,)))
    before = [DiracMixture(data).posterior(x, level), mixture.posterior(x, level)]
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = [DiracMixture(data).posterior(x, level), mixture.posterior(x, level)]
            for one, other in zip(before, after, strict=True):
                assert relative(other.score, one.score) < 1e-6
                assert relative(other.covariance(x), one.covariance(x)) < 1e-5
    finally:
        torch.set_float32_matmul_precision(precision)


# Errors


def test_bad_files_are_refused(tmp_path):
    data = bank()
    (tmp_path / "words.txt").write_text("no bank")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01")
    numpy.save(tmp_path / "short.npy", data.numpy())
    (tmp_path / "short.npy").write_bytes((tmp_path / "short.npy").read_bytes()[:-100])
    numpy.save(tmp_path / "integers.npy", numpy.zeros((3, 2), dtype=numpy.int64))
    numpy.save(tmp_path / "swapped.npy", numpy.zeros((3, 2), dtype=">f4"))
    numpy.save(tmp_path / "good.npy", data.numpy())
    numpy.save(tmp_path / "flat.npy", data.flatten(1).numpy())
    write_named(tmp_path, data)
    save_file({"x": torch.zeros(3, 2, dtype=torch.int32)}, tmp_path / "integers.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"1234")
    for name in ("missing.npy", "broken.npy", "short.npy"):
        with pytest.raises(CheckpointError, match=r"can't be mapped as .npy.* missing or truncated"):
            DiracMixture(tmp_path / name)
    for name in ("missing.safetensors", "broken.safetensors"):
        with pytest.raises(CheckpointError, match="can't be read as safetensors"):
            DiracMixture(tmp_path / name)
    for paths, message in (
        ("words.txt", "is not a bank of points; supported: .npy and .safetensors files"),
        ("integers.npy", "has dtype int64; allowed: float16, float32, float64"),
        ("swapped.npy", "in native byte order"),
        ("integers.safetensors", "holds points of dtype I32; allowed: F16, BF16, F32, F64"),
        ("bank.safetensors", "`name` is None; '.*' holds labels, latents. Pass such a name"),
        (["good.npy", "flat.npy"], "All files of one bank must agree"),
    ):
        with pytest.raises(InputError, match=message):
            DiracMixture([tmp_path / path for path in ([paths] if isinstance(paths, str) else paths)])


@pytest.mark.parametrize("storage", [write_npy, write_safetensors])
def test_nan_at_any_place_in_a_bank_is_refused(storage, tmp_path):
    data = bank()
    data[400, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match="Points 399 to 402 hold NaN or infinity"):
        DiracMixture(**storage(tmp_path, data), chunk_rows=57)
