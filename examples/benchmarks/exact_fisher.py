"""Measures exact distributions: time beside the matrix products, accuracy of float32, memory of banks in files.

    python examples/benchmarks/exact_fisher.py

Writes exact_fisher.json. The points are drawn from a seeded mixture of ten Gaussians with the spectrum of images, so
nothing needs to be downloaded. Run it alone on the machine, because the products use all threads of torch.
"""

import multiprocessing
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy
import torch
from common import paired_seconds, ratio, save
from safetensors.torch import save_file

from diffusers_fisher import Covariance, DCTBasis, DiracMixture, GaussianMixture, NoiseLevel

SHAPE, POINTS, BATCH, ROUNDS = (1, 16, 16), 60_000, 32, 15
TIMESTEPS = (0, 50, 100, 150, 200, 300, 500, 700, 999)  # of Stable Diffusion's 1,000
BANK_POINTS, BANK_SHARE = 600_000, 10  # size of the bank, relative to the memory that it may use
BANK_TIMESTEPS = (50, 100, 200, 500)


def level_at(timestep: int) -> NoiseLevel:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    alpha_bar = (1 - betas).cumprod(0)[timestep]
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())


def images(count: int, seed: int = 0) -> torch.Tensor:
    """Draws (count, 1, 16, 16) float32: ten classes, with variances that fall with the square of the frequency."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    spectrum = 4 / (1 + rows**2 + columns**2).double().view(1, *SHAPE)
    generator = torch.Generator().manual_seed(seed)
    centres = Covariance.diagonal(spectrum, DCTBasis(SHAPE)).draw(torch.zeros(10, dtype=torch.long), generator)
    law = GaussianMixture(centres.view(10, *SHAPE), Covariance.diagonal(0.5 * spectrum, DCTBasis(SHAPE)))
    return law.sample(count, generator).float()


def near_copies(count: int) -> torch.Tensor:
    """Draws clusters of twenty points, nearer to each other than the smallest sigma: the hardest case for float32."""
    noise = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1))
    return images(count // 20, seed=2).repeat_interleave(20, 0) + 0.005 * noise


def add_noise(points: torch.Tensor, level: NoiseLevel, seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    clean = points[torch.randint(len(points), (BATCH,), generator=generator)].double()
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return (level.alpha * clean + level.sigma * noise).float()


def timings(points: torch.Tensor) -> dict[str, Any]:
    """Returns seconds and ratios by timestep. A covariance has four products: two of the posterior, two more."""
    distribution, rows = DiracMixture(points), points.flatten(1)
    weights = torch.rand(BATCH, len(points), generator=torch.Generator().manual_seed(4))
    table = {}
    for timestep in TIMESTEPS:
        level = level_at(timestep)
        x = add_noise(points, level)
        v, flat = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)), x.flatten(1)
        first_posterior = distribution.posterior(x, level)
        first_posterior.covariance(v)

        def products(count: int, flat=flat) -> None:
            for _ in range(count // 2):
                flat @ rows.T
                weights @ rows

        def score_and_mean(x=x, level=level) -> tuple[torch.Tensor, torch.Tensor]:
            posterior = distribution.posterior(x, level)
            return posterior.score, posterior.mean

        seconds = paired_seconds(
            {
                "two products": lambda run=products: run(2),
                "score and mean": score_and_mean,
                "four products": lambda run=products: run(4),
                "covariance product": lambda x=x, v=v, at=level: distribution.posterior(x, at).covariance(v),
                "later covariance product": lambda posterior=first_posterior, v=v: posterior.covariance(v),
            },
            ROUNDS,
        )
        table[str(timestep)] = {
            "sigma": float(level.sigma),
            "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "score_and_mean_over_two_products": ratio(seconds, "score and mean", "two products"),
            "covariance_over_four_products": ratio(seconds, "covariance product", "four products"),
            "later_covariance_over_four_products": ratio(seconds, "later covariance product", "four products"),
        }
        row = table[str(timestep)]
        print(timestep, {name: value["median"] for name, value in row.items() if name.endswith("products")})
    return table


def results(distribution: DiracMixture, x: torch.Tensor, level: NoiseLevel) -> dict[str, torch.Tensor]:
    """Returns all quantities that are compared, in float64."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(x.dtype)
    posterior = distribution.posterior(x, level)
    values = {
        "log_density": posterior.log_density[:, None],
        "score": posterior.score,
        "posterior_mean": posterior.mean,
        "matvec": posterior.fisher(v),
        "covariance_product": posterior.covariance(v) / level.noise_to_signal**2,
        "trace": posterior.fisher_trace()[:, None],
    }
    return {name: value.double() for name, value in values.items()}


