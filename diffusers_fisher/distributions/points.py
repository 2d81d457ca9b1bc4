"""Weighted points as a distribution. The points lie in memory, or in files that are read in slices.

Notation: points y_i with weights p_i, a centre c, y'_i = y_i - c, x' = x - alpha c. Responsibilities are
w_i = softmax_i(l_i) with the logits l_i = log p_i + (alpha/sigma^2) <x', y'_i> - (alpha^2/(2 sigma^2)) |y'_i|^2. Terms
that are equal for all points are left out of l_i. Sums over points run over chunks of rows with a running maximum of l
(Milakov and Gimelshein, Online normalizer calculation for softmax, 2018, arXiv 1805.02867), so each row is read once
and used twice.

Precision: products with the rows are in the wider dtype of rows and samples (float32 at least). Sums over chunks,
normalisers, densities, means and scores are float64. In float32 the rounding of the products is up to
6e-8 (alpha/sigma^2) |x'| |y'|, which is 0.01 at Stable Diffusion's smallest sigma. Where that matters, the logits of
all points near the maximum are computed again in float64 from x' - alpha y'_i. Where few points have weight, the
covariance is computed from the differences y_i - E[x_0|x_t], which are rounded only after the subtraction.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import torch

from ..arguments import check_kinds
from ..errors import InputError
from ..noise import NoiseLevel
from .banks import Bank, Points, TensorBank, as_bank
from .mixtures import (
    DEFAULT_MEMORY,
    NEGLIGIBLE,
    Distribution,
    Posterior,
    draw_indices,
    full_precision,
    level_tensors,
    normalise_weights,
)

CACHE_BYTES = {"cpu": 2**22, "cuda": 2**28}  # bytes of a chunk that stay in the cache between its two uses
LOGIT_ERROR = 3e-6  # rounding error that means over responsibilities may have; scores have the same relative error
MIN_PAIRS = 4096  # (sample, point) pairs up to this number are always kept as differences
PAIRS_SHARE = 64  # beyond 1/64 of all pairs, products with all rows are faster than differences
EXACT_PAIRS = 512  # pairs whose logits are computed again together: few enough for the cache
MIN_WIDTH = 32  # number of vectors that one matrix product takes together


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Holds some rows of the points.

    Args:
        rows: y', (n, d).
        squares: |y'|^2, (n,) float64.
        log_weights: log p, (n,) float64, or (1,) where all weights are equal.
    """

    rows: torch.Tensor
    squares: torch.Tensor
    log_weights: torch.Tensor


