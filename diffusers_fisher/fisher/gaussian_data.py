"""The diffusion Fisher of Gaussian data: for N(m, S) it is (alpha^2 S + sigma^2 I)^-1 at every state."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from ..arguments import check_kinds
from ..distributions.banks import BANK_SUFFIXES, as_bank
from ..distributions.covariance import Covariance, DCTBasis, EigenBasis, ShiftedCovariance
from ..errors import CheckpointError, InputError, UnsupportedError, check_shape
from ..files import expecting, load_tensors, save_tensors
from ..noise import DenoisingState, expand
from .estimator import FisherEstimator, check_estimator
from .operator import CombinedOperator, FisherMatrixOperator

Samples = torch.Tensor | Iterable[torch.Tensor] | str | os.PathLike
"""Clean samples in the model's coordinates (scaled latents): (N, *shape), batches of them, or the path of a `.npy` or
`.safetensors` file with one such tensor, or of a folder of these files, which are read in slices."""

ROWS = 4096  # number of samples that are read at once

FORMAT = "diffusers_fisher.GaussianFisher"
LOW_RANK_LIMIT = 8192


class GaussianFisher(FisherEstimator):
    """Computes the diffusion Fisher of Gaussian data, which is the same at every sample.

    With the mean and covariance of a data set it is the best estimator that does not use the sample. It is exact in
    the limit of high noise, where the noised data are Gaussian. Its products smooth a vector toward the directions in
    which the data vary.

    Cost: no denoiser call. A product takes d multiplications, d (H + W) in a DCT basis and 2 r d for rank r, in
    float64.

    Args:
        covariance: S, one mode.
        mean: m, (*shape). The Fisher does not depend on it; priors use it. None: zeros.
    """

    @check_kinds
    def __init__(self, covariance: Covariance, mean: torch.Tensor | None = None):
        if len(covariance) != 1:
            raise InputError(f"The covariance has {len(covariance)} modes; GaussianFisher takes one.")
        mean = torch.zeros(covariance.shape, dtype=torch.float64) if mean is None else mean.detach().double()
        check_shape("The mean", mean.shape, covariance.shape, "Pass a mean of the covariance's samples.")
        self.covariance = covariance
        self.mean = mean

    @classmethod
    @check_kinds
    def fit_isotropic(cls, samples: Samples) -> GaussianFisher:
        """Fits one variance for all coordinates. Reads `samples` once, in pieces."""
        shape, rows = _rows(samples)
        mean, variances = _moments(rows, _sums_of_squares)
        return cls(Covariance.isotropic(variances.mean(), shape), mean.view(shape))

    @classmethod
    @check_kinds
    def fit_diagonal(cls, samples: Samples, dct: bool = False) -> GaussianFisher:
        """Fits one variance per coordinate. Reads `samples` once, in pieces.

        The coordinates are pixels, or with `dct` those of the discrete cosine transform over the last two axes, in
        which the covariance of images is nearly diagonal.
        """
        shape, rows = _rows(samples)
        basis = DCTBasis(shape) if dct else None
        mean, variances = _moments(map(basis.analyse, rows) if basis else rows, _sums_of_squares)
        mean = basis.synthesise(mean) if basis else mean
        return cls(Covariance.diagonal(_positive(variances).view(1, *shape), basis), mean.view(shape))

    @classmethod
    @check_kinds
    def fit_low_rank(cls, samples: Samples, rank: int) -> GaussianFisher:
        """Fits the `rank` leading principal directions, and one variance per coordinate for the rest.

        Reads `samples` once, in pieces. The fit holds a (d, d) matrix, so d is at most `LOW_RANK_LIMIT`.
        """
        shape, rows = _rows(samples)
        dimensions = math.prod(shape)
        if dimensions > LOW_RANK_LIMIT:
            raise InputError(
                f"A low-rank fit holds a (d, d) matrix, and d = {dimensions} (limit {LOW_RANK_LIMIT}); use "
                "fit_diagonal(samples, dct=True)."
            )
        if not 1 <= rank < dimensions:
            raise InputError(f"`rank` is {rank}; allowed: 1 to {dimensions - 1}.")
        mean, matrix = _moments(rows, lambda offsets: offsets.mT @ offsets)
        values, vectors = torch.linalg.eigh(matrix)
        factor = vectors[:, -rank:] * values[-rank:].clamp_min(0).sqrt()
        remainder = _positive(matrix.diagonal() - factor.square().sum(1))
        return cls(Covariance.low_rank(remainder.view(1, *shape), factor.view(1, *shape, rank)), mean.view(shape))

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> GaussianOperator:
        check_shape(
            "A sample of the state", state.sample.shape[1:], self.covariance.shape, "Fit a Gaussian to such samples."
        )
        return GaussianOperator(state, self.covariance)

    def save(self, path: str | os.PathLike) -> None:
        """Writes one safetensors file, atomically.

        Raises:
            UnsupportedError: the covariance is full. Save its matrix yourself.
        """
        covariance = self.covariance
        if isinstance(covariance.basis, EigenBasis):
            raise UnsupportedError("Full covariances are not saved; fit a low-rank or diagonal one.")
        tensors = {"mean": self.mean, "variances": covariance.variances}
        if covariance.factor is not None:
            tensors["factor"] = covariance.factor
        description = {"shape": list(covariance.shape), "basis": "dct" if covariance.basis is not None else "samples"}
        save_tensors(path, tensors, {"format": FORMAT, "covariance": json.dumps(description)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> GaussianFisher:
        """Reads a file of `save`. Raises `CheckpointError` for any other file."""
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != FORMAT or not {"mean", "variances"} <= set(tensors):
            raise CheckpointError(f"'{path}' holds no GaussianFisher; it holds {sorted(tensors)}.")
        with expecting("a GaussianFisher", path, "fit and save it again"):
            description = json.loads(metadata["covariance"])
            shape = tuple(description["shape"])
            basis = DCTBasis(shape) if description["basis"] == "dct" else None
            return cls(Covariance(shape, tensors["variances"], tensors.get("factor"), basis), tensors["mean"])


class GaussianOperator(FisherMatrixOperator):
    """See `GaussianFisher`."""

    def __init__(self, state: DenoisingState, covariance: Covariance):
        super().__init__(state)
        self._total: ShiftedCovariance = covariance.to(state.sample.device).at(state.level)
        self.chunk_size = 64

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        self._check(v)
        return self._apply(self._total.solve, v)

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._apply(self._total.solve, vectors)

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        # C = sigma^2 S T^-1 is no difference of nearly equal terms, and alpha = 0 is allowed.
        return self._apply(lambda rows: expand(self.state.level.sigma**2, rows) * self._total.shrink(rows), v)

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return self._apply(lambda rows: expand(self.state.level.alpha, rows) * self._total.shrink(rows), v)

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return self._apply(lambda rows: self._total.solve_inverse(rows, shift), v)

    def exact_trace(self) -> tuple[torch.Tensor, int]:
        return self._total.inverse_trace[:, 0].expand(len(self.state.sample)), 0

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        sample = self.state.sample
        return self._total.inverse_diagonal[:, 0].expand(len(sample), -1).reshape(sample.shape), 0

    def _apply(self, function: Callable[[torch.Tensor], torch.Tensor], v: torch.Tensor) -> torch.Tensor:
        """Returns `function` of `v` as float64 (..., B, 1, d), in the shape and dtype of `v` (..., B, *shape)."""
        leading = v.shape[: v.ndim - len(self._total.covariance.shape)]
        return function(v.double().reshape(*leading, 1, -1)).to(v.dtype).reshape(v.shape)


class TraceCorrectedFisher(FisherEstimator):
    """Scales C of the estimator `prior` so that its trace equals that of the estimator `trace`, per sample.

    Args:
        prior: an estimator with cheap products, such as `GaussianFisher`.
        trace: an estimator whose exact trace is cheap, such as `TraceMatchingFisher`.
    """

    @check_kinds
    def __init__(self, prior: FisherEstimator, trace: FisherEstimator):
        self.prior = check_estimator(prior)
        self.trace = check_estimator(trace)

    @property
    def components(self) -> dict[str, FisherEstimator]:
        return {"prior": self.prior, "trace": self.trace}

    @property
    def calls_per_product(self) -> int:
        return self.prior.calls_per_product

    @property
    def default_num_probes(self) -> int | None:
        return self.trace.default_num_probes

    @check_kinds
    def __call__(self, state: DenoisingState, endpoint: torch.Tensor | None = None) -> CombinedOperator:
        prior, trace = self.prior(state, endpoint), self.trace(state, endpoint)
        variance = state.level.sigma.cpu() ** 2
        # With M = I - sigma^2 F: M = ratio * M_prior, so F = ratio * F_prior + (1 - ratio)/sigma^2 I.
        dimensions = state.sample[0].numel()
        target, prior_target = (dimensions - variance * operator.trace().value.cpu() for operator in (trace, prior))
        ratio = target / prior_target
        return CombinedOperator([(ratio, prior)], (1 - ratio) / variance)


def _moments(
    rows: Iterable[torch.Tensor], products_of: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the mean (d,) of batches of rows (N, d), and their variances (d,) or covariance (d, d).

    Args:
        products_of: sums the products of rows (N, d) with themselves: squares (d,), or outer products (d, d).
    """
    count = 0
    centre = total = products = torch.zeros((), dtype=torch.float64)
    for batch in rows:
        centre = batch.mean(0) if count == 0 else centre  # Sums about a point of the data don't cancel.
        offsets = batch - centre
        count, total, products = count + len(batch), total + offsets.sum(0), products + products_of(offsets)
    if count < 2:
        raise InputError(f"{count} samples were given; a covariance needs at least two.")
    return centre + total / count, (products - products_of(total[None]) / count) / (count - 1)


