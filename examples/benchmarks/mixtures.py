"""Fits mixtures of Gaussians to real images: distributions with a closed form that look like data."""

import sys
from pathlib import Path

import torch

from diffusers_fisher import Covariance, GaussianMixture

sys.path.insert(0, str(Path(__file__).parent.parent))
import fashion_mnist


def small_images(split: str = "train", folder: str = fashion_mnist.DEFAULT_FOLDER) -> torch.Tensor:
    """Returns Fashion-MNIST as (N, 1, 16, 16) float64 in [-1, 1]: 32x32, averaged over 2x2 pixels."""
    images, _ = fashion_mnist.load(split, folder)
    return torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 2).double()


def fitted_mixture(images: torch.Tensor, modes: int, iterations: int = 10, floor: float = 1e-3) -> GaussianMixture:
    """Returns K-means centres of `images` (N, *shape), and each pixel's variance per cluster, at least `floor`."""
    generator = torch.Generator().manual_seed(0)
    flat = images.flatten(1)
    centres = flat[torch.randperm(len(flat), generator=generator)[:modes]]
    for _ in range(iterations):
        nearest = torch.cat([torch.cdist(piece, centres).argmin(1) for piece in flat.split(5000)])
        counts = torch.bincount(nearest, minlength=modes).clamp_min(1)[:, None]
        centres = torch.zeros_like(centres).index_add_(0, nearest, flat) / counts
    squares = torch.zeros_like(centres).index_add_(0, nearest, (flat - centres[nearest]).square())
    variances = (squares / counts).clamp_min(floor)
    is_large = torch.bincount(nearest, minlength=modes) > 1
    weights = counts[is_large, 0].double() / counts[is_large].sum()
    shape = images.shape[1:]
    covariance = Covariance.diagonal(variances[is_large].reshape(-1, *shape))
    return GaussianMixture(centres[is_large].reshape(-1, *shape), covariance, weights)
