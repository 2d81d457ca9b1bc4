"""Structured covariances of Gaussian modes, and what one noise level makes of them.

Notation: S = Q (diag(D) + U U^T) Q^T is the covariance of one mode over the d dimensions of one sample, Q orthonormal.
At a noise level T = alpha^2 S + sigma^2 I, and more generally T = a S + b I with a, b >= 0. With B = a D + b,
L L^T = I + a U^T B^-1 U (Cholesky) and V = B^-1 U L^-T (Woodbury), in the coordinates of Q:
T^-1 = diag(1/B) - a V V^T,  S T^-1 = diag(D/B) + b V V^T,  log det T = sum log B + 2 sum log diag L.
Neither divides by a or by b, so alpha = 0 is an ordinary level.

Everything is float64, whatever comes in: D/B and a V V^T cancel where S is far larger than sigma^2.
"""

from __future__ import annotations

import functools
import math
from typing import Protocol

import torch

from ..errors import InputError
from ..noise import NoiseLevel


class Basis(Protocol):
    """Orthonormal coordinates z = Q^T v of flattened vectors (..., d)."""

    def analyse(self, v: torch.Tensor) -> torch.Tensor:
        """Q^T v."""

    def synthesise(self, z: torch.Tensor) -> torch.Tensor:
        """Q z."""

    def diagonal(self, p: torch.Tensor) -> torch.Tensor:
        """The diagonal of Q diag(p) Q^T."""

    def to(self, device: torch.device) -> Basis:
        """The same basis on `device`."""


class DCTBasis:
    """The orthonormal discrete cosine transform (type II) over the last two axes of samples of `shape` (..., H, W).

    Two small matrices, so a product costs d (H + W) and none of size d x d is built.
    """

    def __init__(self, shape: tuple[int, ...]):
        if len(shape) < 2:
            raise InputError(f"A DCT basis needs samples with two axes or more, got shape {tuple(shape)}.")
        self.shape = tuple(shape)
        self._rows, self._columns = _dct_matrix(shape[-2]), _dct_matrix(shape[-1])

    def analyse(self, v: torch.Tensor) -> torch.Tensor:
        return self._apply(self._rows, v, self._columns.mT)

    def synthesise(self, z: torch.Tensor) -> torch.Tensor:
        return self._apply(self._rows.mT, z, self._columns)

    def diagonal(self, p: torch.Tensor) -> torch.Tensor:
        return self._apply(self._rows.square().mT, p, self._columns.square())

    def to(self, device: torch.device) -> DCTBasis:
        moved = DCTBasis(self.shape)
        moved._rows, moved._columns = self._rows.to(device), self._columns.to(device)
        return moved

    def _apply(self, left: torch.Tensor, v: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left @ v.unflatten(-1, self.shape) @ right).flatten(-len(self.shape))