def _sums_of_squares(rows: torch.Tensor) -> torch.Tensor:
    return rows.square().sum(0)


def _rows(samples: Samples) -> tuple[tuple[int, ...], Iterator[torch.Tensor]]:
    """Returns the shape of one sample, and batches of flattened samples (N, d) in float64."""
    batches = _batches(samples)
    first = next(batches, None)
    if first is None or not len(first):
        raise InputError("No samples were given; a covariance needs at least two.")
    return tuple(first.shape[1:]), (batch.double().flatten(1) for batch in itertools.chain([first], batches))


def _batches(samples: Samples) -> Iterator[torch.Tensor]:
    """Yields batches of samples, after a check of their shape and values."""
    shape = None
    for batch in _pieces(samples):
        shape = batch.shape[1:] if shape is None else shape
        if batch.ndim < 2 or batch.shape[1:] != shape or not torch.isfinite(batch).all():
            raise InputError(
                f"A batch of samples has shape {tuple(batch.shape)}; allowed: (N, {', '.join(map(str, shape))}), the "
                "same in every batch, without NaN or infinity."
            )
        yield batch


def _pieces(samples: Samples) -> Iterable[torch.Tensor]:
    if isinstance(samples, torch.Tensor):
        return samples.split(ROWS)
    if not isinstance(samples, str | os.PathLike):
        return samples
    path = Path(samples)
    files = sorted(file for file in path.iterdir() if file.suffix in BANK_SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise InputError(f"The folder '{path}' holds no samples; allowed: {', '.join(BANK_SUFFIXES)} files.")
    bank = as_bank(files)
    return (bank.read(start, start + ROWS) for start in range(0, bank.count, ROWS))


def _positive(variances: torch.Tensor) -> torch.Tensor:
    """Raises variances to at least 1e-6 of their mean, so that constant coordinates don't make S singular."""
    return variances.clamp_min(1e-6 * float(variances.mean().clamp_min(torch.finfo(torch.float64).tiny)))