def errors(values: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """Returns the largest relative error over the samples; for C v it is relative to (sigma/alpha)^2 |v|."""
    table = {}
    for name, value in values.items():
        size = reference["matvec"] * 0 + 1 if name == "covariance_product" else reference[name]
        difference = (value - reference[name]).flatten(1).norm(dim=1)
        table[name] = float((difference / size.flatten(1).norm(dim=1)).max())
    return table


def accuracy(points: torch.Tensor) -> dict[str, Any]:
    """Returns the errors of float32 against float64 by timestep."""
    single, double, table = DiracMixture(points), DiracMixture(points.double()), {}
    for timestep in TIMESTEPS:
        level = level_at(timestep)
        x = add_noise(points, level)
        table[str(timestep)] = errors(results(single, x, level), results(double, x.double(), level))
    return table


def bank_results(distribution: DiracMixture) -> dict[str, dict[str, torch.Tensor]]:
    """Returns the results by timestep: few points have weight at the first timesteps, and many at the last."""
    clean = images(BATCH, seed=6)
    return {
        str(timestep): results(distribution, add_noise(clean, level_at(timestep)), level_at(timestep))
        for timestep in BANK_TIMESTEPS
    }


def bank_in_a_process(folder: str, name: str, memory: int) -> None:
    """Returns the results of a bank, and how much this process of its own grew at its peak (Linux)."""
    # Every path runs once before, so that libraries and their buffers do not count.
    bank_results(DiracMixture(f"{folder}/small-{name}", memory=memory // 30))
    bank_results(DiracMixture(images(2000)))
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident_bytes("VmRSS")
    values = bank_results(DiracMixture(f"{folder}/{name}", memory=memory))
    torch.save({"grown": resident_bytes("VmHWM") - before, "values": values}, f"{folder}/answer.pt")


def resident_bytes(name: str) -> int:
    """Returns the resident memory of this process with mapped files: VmRSS is that of now, VmHWM that of the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def banks() -> dict[str, Any]:
    """Compares a bank in files, ten times as large as its memory, with the same points in memory."""
    points = images(BANK_POINTS)
    size = points.numel() * points.element_size()
    memory = size // BANK_SHARE
    reference = bank_results(DiracMixture(points))
    table: dict[str, Any] = {"bank_bytes": size, "memory_given": memory, "batch": BATCH}
    with tempfile.TemporaryDirectory() as folder:
        for prefix, rows in (("", points), ("small-", points[: BANK_POINTS // 30])):
            numpy.save(f"{folder}/{prefix}bank.npy", rows.numpy())
            save_file({"points": rows.contiguous()}, f"{folder}/{prefix}bank.safetensors")
        for name in ("bank.npy", "bank.safetensors"):
            process = multiprocessing.get_context("spawn").Process(
                target=bank_in_a_process, args=(folder, name, memory)
            )
            process.start()
            process.join()
            result = torch.load(f"{folder}/answer.pt", weights_only=True)
            table[name] = {
                "peak_growth_bytes": result["grown"],
                "errors": {
                    timestep: errors(values, reference[timestep]) for timestep, values in result["values"].items()
                },
            }
            print(name, table[name])
    return table


def main() -> None:
    points, copies = images(POINTS), near_copies(POINTS)
    setting = {"points": POINTS, "dimensions": 256, "batch": BATCH, "dtype": "float32", "rounds": ROUNDS}
    save(
        "exact_fisher",
        {
            "setting": setting | {"threads": torch.get_num_threads()},
            "time": timings(points),
            "float32": {"images": accuracy(points), "near copies": accuracy(copies)},
            "bank": banks(),
        },
    )


if __name__ == "__main__":
    main()