class DiracMixture(Distribution):
    """Represents weighted points: the empirical distribution of a dataset.

    The constructor reads all points once, to compute their mean and spread and to find NaN. Cost: a posterior over N
    points takes two matrix products, with N x d and d x N, and reads the bank once; a product with its covariance
    takes two more matrix products and reads the bank again. Where few points have weight (at low noise), the first
    product finds these points, and all further products use them alone and cost very little.

    Args:
        points: (N, *shape) tensor or array, on any device; or the path of a `.npy` or `.safetensors` file, or several
            paths whose rows follow each other. A file is never held in memory as a whole. Half precision is converted
            to float32. A tensor is not copied: do not change it. A tensor whose mean is larger than its spread is
            copied and centred.
        weights: (N,), positive with sum one; None: equal weights.
        memory: number of bytes that may be used at once, beside the tensors that were passed. Half is for a chunk with
            its work arrays, half for responsibilities, which repeated products use again. Responsibilities that do
            not fit are computed again for every product.
        chunk_rows: number of rows per chunk; None: as many as fit `memory` and, on a CPU, its cache.
        name: name of the tensor in safetensors files; None: the files hold one tensor each.

    Raises:
        InputError: the bank is empty, points hold NaN, infinity or integers, weights are not positive or do not sum to
            one, `memory` is too small for one row, or the files have different shapes or dtypes.
        CheckpointError: a file can't be read.
    """

    @check_kinds
    def __init__(
        self,
        points: Points,
        weights: torch.Tensor | None = None,
        memory: int = DEFAULT_MEMORY,
        chunk_rows: int | None = None,
        name: str | None = None,
    ):
        self.bank: Bank = as_bank(points, name)
        self.shape, self.count = self.bank.shape, self.bank.count
        self.dimensions = self.shape.numel()
        self.dtype = torch.promote_types(self.bank.dtype, torch.float32)
        self.memory, self.chunk_rows = memory, chunk_rows
        if chunk_rows is not None and chunk_rows < 1:
            raise InputError(f"`chunk_rows` is {chunk_rows}; allowed: 1 or more, or None.")
        self._weights = None if weights is None else normalise_weights(weights, self.count, torch.device("cpu"))
        self.centre = self._choose_centre()
        self._in_memory: tuple[torch.Tensor, torch.Tensor] | None = None
        if isinstance(self.bank, TensorBank):
            self._in_memory = self._centred_rows(slice(0, self.count), None, self.dtype)

    @check_kinds
    def posterior(self, x: torch.Tensor, level: NoiseLevel) -> PointPosterior:
        alpha, sigma = level_tensors(x, level, self.shape)
        with full_precision(x):
            return PointPosterior(self, x, alpha, sigma)

    @check_kinds
    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        indices = draw_indices(self._weights, self.count, count, generator)
        return self.bank.gather(indices).to(generator.device, self.dtype)

    def chunks(self, device: torch.device, dtype: torch.dtype, width: int) -> Iterator[Chunk]:
        """Yields all points in chunks on `device`, with rows in `dtype`.

        Args:
            width: how many numbers the caller computes per row; a chunk leaves memory for them.
        """
        size = self._rows_at_once(device, dtype, width)
        equal_weight = torch.full((1,), -math.log(self.count), dtype=torch.float64, device=device)
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            log_weights = equal_weight if self._weights is None else self._weights[part].to(device).log()
            yield Chunk(*self._centred_rows(part, device, dtype), log_weights)

    def _rows_at_once(self, device: torch.device, dtype: torch.dtype, width: int) -> int:
        """Returns the number of rows that fit half the memory, together with everything computed from them."""
        if self.chunk_rows is not None:
            return self.chunk_rows
        # Bytes per row: four copies of the row in `dtype` and two in float64, and six and two numbers per vector.
        row = self.dimensions * (4 * dtype.itemsize + 16) + width * (6 * dtype.itemsize + 16)
        if self.memory // 2 < row:
            raise InputError(
                f"`memory` is {self.memory} bytes; allowed: {2 * row} or more, for one row of {self.dimensions} "
                f"numbers and its products with {width} vectors."
            )
        cache_bytes = CACHE_BYTES.get(device.type, CACHE_BYTES["cuda"])
        cache_rows = cache_bytes // ((self.dimensions + width) * dtype.itemsize)
        return min(self.memory // 2 // row, max(cache_rows, MIN_WIDTH))

    def _flat_rows(self, part: slice) -> torch.Tensor:
        return self.bank.read(part.start, min(part.stop, self.count)).flatten(1)

    def _centred_rows(
        self, part: slice, device: torch.device | None, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns y' (n, d) and |y'|^2 (n,) of a part of the points; `device` None is the bank's device."""
        if self._in_memory is None:
            rows = self._flat_rows(part).to(device, dtype)
            rows = rows - self.centre.to(rows.device, dtype) if bool(self.centre.any()) else rows
        else:
            rows, squares = (values[part].to(device) for values in self._in_memory)
            if dtype is self.dtype:
                return rows, squares
            rows = rows.to(dtype)  # the squares in memory are those of rows in the points' own dtype
        return rows, _squares(rows)

    def _choose_centre(self) -> torch.Tensor:
        """Reads all rows once and returns the centre c, (d,) float64.

        The centre is the mean where the mean is larger than the spread of the points about it, so that products don't
        cancel. Otherwise it is zero, so that rows are not rounded again.

        Raises:
            InputError: a row holds NaN or infinity.
        """
        total, squares = torch.zeros(self.dimensions, dtype=torch.float64), 0.0
        size = self._rows_at_once(torch.device("cpu"), torch.float64, 1)
        for start in range(0, self.count, size):
            rows = self._flat_rows(slice(start, start + size)).to(self.dtype)
            sums = rows.sum(0, dtype=torch.float64).cpu()
            if not bool(torch.isfinite(sums).all()):
                last = min(start + size, self.count) - 1
                raise InputError(f"Points {start} to {last} hold NaN or infinity. Leave these points out.")
            total, squares = total + sums, squares + float(_squares(rows).sum())
        # The mean is rounded to the rows' dtype, so that exactly the same c is subtracted from rows and samples.
        mean = (total / self.count).to(self.dtype).double()
        # The mean of |y|^2 is |mean|^2 + spread^2, so this compares |mean|^2 with spread^2.
        return mean if 2 * float(mean.square().sum()) > squares / self.count else torch.zeros_like(mean)


class Logits:
    """Computes the logits l_i of one batch of samples for any chunk of points, relative to a running maximum.

    Args:
        offsets: x', (B, d) float64.
        alpha, sigma: (1,) or (B,) float64.
        dtype: dtype of the products with the rows.
    """

    def __init__(self, offsets: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, dtype: torch.dtype):
        self._offsets, self._alpha, self._sigma = offsets, alpha, sigma
        self._slope, self._curvature = alpha / sigma**2, alpha**2 / sigma**2
        self._slopes = (offsets * self._slope[:, None]).to(dtype)
        self._lengths = torch.linalg.vector_norm(offsets, dim=1)
        self._rounding = torch.finfo(dtype).eps / 2
        self._floor = 0.7 * math.log(torch.finfo(dtype).tiny)  # Numbers that are nearly denormal are slow in products.

    def weights(self, chunk: Chunk, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns exp(l - m), (B, n), and m, (B,) float64, the maximum of l over the chunk and of `largest`."""
        logits, maximum = self._relative_logits(chunk, largest)
        return logits.clamp_min_(self._floor).exp_(), maximum

    def _relative_logits(self, chunk: Chunk, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns l - m, (B, n), which exceeds 0 by rounding at most, and m, (B,)."""
        bias = chunk.log_weights - 0.5 * self._curvature[:, None] * chunk.squares
        logits = torch.addmm(bias.to(chunk.rows.dtype), self._slopes, chunk.rows.T)
        maximum = torch.maximum(largest, logits.amax(1).double())
        window = self._window(chunk)
        if not bool((window > 0).any()):
            return logits.sub_(maximum.to(logits.dtype)[:, None]), maximum
        # Logits within the window are computed again in float64. Samples without a window have an infinite threshold.
        threshold = (maximum - window).to(logits.dtype)[:, None]
        samples, points = (logits > torch.where(window[:, None] > 0, threshold, torch.inf)).nonzero(as_tuple=True)
        exact_logits = self._exact_logits(samples, points, chunk)
        # The maximum must be one of the exact logits, because they replace the rounded ones.
        maximum = torch.where(window > 0, largest.scatter_reduce(0, samples, exact_logits, "amax"), maximum)
        logits.sub_(maximum.to(logits.dtype)[:, None])
        logits[samples, points] = (exact_logits - maximum[samples]).to(logits.dtype)
        return logits, maximum

    def _window(self, chunk: Chunk) -> torch.Tensor:
        """Returns how far below the maximum a logit's rounding still matters, (B,); 0 where rounding never matters.

        At a distance u below the maximum, no weight is above e^-u of the largest weight. The rounding errors of the
        logits are independent, so in means they add up to error * sqrt(sum w^2)/sum w <= error * e^(-u/2) for any
        number of points.
        """
        radius = chunk.squares.max().sqrt()
        error = self._rounding * (self._slope * self._lengths * radius + 0.5 * self._curvature * radius**2)
        # The first term solves error * e^(-u/2) = LOGIT_ERROR. The second: maximum and logit are rounded themselves.
        window = 2 * (error / LOGIT_ERROR).log() + 2 * error
        return torch.where(error > LOGIT_ERROR, window, 0.0)

    def _exact_logits(self, samples: torch.Tensor, points: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Returns l of (sample, point) pairs in float64, computed from x' - alpha y'."""
        values = []
        alpha, noise = (value.expand(len(self._offsets)) for value in (self._alpha, self._sigma**2))
        log_weights = chunk.log_weights.expand(len(chunk.rows))
        for sample, point in zip(samples.split(EXACT_PAIRS), points.split(EXACT_PAIRS), strict=True):
            difference = self._offsets[sample] - alpha[sample, None] * chunk.rows[point].double()
            # |x'|^2 is added because l leaves out the term -|x'|^2/(2 sigma^2), which all points share.
            distance = self._lengths[sample].square() - difference.square().sum(1)
            values.append(log_weights[point] + distance / (2 * noise[sample]))
        return torch.cat(values)


class PointPosterior(Posterior):
    """Holds the posterior of a `DiracMixture`.

    The covariance is a centred sum. The first product decides which terms are summed:

    - the differences y_i - E[x_0|x_t] of the (sample, point) pairs that have weight, if there are few such pairs;
    - otherwise all points. Responsibilities that fit `memory` are kept; otherwise every product computes them again.
    """

    def __init__(self, mixture: DiracMixture, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
        self._mixture, self._device = mixture, x.device
        self._dtype = _work_dtype(mixture.dtype, x.dtype)
        self._width = max(len(x), MIN_WIDTH)
        centre = mixture.centre.to(x.device)
        offsets = x.double().flatten(1) - alpha[:, None] * centre
        self._logits = Logits(offsets, alpha, sigma, self._dtype)
        self._largest, self._total, sums, self._weight_cache = self._sweep(len(x))
        self._offset = sums / self._total[:, None]  # E[x_0|x_t] - c
        noise = sigma**2
        # Terms that all points share, which the logits leave out: -|x'|^2/(2 sigma^2) and the Gaussian's constant.
        log_density = self._largest + self._total.log() - 0.5 * offsets.square().sum(1) / noise
        log_density = log_density - 0.5 * mixture.dimensions * (2 * math.pi * noise).log()
        score = (alpha[:, None] * self._offset - offsets) / noise[:, None]
        super().__init__(x, sigma, log_density, self._offset + centre, score)
        self._identity, self._factor = 1 / noise, alpha**2 / noise**2  # F = identity I - factor C

    def _sweep(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list | None]:
        """Returns the largest logit, sum of exp(l - largest) and sum of exp(l - largest) y', float64; and a cache.

        The cache holds exp(l - m), (B, n), of every chunk and the running maximum m, (B,), at that chunk. It is None
        where these do not fit the memory.
        """
        largest = torch.full((batch,), -torch.inf, dtype=torch.float64, device=self._device)
        total = torch.zeros_like(largest)
        sums = torch.zeros(batch, self._mixture.dimensions, dtype=torch.float64, device=self._device)
        fits = batch * self._mixture.count * self._dtype.itemsize <= self._mixture.memory // 2
        cache: list | None = [] if fits else None
        for chunk in self._chunks():
            weights, maximum = self._logits.weights(chunk, largest)
            decay, largest = (largest - maximum).exp(), maximum  # brings earlier sums to the new maximum
            total = total * decay + weights.sum(1).double()
            sums = sums * decay[:, None] + (weights @ chunk.rows).double()
            if cache is not None:
                cache.append((weights, maximum))
        return largest, total, sums, cache

    def _chunks(self) -> Iterator[Chunk]:
        return self._mixture.chunks(self._device, self._dtype, self._width)

    def _rows_with_weights(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields the rows y' (n, d) of every chunk with their responsibilities (B, n)."""
        for index, chunk in enumerate(self._chunks()):
            if self._weight_cache is None:
                weights, _ = self._logits.weights(chunk, self._largest)
                yield chunk.rows, weights.div_(self._total.to(weights.dtype)[:, None])
            else:
                weights, maximum = self._weight_cache[index]
                scale = (maximum - self._largest).exp() / self._total
                yield chunk.rows, weights * scale.to(weights.dtype)[:, None]

    @functools.cached_property
    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
        """Differences and weights of `_centre_pairs`, which replace the cache of weights; None for too many pairs."""
        mixture, batch = self._mixture, len(self._total)
        row = mixture.dimensions * (2 * self._dtype.itemsize + 16)
        limit = min(max(MIN_PAIRS, batch * mixture.count // PAIRS_SHARE), mixture.memory // 2 // row)
        threshold = NEGLIGIBLE * torch.finfo(self._dtype).eps / mixture.count
        pieces: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        count = 0
        for points, weights in self._rows_with_weights():
            sample, point = (weights > threshold).nonzero(as_tuple=True)
            count += len(sample)
            if count > limit:
                return None
            pieces.append((sample, points[point], weights[sample, point]))
        self._weight_cache = None
        samples, rows, shares = map(torch.cat, zip(*pieces, strict=True))
        return _centre_pairs(samples, rows, shares, batch)

    def _covariances(self, vectors: torch.Tensor) -> torch.Tensor:
        vectors = vectors.to(self._dtype)
        if self._pairs is not None:
            pairs = zip(self._pairs, vectors.unbind(1), strict=True)
            return torch.stack([((v @ rows.T) * weights) @ rows for (rows, weights), v in pairs], 1).double()
        # C v = sum_i w_i <y'_i - offset, v> (y'_i - offset). The shift centres the first factor before the products
        # are rounded; the second factor is centred at the end, by the sum of the weighted forms.
        shifts = (vectors.double() * self._offset).sum(-1, keepdim=True).to(self._dtype)
        sums = torch.zeros(vectors.shape, dtype=torch.float64, device=self._device)
        total = torch.zeros_like(sums[..., :1])
        batch_size = self._width // len(self._total)
        for rows, weights in self._rows_with_weights():
            for start in range(0, len(vectors), batch_size):
                part = slice(start, start + batch_size)
                directions, shift = vectors[part].flatten(0, 1), shifts[part].flatten(0, 1)
                forms = torch.addmm(-shift, directions, rows.T).unflatten(0, (-1, len(weights))).mul_(weights)
                sums[part] += (forms.flatten(0, 1) @ rows).double().view_as(sums[part])
                total[part] += forms.sum(-1, keepdim=True).double()
        return sums - total * self._offset

    def _fishers(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._identity[:, None] * vectors - self._factor[:, None] * self._covariances(vectors)

    def _covariance_diagonal(self) -> torch.Tensor:
        if self._pairs is not None:
            return torch.stack([weights.double() @ rows.double().square() for rows, weights in self._pairs])
        result = torch.zeros_like(self._offset)
        # Rows can't be centred for every sample, so sum w (y' - offset)^2 is expanded; float64 bears the cancellation.
        for rows, weights in self._rows_with_weights():
            points, shares = rows.double(), weights.double()
            mean = self._offset * shares.sum(1, keepdim=True) - 2 * (shares @ points)
            result += self._offset * mean + shares @ points.square()
        return result.clamp_min(0)

    def _fisher_diagonal(self) -> torch.Tensor:
        return self._identity[:, None] - self._factor[:, None] * self._covariance_diagonal()

    def _fisher_matrix(self) -> torch.Tensor:
        """Returns F. Cost: one matrix product d x N x d per sample; N is smaller where few points have weight."""
        result = -self._factor[:, None, None] * self._covariance_matrix()
        result.diagonal(dim1=1, dim2=2).add_(self._identity[:, None])
        return result

    def _covariance_matrix(self) -> torch.Tensor:
        if self._pairs is not None:
            return torch.stack([((rows * weights[:, None]).T @ rows).double() for rows, weights in self._pairs])
        size = self._mixture.dimensions
        result = torch.zeros(len(self._total), size, size, dtype=torch.float64, device=self._device)
        offset = self._offset.to(self._dtype)
        for rows, weights in self._rows_with_weights():
            for index, share in enumerate(weights):
                differences = rows - offset[index]
                result[index] += ((differences * share[:, None]).T @ differences).double()
        return result


def _centre_pairs(
    samples: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, batch: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns the points that have weight in each of `batch` posteriors.

    Args:
        samples, rows, weights: sample (P,), row (P, d) and weight (P,) of every (sample, point) pair, in any order.

    Returns:
        The differences y_i - E[x_0|x_t], (n_b, d), and the weights w_i, (n_b,), with sum one, of every sample.
    """
    counts = torch.bincount(samples, minlength=batch).tolist()
    order = samples.argsort(stable=True)
    pairs = []
    for row, weight in zip(rows[order].split(counts), weights[order].split(counts), strict=True):
        points, share = row.double(), weight.double() / weight.double().sum()
        # Differences are rounded after the subtraction.
        pairs.append(((points - share @ points).to(rows.dtype), share.to(rows.dtype)))
    return pairs


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """Returns |y|^2 of every row, (n,) float64, rounded in the rows' dtype: no row depends on the others."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()


def _work_dtype(points: torch.dtype, samples: torch.dtype) -> torch.dtype:
    """Returns the wider dtype; float64 where torch may round float32 matrix products to TF32 or bfloat16."""
    dtype = torch.promote_types(points, samples)
    try:
        keeps_float32 = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch raises this once its newer settings, one per backend, were used
        keeps_float32 = False
    return dtype if keeps_float32 else torch.float64
