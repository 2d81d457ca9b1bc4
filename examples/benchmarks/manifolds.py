"""Laws on manifolds of known dimension in 256 dimensions, whose denoiser is known in closed form."""

from __future__ import annotations

import math

import torch

from diffusers_fisher import Covariance, DiracMixture, GaussianMixture

SHAPE = (4, 8, 8)
CURVED = ("circle", "sphere", "Swiss roll")


def basis(size: int, seed: int = 0) -> torch.Tensor:
    """Returns an orthonormal basis (256, size) of a random subspace."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(math.prod(SHAPE), size, dtype=torch.float64, generator=generator))[0]


def subspaces(*sizes: int) -> GaussianMixture:
    """Returns equally likely standard normal laws on the random subspaces `basis(sizes[i], i)`."""
    factors = torch.zeros(len(sizes), math.prod(SHAPE), max(sizes), dtype=torch.float64)
    for number, size in enumerate(sizes):
        factors[number, :, :size] = basis(size, number)
    thin = torch.full((len(sizes), *SHAPE), 1e-10, dtype=torch.float64)
    covariance = Covariance.low_rank(thin, factors.view(len(sizes), *SHAPE, -1))
    return GaussianMixture(torch.zeros(len(sizes), *SHAPE, dtype=torch.float64), covariance)


def on_subspace(count: int, size: int, number: int = 0, seed: int = 1) -> torch.Tensor:
    """Returns standard normal points (count, 4, 8, 8) of the subspace with this number of `subspaces`."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, size, dtype=torch.float64, generator=generator)
    return (points @ basis(size, number).T).view(count, *SHAPE)


def curved(name: str) -> tuple[DiracMixture, int, torch.Tensor]:
    """Returns a dense cloud of points on a curved manifold of `CURVED`, its dimension, and some of the points."""
    if name == "circle":
        angle = torch.linspace(0, 2 * math.pi, 4001, dtype=torch.float64)[:-1]
        points, size, rows = 2 * torch.stack([angle.cos(), angle.sin()], 1), 1, torch.arange(0, 4000, 700)
    elif name == "sphere":
        number = torch.arange(8000, dtype=torch.float64) + 0.5
        height, angle = 1 - number / 4000, math.pi * (1 + 5**0.5) * number
        radius = (1 - height.square()).sqrt()
        points = 4 * torch.stack([radius * angle.cos(), radius * angle.sin(), height], 1)
        size, rows = 2, torch.arange(500, 8000, 1900)
    else:
        # Equal distances along the spiral, whose length grows like the square of the angle.
        angle = torch.linspace((1.5 * math.pi) ** 2, (3.5 * math.pi) ** 2, 160, dtype=torch.float64).sqrt()
        height = torch.linspace(-4, 4, 50, dtype=torch.float64)
        angles, heights = (each.flatten() for each in torch.meshgrid(angle, height, indexing="ij"))
        points = torch.stack([angles * angles.cos(), heights, angles * angles.sin()], 1) / 2
        size, rows = 2, torch.tensor([50, 80, 110]) * 50 + 25  # points at the edges have half a neighbourhood
    points = (points @ basis(points.shape[1]).T).view(-1, *SHAPE)
    return DiracMixture(points), size, points[rows].clone()
