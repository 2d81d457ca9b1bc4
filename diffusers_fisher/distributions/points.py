"""Points as a distribution: in memory, or a bank of latents in files that is streamed.

Notation: points y_i with weights p_i, some centre c, y'_i = y_i - c, x' = x - alpha c. Responsibilities are
w_i = softmax_i(l_i), l_i = log p_i + (alpha/sigma^2) <x', y'_i> - (alpha^2/(2 sigma^2)) |y'_i|^2, which leaves out
what all points share. Sums over points run in chunks of rows with a running maximum of l (Milakov and Gimelshein,
Online normalizer calculation for softmax, 2018, arXiv 1805.02867), so rows are read once and used twice.

Precision: products with the rows are in the wider dtype of rows and samples (float32 at least). Sums over chunks,
normalisers, densities, means and scores are float64. In float32 the products' rounding is up to
6e-8 (alpha/sigma^2) |x'| |y'|, which is 0.01 at Stable Diffusion's smallest sigma; where that matters the logits of
all points near the maximum are computed again in float64 from x' - alpha y'_i, and covariances of posteriors that rest
on few points from the differences y_i - E[x_0|x_t], rounded only after they are taken.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import InputError
from ..noise import NoiseLevel
from .banks import Bank, TensorBank, as_bank
from .mixtures import (
    DEFAULT_MEMORY,
    NEGLIGIBLE,
    Distribution,
    Posterior,
    checked_level,
    checked_weights,
    draw_indices,
    full_precision,
)

CACHED_BYTES = {"cpu": 2**22, "cuda": 2**28}  # of one chunk: what stays in a processor's cache between its two uses
LOGIT_ERROR = 3e-6  # that rounding may leave in means over responsibilities; scores err by as much, relatively
MIN_PAIRS = 4096  # (sample, point) pairs that are kept as differences whatever the number of points,
PAIRS_SHARE = 64  # and the part of all pairs beyond which products with all rows are faster
EXACT_PAIRS = 512  # pairs whose logits are computed again at once: few enough for the cache
MIN_WIDTH = 32  # vectors that matrix products take together, where there are as many


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Some rows of the points.

    Args:
        rows: y', (n, d).
        squares: |y'|^2, (n,) float64.
        log_weights: log p, (n,) float64, or (1,) where all are equal.
    """

    rows: torch.Tensor
    squares: torch.Tensor
    log_weights: torch.Tensor