class EigenBasis:
    """A basis for every mode, the columns of `vectors` (K, d, d); vectors are then (..., K, d) or (..., 1, d)."""

    def __init__(self, vectors: torch.Tensor):
        self.vectors = vectors

    def analyse(self, v: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...kd,kde->...ke", v, self.vectors)

    def synthesise(self, z: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...ke,kde->...kd", z, self.vectors)

    def diagonal(self, p: torch.Tensor) -> torch.Tensor:
        return torch.einsum("...ke,kde->...kd", p, self.vectors.square())

    def to(self, device: torch.device) -> EigenBasis:
        return EigenBasis(self.vectors.to(device))


class Covariance:
    """Covariances of K modes in one of four structures; made by the class methods, float64.

    One mode may serve any number of means. Vectors are flattened, (..., K, d) or (..., 1, d) for the same one in every
    mode, results (..., K, d).

    Attributes:
        shape: of one sample; d is its product.
        variances: D, (K, d), or (K, 1) where isotropic.
        factor: U, (K, d, r), or None.
        basis: Q, or None for the sample's own coordinates.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        variances: torch.Tensor,
        factor: torch.Tensor | None = None,
        basis: Basis | None = None,
    ):
        self.shape = tuple(shape)
        self.variances = variances
        self.factor = factor
        self.basis = basis

    @classmethod
    def isotropic(cls, variances: float | torch.Tensor, shape: tuple[int, ...]) -> Covariance:
        """S_k = v_k I; `variances` a number or (K,), zero for points.

        Raises:
            InputError: negative or NaN variances, a dtype other than float32 or float64, an empty `shape`.
        """
        given = variances if isinstance(variances, torch.Tensor) else torch.tensor(variances, dtype=torch.float64)
        values = _wide("variances", given)
        if values.ndim > 1 or not values.numel() or not math.prod(shape):
            raise InputError(
                f"Isotropic variances have shape {tuple(values.shape)} for samples {tuple(shape)}; allowed: a number "
                "or (K,), and samples of one dimension or more."
            )
        _check_positive(values, "Isotropic variances", zero=True)
        return cls(shape, values.reshape(-1, 1))

    @classmethod
    def diagonal(cls, variances: torch.Tensor, basis: Basis | None = None) -> Covariance:
        """S_k = Q diag(v_k) Q^T; `variances` (K, *shape), positive.

        Args:
            basis: None for the sample's own coordinates, or `DCTBasis(shape)`, whose coordinates `variances` are then.
        """
        values = _wide("variances", variances)
        if values.ndim < 2 or not values.numel():
            raise InputError(
                f"Diagonal variances have shape {tuple(values.shape)}; allowed: (K, *shape), one mode as "
                "variances[None]."
            )
        _check_positive(values, "Diagonal variances")
        return cls(tuple(values.shape[1:]), values.flatten(1), basis=_fitting(basis, values.shape[1:]))

    @classmethod
    def low_rank(cls, variances: torch.Tensor, factor: torch.Tensor, basis: Basis | None = None) -> Covariance:
        """S_k = Q (diag(v_k) + U_k U_k^T) Q^T; `variances` (K, *shape) positive, `factor` (K, *shape, r).

        Cost: r^2 d a mode at every new level, 2 r d a product.
        """
        diagonal = cls.diagonal(variances, basis)
        values = _wide("factor", factor)
        if values.shape[:-1] != variances.shape or not values.shape[-1]:
            raise InputError(
                f"The factor has shape {tuple(values.shape)} beside variances {tuple(variances.shape)}; allowed: "
                f"{(*variances.shape, 'r')} with rank r of one or more."
            )
        return cls(diagonal.shape, diagonal.variances, values.flatten(1, -2), diagonal.basis)

    @classmethod
    def full(cls, matrices: torch.Tensor, shape: tuple[int, ...]) -> Covariance:
        """Any symmetric positive definite S_k; `matrices` (K, d, d). Cost: d^3 a mode, once; d^2 a product."""
        values, size = _wide("matrices", matrices), math.prod(shape)
        if values.ndim != 3 or values.shape[1:] != (size, size) or not values.numel():
            raise InputError(
                f"Full covariances have shape {tuple(values.shape)} for samples {tuple(shape)}; allowed: "
                f"(K, {size}, {size}), one mode as matrix[None]."
            )
        # float32 matrices are symmetric to their own rounding only
        if float((values - values.mT).abs().max()) > 1e-5 * float(values.abs().max()):
            raise InputError("Full covariances must be symmetric; pass (S + S.mT)/2 if that is what you mean.")
        eigenvalues, vectors = torch.linalg.eigh((values + values.mT) / 2)
        _check_positive(eigenvalues, "Eigenvalues of full covariances")
        return cls(shape, eigenvalues, basis=EigenBasis(vectors))

    def __len__(self) -> int:
        return len(self.variances)

    @property
    def dimensions(self) -> int:
        """d."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """Columns of U, 0 where there are none."""
        return 0 if self.factor is None else self.factor.shape[-1]

    def select(self, modes: torch.Tensor) -> Covariance:
        """The covariances of `modes` (n,); itself where one serves all."""
        if len(self) == 1:
            return self
        factor = None if self.factor is None else self.factor[modes]
        basis = EigenBasis(self.basis.vectors[modes]) if isinstance(self.basis, EigenBasis) else self.basis
        return Covariance(self.shape, self.variances[modes], factor, basis)

    def to(self, device: torch.device) -> Covariance:
        """The same covariances on `device`."""
        if self.variances.device == device:
            return self
        factor = None if self.factor is None else self.factor.to(device)
        return Covariance(self.shape, self.variances.to(device), factor, self.basis and self.basis.to(device))

    def at(self, level: NoiseLevel) -> ShiftedCovariance:
        """T = alpha^2 S + sigma^2 I, the covariance of the noised mode."""
        return self.shifted(level.alpha**2, level.sigma**2)

    def shifted(self, scale: torch.Tensor, shift: torch.Tensor) -> ShiftedCovariance:
        """T = scale * S + shift * I; both () or (B,) and not negative, T positive definite."""
        device = self.variances.device
        return ShiftedCovariance(self, *(value.double().reshape(-1).to(device) for value in (scale, shift)))

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """S v."""
        z = self._analyse(v)
        result = self.variances * z
        if self.factor is not None:
            inner = torch.einsum("kdr,...kd->...kr", self.factor, z)
            result = result + torch.einsum("kdr,...kr->...kd", self.factor, inner)
        return self._synthesise(result)

    def dense(self) -> torch.Tensor:
        """S as matrices (K, d, d)."""
        identity = torch.eye(self.dimensions, dtype=torch.float64, device=self.variances.device)
        return self.product(identity[:, None]).expand(-1, len(self), -1).permute(1, 2, 0)

    def draw(self, modes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """One vector of mean zero and covariance S_k for each of `modes` (n,) int64: (n, d).

        The square root is [diag(D)^(1/2), U], so the random numbers are n (d + r), on the generator's device.
        """
        covariance, modes = self.to(generator.device), modes.to(generator.device)
        noise = torch.randn(
            len(modes), self.dimensions + self.rank, dtype=torch.float64, device=modes.device, generator=generator
        )
        modes = torch.zeros_like(modes) if len(self) == 1 else modes
        result = noise[:, : self.dimensions].clone()
        for mode in modes.unique():  # one mode at a time: a basis for every draw would be n d^2 numbers
            rows, one = modes == mode, covariance.select(mode[None])
            z = one.variances.sqrt() * noise[rows][:, : self.dimensions]
            if one.factor is not None:
                z = z + noise[rows][:, self.dimensions :] @ one.factor[0].mT
            result[rows] = one._synthesise(z[:, None])[:, 0]
        return result

    def _analyse(self, v: torch.Tensor) -> torch.Tensor:
        return v if self.basis is None else self.basis.analyse(v)

    def _synthesise(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.basis is None else self.basis.synthesise(z)


class ShiftedCovariance:
    """T = a S + b I for levels (b,) that are one or as many as samples; made by `Covariance.at` and `.shifted`.

    Vectors are float64, (..., B, K, d), with 1 for K where all modes have the same; results (..., B, K, d). T, its
    inverse and S commute. Determinants, traces and diagonals are (1 or B, K) and (1 or B, K, d).
    """

    def __init__(self, covariance: Covariance, scale: torch.Tensor, shift: torch.Tensor):
        self.covariance = covariance
        self._scale, self._shift = (value[:, None, None] for value in (scale, shift))
        self._base = self._scale * covariance.variances + self._shift  # B, (1 or B, K, d or 1)

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """T v."""
        return self._scale * self.covariance.product(v) + self._shift * v

    def solve(self, v: torch.Tensor) -> torch.Tensor:
        """T^-1 v."""
        return self._apply(1 / self._base, -self._scale, v)

    def shrink(self, v: torch.Tensor) -> torch.Tensor:
        """S T^-1 v: a mode's posterior covariance is sigma^2 S T^-1."""
        return self._apply(self.covariance.variances / self._base, self._shift, v)

    def solve_inverse(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """(T^-1 + shift I)^-1 v = T (I + shift T)^-1 v; `shift` () or (B,), not negative."""
        shift = shift.double().to(v.device).reshape(-1)
        scale, base = shift * self._scale[:, 0, 0], 1 + shift * self._shift[:, 0, 0]
        return self.product(self.covariance.shifted(scale, base).solve(v))

    @functools.cached_property
    def log_determinant(self) -> torch.Tensor:
        """log det T, (1 or B, K)."""
        result = self._sum(self._base.log())
        if self._woodbury is None:
            return result
        return result + 2 * self._woodbury[0].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def inverse_trace(self) -> torch.Tensor:
        """tr T^-1, (1 or B, K)."""
        return self._trace(1 / self._base, -self._scale)

    @property
    def inverse_diagonal(self) -> torch.Tensor:
        """The diagonal of T^-1, (1 or B, K, d)."""
        return self._diagonal(1 / self._base, -self._scale)

    @property
    def shrink_trace(self) -> torch.Tensor:
        """tr S T^-1, (1 or B, K)."""
        return self._trace(self.covariance.variances / self._base, self._shift)

    @property
    def shrink_diagonal(self) -> torch.Tensor:
        """The diagonal of S T^-1, (1 or B, K, d)."""
        return self._diagonal(self.covariance.variances / self._base, self._shift)

    @functools.cached_property
    def _woodbury(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """L (1 or B, K, r, r) and V^T (1 or B, K, r, d)."""
        factor = self.covariance.factor
        if factor is None:
            return None
        divided = factor / self._base[..., None]
        core = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        lower = torch.linalg.cholesky(core + self._scale[..., None] * (factor.mT @ divided))
        return lower, torch.linalg.solve_triangular(lower, divided.mT, upper=False)

    # Matrices Q (diag(p) + c V V^T) Q^T, p (1 or B, K, d or 1) and c (1 or B, 1, 1)

    def _apply(self, p: torch.Tensor, c: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        z = self.covariance._analyse(v)
        result = p * z
        if self._woodbury is not None:
            rows = self._woodbury[1]
            inner = torch.einsum("...krd,...kd->...kr", rows, z)
            result = result + c * torch.einsum("...krd,...kr->...kd", rows, inner)
        return self.covariance._synthesise(result)

    def _trace(self, p: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        result = self._sum(p)
        return result if self._woodbury is None else result + c[..., 0] * self._woodbury[1].square().sum((-1, -2))

    def _diagonal(self, p: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        basis = self.covariance.basis
        result = p.expand(*p.shape[:-1], self.covariance.dimensions)
        result = result if basis is None else basis.diagonal(result)
        if self._woodbury is None:
            return result
        rows = self._woodbury[1].movedim(-2, 0)  # (r, 1 or B, K, d): the rank before the modes, as bases take it
        return result + c * self.covariance._synthesise(rows).square().sum(0)

    def _sum(self, p: torch.Tensor) -> torch.Tensor:
        return p.sum(-1) * (self.covariance.dimensions // p.shape[-1])


def _dct_matrix(size: int) -> torch.Tensor:
    """(size, size) float64, orthonormal: row j is the j-th cosine."""
    import numpy
    from scipy.fft import dct

    return torch.from_numpy(dct(numpy.eye(size), type=2, norm="ortho", axis=0))


def _wide(name: str, value: torch.Tensor) -> torch.Tensor:
    """`value` as float64. Half precision is refused: eight bits of a variance are not enough to invert it."""
    if value.dtype not in (torch.float32, torch.float64):
        raise InputError(
            f"`{name}` of a covariance has dtype {value.dtype}; allowed: float32, float64. Convert it first."
        )
    if not bool(torch.isfinite(value).all()):
        raise InputError(f"`{name}` of a covariance holds NaN or infinity.")
    return value.detach().double()


def _check_positive(values: torch.Tensor, name: str, zero: bool = False) -> None:
    smallest = float(values.min())
    if smallest < 0 or (smallest == 0 and not zero):
        raise InputError(
            f"{name} must {'not be negative' if zero else 'be positive'}; the smallest is {smallest:.3g}."
            + ("" if zero else " Add a small multiple of the identity.")
        )


def _fitting(basis: Basis | None, shape: tuple[int, ...]) -> Basis | None:
    if isinstance(basis, DCTBasis) and basis.shape != tuple(shape):
        raise InputError(
            f"The basis is for samples {basis.shape}, the covariance for {tuple(shape)}; they must agree."
        )
    return basis