class DiracMixture(Distribution):
    """Weighted points: the empirical law of a dataset.

    Points are read once when it is made, for their mean and spread and to refuse NaN. Cost of a posterior over N
    points: two matrix products, with N x d and d x N, and one reading of the bank; of a product with its covariance:
    two more and another reading. Where posteriors rest on few points (low noise), these are found in one reading, and
    all products after it cost next to nothing.

    Args:
        points: (N, *shape) tensor or array, on any device; or the path of a `.npy` or `.safetensors` file, or several,
            read as one after the other and never held whole. Half precision is widened to float32. Tensors are kept,
            not copied: leave them unchanged. Those whose mean is larger than their spread are centred, in a copy.
        weights: (N,) positive, summing to one; None: equal.
        memory: bytes that may be used at once, beside tensors that were passed: half for a chunk with its work arrays,
            half to keep responsibilities for repeated products. Where these don't fit they are computed again for
            every product.
        chunk_rows: rows at once; None: what fits `memory` and, on a CPU, its cache.
        name: of the tensor in safetensors files; None where they hold only one.

    Raises:
        InputError: an empty bank, NaN or infinity, integer points, weights that don't sum to one or are not positive,
            `memory` too small for one row, files that don't agree. CheckpointError: files that can't be read.
    """

    def __init__(
        self,
        points: Any,
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
        self._weights = None if weights is None else checked_weights(weights, self.count, torch.device("cpu"))
        self.centre = self._choose_centre()
        self._resident = self._all_centred() if isinstance(self.bank, TensorBank) else None

    def posterior(self, x: torch.Tensor, level: NoiseLevel) -> PointPosterior:
        alpha, sigma = checked_level(x, level, self.shape)
        with full_precision(x):
            return PointPosterior(self, x, alpha, sigma)

    def sample(self, count: int, generator: torch.Generator) -> torch.Tensor:
        indices = draw_indices(self._weights, self.count, count, generator)
        return self.bank.gather(indices).to(generator.device, self.dtype)

    def chunks(self, device: torch.device, dtype: torch.dtype, width: int) -> Iterator[Chunk]:
        """All points in pieces on `device`, rows in `dtype`, few enough for `width` numbers beside each row."""
        size = self._rows_at_once(device, dtype, width)
        equal = torch.full((1,), -math.log(self.count), dtype=torch.float64, device=device)
        for start in range(0, self.count, size):
            part = slice(start, start + size)
            resident = self._resident
            if resident is None:
                rows = self._flat_rows(part).to(device, dtype)
                rows = rows - self.centre.to(device, dtype) if bool(self.centre.any()) else rows
            else:
                rows = resident.rows[part].to(device, dtype)
            if resident is None or dtype is not self.dtype:
                squares = _squares(rows)
            else:
                squares = resident.squares[part].to(device)
            weights = equal if self._weights is None else self._weights[part].to(device).log()
            yield Chunk(rows, squares, weights)

    def _rows_at_once(self, device: torch.device, dtype: torch.dtype, width: int) -> int:
        """Rows of a chunk with all that is computed beside them in half the memory."""
        if self.chunk_rows is not None:
            return self.chunk_rows
        row = self.dimensions * (4 * dtype.itemsize + 16) + width * (6 * dtype.itemsize + 16)
        if self.memory // 2 < row:
            raise InputError(
                f"`memory` is {self.memory} bytes; allowed: {2 * row} or more, for one row of {self.dimensions} "
                f"numbers and what {width} vectors need beside it."
            )
        cached = CACHED_BYTES.get(device.type, CACHED_BYTES["cuda"]) // ((self.dimensions + width) * dtype.itemsize)
        return min(self.memory // 2 // row, max(cached, MIN_WIDTH))

    def _flat_rows(self, part: slice) -> torch.Tensor:
        return self.bank.read(part.start, min(part.stop, self.count)).flatten(1)

    def _choose_centre(self) -> torch.Tensor:
        """c, (d,) float64, from one reading of all rows that looks for NaN.

        The mean where it is larger than the points' spread about it, so that products don't cancel; else zero, so
        that rows needn't be rounded again.
        """
        total, squares = torch.zeros(self.dimensions, dtype=torch.float64), 0.0
        size = self._rows_at_once(torch.device("cpu"), torch.float64, 1)
        for start in range(0, self.count, size):
            rows = self._flat_rows(slice(start, start + size)).to(self.dtype)
            sums = rows.sum(0, dtype=torch.float64).cpu()
            if not bool(torch.isfinite(sums).all()):
                raise InputError(f"Points {start} to {min(start + size, self.count) - 1} hold NaN or infinity.")
            total, squares = total + sums, squares + float(_squares(rows).sum())
        mean = (total / self.count).to(self.dtype).double()  # rounded, so that rows and samples lose the same
        return mean if 2 * float(mean.square().sum()) > squares / self.count else torch.zeros_like(mean)

    def _all_centred(self) -> Chunk:
        rows = self._flat_rows(slice(0, self.count)).to(self.dtype)
        if bool(self.centre.any()):
            rows = rows - self.centre.to(rows.device, self.dtype)
        return Chunk(rows, _squares(rows), rows.new_zeros(0))


class Logits:
    """l_i of one batch of samples for any chunk of points, relative to the largest so far.

    Args:
        centred: x', (B, d) float64.
        alpha, sigma: (1,) or (B,) float64.
        dtype: of the products.
    """

    def __init__(self, centred: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, dtype: torch.dtype):
        self._centred, self._alpha, self._sigma = centred, alpha, sigma
        self._slope, self._curvature = alpha / sigma**2, alpha**2 / sigma**2
        self._scaled = (centred * self._slope[:, None]).to(dtype)
        self._lengths = torch.linalg.vector_norm(centred, dim=1)
        self._rounding = torch.finfo(dtype).eps / 2
        self._floor = 0.7 * math.log(torch.finfo(dtype).tiny)  # exp and products of what is nearly denormal are slow

    def weights(self, chunk: Chunk, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """exp(l - m), (B, n), and m = max l (B,) float64 over the chunk and `largest`."""
        logits, found = self._relative(chunk, largest)
        return logits.clamp_min_(self._floor).exp_(), found

    def _relative(self, chunk: Chunk, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """l - m, (B, n) and not above 0 but for rounding, and m (B,)."""
        bias = chunk.log_weights - 0.5 * self._curvature[:, None] * chunk.squares
        logits = torch.addmm(bias.to(chunk.rows.dtype), self._scaled, chunk.rows.T)
        found = torch.maximum(largest, logits.amax(1).double())
        window = self._window(chunk)
        if not bool((window > 0).any()):
            return logits.sub_(found.to(logits.dtype)[:, None]), found
        near = (found - window).to(logits.dtype)[:, None]
        samples, points = (logits > torch.where(window[:, None] > 0, near, torch.inf)).nonzero(as_tuple=True)
        exact = self._exact(samples, points, chunk)
        found = torch.where(window > 0, largest.scatter_reduce(0, samples, exact, "amax"), found)
        logits.sub_(found.to(logits.dtype)[:, None])
        logits[samples, points] = (exact - found[samples]).to(logits.dtype)
        return logits, found

    def _window(self, chunk: Chunk) -> torch.Tensor:
        """(B,): how far below the maximum rounded logits matter; 0 where rounding does not.

        Further below, at distance u, no weight is above e^-u of the largest. Rounding errors of single logits are
        independent, so in means they add up to error * sqrt(sum w^2)/sum w <= error * e^(-u/2), whatever their number.
        """
        radius = chunk.squares.max().sqrt()
        error = self._rounding * (self._slope * self._lengths * radius + 0.5 * self._curvature * radius**2)
        window = 2 * (error / LOGIT_ERROR).log() + 2 * error
        return torch.where(error > LOGIT_ERROR, window, 0.0)

    def _exact(self, samples: torch.Tensor, points: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """l of (sample, point) pairs, float64, from x' - alpha y'."""
        values = []
        alpha, noise = (value.expand(len(self._centred)) for value in (self._alpha, self._sigma**2))
        log_weights = chunk.log_weights.expand(len(chunk.rows))
        for sample, point in zip(samples.split(EXACT_PAIRS), points.split(EXACT_PAIRS), strict=True):
            difference = self._centred[sample] - alpha[sample, None] * chunk.rows[point].double()
            distance = self._lengths[sample].square() - difference.square().sum(1)
            values.append(log_weights[point] + distance / (2 * noise[sample]))
        return torch.cat(values)


class PointPosterior(Posterior):
    """See `DiracMixture`. Covariances, in centred form, are sums over

    - the differences y_i - E[x_0|x_t] of all pairs of samples and points that have weight, where these are few;
    - else all points, with responsibilities that were kept where they fit, or else computed again.

    Which one is decided at the first product.
    """

    def __init__(self, mixture: DiracMixture, x: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor):
        self._mixture, self._device = mixture, x.device
        self._dtype = _work_dtype(mixture.dtype, x.dtype)
        self._width = max(len(x), MIN_WIDTH)
        self._pairs: Pairs | None = None
        self._decided = False
        centre = mixture.centre.to(x.device)
        centred = x.double().flatten(1) - alpha[:, None] * centre
        self._logits = Logits(centred, alpha, sigma, self._dtype)
        self._largest, self._total, sums, self._kept = self._sweep(len(x))
        self._offset = sums / self._total[:, None]  # E[x_0|x_t] - c
        noise = sigma**2
        log_density = self._largest + self._total.log() - 0.5 * centred.square().sum(1) / noise
        log_density = log_density - 0.5 * mixture.dimensions * (2 * math.pi * noise).log()
        score = (alpha[:, None] * self._offset - centred) / noise[:, None]
        super().__init__(x, alpha, sigma, log_density, self._offset + centre, score)
        self._identity, self._factor = 1 / noise, alpha**2 / noise**2  # F = identity I - factor C

    def _sweep(self, batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list | None]:
        """Largest logit, sum of exp(l - largest) and sum of exp(l - largest) y', float64; and what was kept.

        Kept are exp(l - m) (B, n) of every chunk with the maximum m (B,) at its time, where they fit.
        """
        largest = torch.full((batch,), -torch.inf, dtype=torch.float64, device=self._device)
        total = torch.zeros_like(largest)
        sums = torch.zeros(batch, self._mixture.dimensions, dtype=torch.float64, device=self._device)
        fits = batch * self._mixture.count * self._dtype.itemsize <= self._mixture.memory // 2
        kept: list | None = [] if fits else None
        for chunk in self._chunks():
            weights, found = self._logits.weights(chunk, largest)
            decay, largest = (largest - found).exp(), found
            total = total * decay + weights.sum(1).double()
            sums = sums * decay[:, None] + (weights @ chunk.rows).double()
            if kept is not None:
                kept.append((weights, found))
        return largest, total, sums, kept

    def _chunks(self) -> Iterator[Chunk]:
        return self._mixture.chunks(self._device, self._dtype, self._width)

    def _weighted(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows y' (n, d) of every chunk with their responsibilities (B, n)."""
        for index, chunk in enumerate(self._chunks()):
            if self._kept is None:
                weights, _ = self._logits.weights(chunk, self._largest)
                yield chunk.rows, weights.div_(self._total.to(weights.dtype)[:, None])
            else:
                weights, found = self._kept[index]
                scale = (found - self._largest).exp() / self._total
                yield chunk.rows, weights * scale.to(weights.dtype)[:, None]

    def _few(self) -> Pairs | None:
        """The pairs that have weight, where they are few enough."""
        if not self._decided:
            self._pairs, self._decided = self._find_pairs(), True
            self._kept = self._kept if self._pairs is None else None
        return self._pairs

    def _find_pairs(self) -> Pairs | None:
        mixture, batch = self._mixture, len(self._total)
        row = mixture.dimensions * (2 * self._dtype.itemsize + 16)
        limit = min(max(MIN_PAIRS, batch * mixture.count // PAIRS_SHARE), mixture.memory // 2 // row)
        tiny = NEGLIGIBLE * torch.finfo(self._dtype).eps / mixture.count
        samples, rows, shares, found = [], [], [], 0
        for points, weights in self._weighted():
            sample, point = (weights > tiny).nonzero(as_tuple=True)
            found += len(sample)
            if found > limit:
                return None
            samples.append(sample)
            rows.append(points[point])
            shares.append(weights[sample, point])
        return Pairs.of(torch.cat(samples), torch.cat(rows), torch.cat(shares), batch)

    def _covariances(self, vectors: torch.Tensor) -> torch.Tensor:
        few, vectors = self._few(), vectors.to(self._dtype)
        if few is not None:
            return few.products(vectors)
        shifts = (vectors.double() * self._offset).sum(-1, keepdim=True).to(self._dtype)
        sums = torch.zeros(vectors.shape, dtype=torch.float64, device=self._device)
        total = torch.zeros_like(sums[..., :1])
        together = self._width // len(self._total)
        for rows, weights in self._weighted():
            for start in range(0, len(vectors), together):
                part = slice(start, start + together)
                flat, shift = vectors[part].flatten(0, 1), shifts[part].flatten(0, 1)
                forms = torch.addmm(-shift, flat, rows.T).unflatten(0, (-1, len(weights))).mul_(weights)
                sums[part] += (forms.flatten(0, 1) @ rows).double().view_as(sums[part])
                total[part] += forms.sum(-1, keepdim=True).double()
        return sums - total * self._offset

    def _fishers(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._identity[:, None] * vectors - self._factor[:, None] * self._covariances(vectors)

    def _covariance_diagonal(self) -> torch.Tensor:
        few = self._few()
        if few is not None:
            return few.diagonal()
        result = torch.zeros_like(self._offset)
        for rows, weights in self._weighted():  # in float64, because the rows can't be centred for every sample
            wide, shares = rows.double(), weights.double()
            mean = self._offset * shares.sum(1, keepdim=True) - 2 * (shares @ wide)
            result += self._offset * mean + shares @ wide.square()
        return result.clamp_min(0)

    def _fisher_diagonal(self) -> torch.Tensor:
        return self._identity[:, None] - self._factor[:, None] * self._covariance_diagonal()

    def _fisher_matrix(self) -> torch.Tensor:
        """Cost: a matrix product d x N x d a sample, with fewer rows where few points have weight."""
        result = -self._factor[:, None, None] * self._covariance_matrix()
        result.diagonal(dim1=1, dim2=2).add_(self._identity[:, None])
        return result

    def _covariance_matrix(self) -> torch.Tensor:
        few, size = self._few(), self._mixture.dimensions
        if few is not None:
            return few.matrix()
        result = torch.zeros(len(self._total), size, size, dtype=torch.float64, device=self._device)
        offset = self._offset.to(self._dtype)
        for rows, weights in self._weighted():
            for index, share in enumerate(weights):
                centred = rows - offset[index]
                result[index] += ((centred * share[:, None]).T @ centred).double()
        return result


@dataclasses.dataclass(frozen=True)
class Pairs:
    """What the posteriors of a batch rest on, where that is little: differences and weights of every sample.

    Args:
        differences: y_i - E[x_0|x_t], (n_b, d) for each of B samples.
        weights: w_i, (n_b,) each, summing to one.
    """

    differences: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, samples: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, batch: int) -> Pairs:
        """From the sample (P,), the row (P, d) and the weight (P,) of every pair, in any order."""
        counts = torch.bincount(samples, minlength=batch).tolist()
        order = samples.argsort(stable=True)
        differences, shares = [], []
        for row, weight in zip(rows[order].split(counts), weights[order].split(counts), strict=True):
            wide, share = row.double(), weight.double() / weight.double().sum()
            differences.append((wide - share @ wide).to(rows.dtype))
            shares.append(share.to(rows.dtype))
        return cls(tuple(differences), tuple(shares))

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """C v of (k, B, d) vectors, float64."""
        parts = zip(self.differences, self.weights, vectors.unbind(1), strict=True)
        products = [((v @ rows.T) * weights) @ rows for rows, weights, v in parts]
        return torch.stack(products, 1).double()

    def diagonal(self) -> torch.Tensor:
        """The diagonal of C, (B, d) float64."""
        pairs = zip(self.differences, self.weights, strict=True)
        return torch.stack([weights.double() @ rows.double().square() for rows, weights in pairs])

    def matrix(self) -> torch.Tensor:
        """C, (B, d, d) float64."""
        pairs = zip(self.differences, self.weights, strict=True)
        return torch.stack([((rows * weights[:, None]).T @ rows).double() for rows, weights in pairs])


def _squares(rows: torch.Tensor) -> torch.Tensor:
    """(n,) float64, of the rows' precision: the same whatever the rows' company."""
    return torch.linalg.vector_norm(rows, dim=1).double().square()


def _work_dtype(stored: torch.dtype, given: torch.dtype) -> torch.dtype:
    """The wider of the two; float64 where float32 matrix products were allowed to be rounded to TF32 or bfloat16."""
    wider = torch.promote_types(stored, given)
    try:
        full = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch refuses to say once its newer, per backend settings were used
        full = False
    return wider if full else torch.float64
