"""Structured covariances of Gaussian modes, and the covariances of the same modes after noise was added.

Notation: S = Q (diag(D) + U U^T) Q^T is the covariance of one mode over the d dimensions of one sample. Q is
orthonormal. At a noise level the covariance is T = alpha^2 S + sigma^2 I; this module computes T = a S + b I for all
a, b >= 0. With B = a D + b, L L^T = I + a U^T B^-1 U (Cholesky) and V = B^-1 U L^-T (Woodbury), in the coordinates of
Q: T^-1 = diag(1/B) - a V V^T,  S T^-1 = diag(D/B) + b V V^T,  log det T = sum log B + 2 sum log diag L.
No formula divides by a or by b, so alpha = 0 is an ordinary level.

All arithmetic is float64, whatever the dtype of the inputs: D/B and a V V^T cancel where S is far larger than sigma^2.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from ..arguments import check_kinds
from ..errors import InputError
from ..noise import NoiseLevel


class DCTBasis:
    """Transforms samples of `shape` (..., H, W) by the orthonormal discrete cosine transform over the last two axes.

    The transform is of type II. It multiplies by two small matrices: a product costs d (H + W) operations, and no
    matrix of size d x d is built. The methods take flattened samples (..., d).
    """

    @check_kinds
    def __init__(self, shape: tuple[int, ...]):
        if len(shape) < 2:
            raise InputError(f"A DCT basis needs samples with two axes or more, got shape {tuple(shape)}.")
        self.shape = tuple(shape)
        self._rows, self._columns = _dct_matrix(shape[-2]), _dct_matrix(shape[-1])

    def analyse(self, v: torch.Tensor) -> torch.Tensor:
        """Returns Q^T v."""
        return self._apply(self._rows, v, self._columns.mT)

    def synthesise(self, z: torch.Tensor) -> torch.Tensor:
        """Returns Q z."""
        return self._apply(self._rows.mT, z, self._columns)

    def diagonal(self, p: torch.Tensor) -> torch.Tensor:
        """Returns the diagonal of Q diag(p) Q^T."""
        return self._apply(self._rows.square().mT, p, self._columns.square())

    def to(self, device: torch.device) -> DCTBasis:
        """Returns the same basis on `device`."""
        basis = DCTBasis(self.shape)
        basis._rows, basis._columns = self._rows.to(device), self._columns.to(device)
        return basis

    def _apply(self, left: torch.Tensor, v: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return (left @ v.unflatten(-1, self.shape) @ right).flatten(-len(self.shape))


class EigenBasis:
    """Holds one basis per mode: the columns of `vectors` (K, d, d).

    The methods are those of `DCTBasis`. They take vectors of shape (..., K, d), or (..., 1, d) where all modes have
    the same vector.
    """

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


Basis = DCTBasis | EigenBasis
"""Orthonormal coordinates z = Q^T v of flattened vectors."""


@dataclasses.dataclass(eq=False, repr=False)
class Covariance:
    """Holds the covariances of K modes, in float64. The class methods make it, one per structure.

    A covariance of one mode may be shared by any number of means. Vectors are flattened: they have the shape
    (..., K, d), or (..., 1, d) where all modes have the same vector. Results have the shape (..., K, d).

    Attributes:
        shape: shape of one sample; d is its product.
        variances: D, (K, d), or (K, 1) for isotropic covariances.
        factor: U, (K, d, r), or None for covariances without a factor.
        basis: Q, or None for the sample's own coordinates.
    """

    shape: tuple[int, ...]
    variances: torch.Tensor
    factor: torch.Tensor | None = None
    basis: Basis | None = None

    @classmethod
    @check_kinds
    def isotropic(cls, variances: float | torch.Tensor, shape: tuple[int, ...]) -> Covariance:
        """Returns S_k = v_k I.

        Args:
            variances: a number, or (K,); zero for points.
            shape: shape of one sample.

        Raises:
            InputError: variances are negative or NaN, the dtype is not float32 or float64, or `shape` is empty.
        """
        if not isinstance(variances, torch.Tensor):
            variances = torch.tensor(variances, dtype=torch.float64)
        values = _to_float64("variances", variances)
        if values.ndim > 1 or not values.numel() or not math.prod(shape):
            raise InputError(
                f"Isotropic variances have shape {tuple(values.shape)} for samples {tuple(shape)}; allowed: a number "
                "or (K,), and samples of one dimension or more."
            )
        _check_positive(values, "Isotropic variances", zero=True)
        return cls(tuple(shape), values.reshape(-1, 1))

    @classmethod
    @check_kinds
    def diagonal(cls, variances: torch.Tensor, basis: Basis | None = None) -> Covariance:
        """Returns S_k = Q diag(v_k) Q^T.

        Args:
            variances: (K, *shape), positive; variances along the basis vectors.
            basis: None for the sample's own coordinates, or `DCTBasis(shape)`.
        """
        values = _to_float64("variances", variances)
        if values.ndim < 2 or not values.numel():
            raise InputError(
                f"Diagonal variances have shape {tuple(values.shape)}; allowed: (K, *shape). Pass variances[None] for "
                "one mode."
            )
        _check_positive(values, "Diagonal variances")
        if isinstance(basis, DCTBasis) and basis.shape != tuple(values.shape[1:]):
            raise InputError(
                f"The basis is for samples of shape {basis.shape}, the covariance for {tuple(values.shape[1:])}. Pass "
                f"DCTBasis({tuple(values.shape[1:])})."
            )
        return cls(tuple(values.shape[1:]), values.flatten(1), basis=basis)

    @classmethod
    @check_kinds
    def low_rank(cls, variances: torch.Tensor, factor: torch.Tensor, basis: Basis | None = None) -> Covariance:
        """Returns S_k = Q (diag(v_k) + U_k U_k^T) Q^T.

        Cost: r^2 d operations per mode at every new level, and 2 r d operations per product.

        Args:
            variances: (K, *shape), positive; variances along the basis vectors.
            factor: U, (K, *shape, r).
            basis: None for the sample's own coordinates, or `DCTBasis(shape)`.
        """
        diagonal = cls.diagonal(variances, basis)
        values = _to_float64("factor", factor)
        if values.shape[:-1] != variances.shape or not values.shape[-1]:
            raise InputError(
                f"The factor has shape {tuple(values.shape)}, the variances {tuple(variances.shape)}; allowed: a "
                f"factor of shape {(*variances.shape, 'r')} with a rank r of one or more."
            )
        return cls(diagonal.shape, diagonal.variances, values.flatten(1, -2), diagonal.basis)

    @classmethod
    @check_kinds
    def full(cls, matrices: torch.Tensor, shape: tuple[int, ...]) -> Covariance:
        """Returns covariances for any symmetric positive definite S_k.

        Cost: d^3 operations per mode, once, and d^2 operations per product.

        Args:
            matrices: S, (K, d, d).
            shape: shape of one sample.
        """
        values, size = _to_float64("matrices", matrices), math.prod(shape)
        if values.ndim != 3 or values.shape[1:] != (size, size) or not values.numel():
            raise InputError(
                f"Full covariances have shape {tuple(values.shape)} for samples {tuple(shape)}; allowed: "
                f"(K, {size}, {size}). Pass matrix[None] for one mode."
            )
        # A float32 matrix is symmetric only up to float32 rounding.
        if float((values - values.mT).abs().max()) > 1e-5 * float(values.abs().max()):
            raise InputError("Full covariances must be symmetric. Pass (S + S.mT)/2 to drop the antisymmetric part.")
        eigenvalues, vectors = torch.linalg.eigh((values + values.mT) / 2)
        _check_positive(eigenvalues, "Eigenvalues of full covariances")
        return cls(tuple(shape), eigenvalues, basis=EigenBasis(vectors))

    def __len__(self) -> int:
        return len(self.variances)

    @property
    def dimensions(self) -> int:
        """The number of dimensions d of one sample."""
        return math.prod(self.shape)

    @property
    def rank(self) -> int:
        """The number of columns of U; 0 without a factor."""
        return 0 if self.factor is None else self.factor.shape[-1]

    def select(self, modes: torch.Tensor) -> Covariance:
        """Returns the covariances of `modes` (n,). A covariance that all modes share returns itself."""
        if len(self) == 1:
            return self
        factor = None if self.factor is None else self.factor[modes]
        basis = EigenBasis(self.basis.vectors[modes]) if isinstance(self.basis, EigenBasis) else self.basis
        return Covariance(self.shape, self.variances[modes], factor, basis)

    def to(self, device: torch.device) -> Covariance:
        """Returns the same covariances on `device`."""
        if self.variances.device == device:
            return self
        factor = None if self.factor is None else self.factor.to(device)
        return Covariance(self.shape, self.variances.to(device), factor, self.basis and self.basis.to(device))

    @check_kinds
    def at(self, level: NoiseLevel) -> ShiftedCovariance:
        """Returns T = alpha^2 S + sigma^2 I, the covariance of the modes after noise was added."""
        return self.scale_and_shift(level.alpha**2, level.sigma**2)

    def scale_and_shift(self, scale: torch.Tensor, shift: torch.Tensor) -> ShiftedCovariance:
        """Returns T = scale * S + shift * I. T must be positive definite.

        Args:
            scale: () or (B,), not negative.
            shift: () or (B,), not negative.
        """
        device = self.variances.device
        return ShiftedCovariance(self, *(value.double().reshape(-1).to(device) for value in (scale, shift)))

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """Returns S v."""
        z = self._analyse(v)
        result = self.variances * z
        if self.factor is not None:
            inner = torch.einsum("kdr,...kd->...kr", self.factor, z)
            result = result + torch.einsum("kdr,...kr->...kd", self.factor, inner)
        return self._synthesise(result)

    def dense(self) -> torch.Tensor:
        """Returns S as matrices (K, d, d)."""
        identity = torch.eye(self.dimensions, dtype=torch.float64, device=self.variances.device)
        return self.product(identity[:, None]).expand(-1, len(self), -1).permute(1, 2, 0)

    @check_kinds
    def draw(self, modes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Draws one vector with mean zero and covariance S_k for each of `modes` (n,) int64: (n, d).

        The square root of S is [diag(D)^(1/2), U], so n (d + r) random numbers are drawn, on the generator's device.
        """
        covariance, modes = self.to(generator.device), modes.to(generator.device)
        noise = torch.randn(
            len(modes), self.dimensions + self.rank, dtype=torch.float64, device=modes.device, generator=generator
        )
        modes = torch.zeros_like(modes) if len(self) == 1 else modes
        result = noise[:, : self.dimensions].clone()
        for mode in modes.unique():  # The loop takes one mode at a time: one basis per draw would need n d^2 numbers.
            rows, single = modes == mode, covariance.select(mode[None])
            z = single.variances.sqrt() * noise[rows][:, : self.dimensions]
            if single.factor is not None:  # U times independent noise adds U U^T to the covariance diag(D)
                z = z + noise[rows][:, self.dimensions :] @ single.factor[0].mT
            result[rows] = single._synthesise(z[:, None])[:, 0]
        return result

    def _analyse(self, v: torch.Tensor) -> torch.Tensor:
        return v if self.basis is None else self.basis.analyse(v)

    def _synthesise(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.basis is None else self.basis.synthesise(z)


class ShiftedCovariance:
    """Holds T = a S + b I at one level, or at one level per sample. `Covariance.at` and `scale_and_shift` make it.

    Vectors are float64 of shape (..., B, K, d), or (..., B, 1, d) where all modes have the same vector. Results have
    the shape (..., B, K, d). T, its inverse and S commute. Determinants and traces have the shape (1 or B, K),
    diagonals (1 or B, K, d).
    """

    def __init__(self, covariance: Covariance, scale: torch.Tensor, shift: torch.Tensor):
        self.covariance = covariance
        self._scale, self._shift = (value[:, None, None] for value in (scale, shift))
        self._base = self._scale * covariance.variances + self._shift  # B, (1 or B, K, d or 1)

    def product(self, v: torch.Tensor) -> torch.Tensor:
        """Returns T v."""
        return self._scale * self.covariance.product(v) + self._shift * v

    def solve(self, v: torch.Tensor) -> torch.Tensor:
        """Returns T^-1 v."""
        return self._apply(1 / self._base, -self._scale, v)

    def shrink(self, v: torch.Tensor) -> torch.Tensor:
        """Returns S T^-1 v. The posterior covariance of a mode is sigma^2 S T^-1."""
        return self._apply(self.covariance.variances / self._base, self._shift, v)

    def solve_inverse(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        """Returns (T^-1 + shift I)^-1 v; `shift` is () or (B,), not negative.

        The result is computed as T (I + shift T)^-1 v, which needs no inverse of T^-1.
        """
        shift = shift.double().to(v.device).reshape(-1)
        scale, base = shift * self._scale[:, 0, 0], 1 + shift * self._shift[:, 0, 0]  # I + shift T = scale S + base I
        return self.product(self.covariance.scale_and_shift(scale, base).solve(v))

    @functools.cached_property
    def log_determinant(self) -> torch.Tensor:
        """The log determinant of T, (1 or B, K)."""
        result = self._sum(self._base.log())
        if self._woodbury is None:
            return result
        # The factor multiplies the determinant by det(I + a U^T B^-1 U) = det(L)^2, and L is triangular.
        return result + 2 * self._woodbury[0].diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def inverse_trace(self) -> torch.Tensor:
        """The trace of T^-1, (1 or B, K)."""
        result = self._sum(1 / self._base)
        if self._woodbury is None:
            return result
        return result - self._scale[..., 0] * self._woodbury[1].square().sum((-1, -2))

    @property
    def inverse_diagonal(self) -> torch.Tensor:
        """The diagonal of T^-1, (1 or B, K, d)."""
        return self._diagonal(1 / self._base, -self._scale)

    @property
    def shrink_diagonal(self) -> torch.Tensor:
        """The diagonal of S T^-1, (1 or B, K, d)."""
        return self._diagonal(self.covariance.variances / self._base, self._shift)

    @functools.cached_property
    def _woodbury(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """L (1 or B, K, r, r) and V^T (1 or B, K, r, d); None without a factor."""
        factor = self.covariance.factor
        if factor is None:
            return None
        ratio = factor / self._base[..., None]  # B^-1 U
        identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
        # I + a U^T B^-1 U has no eigenvalue below 1, so its Cholesky factor exists and is well conditioned.
        lower = torch.linalg.cholesky(identity + self._scale[..., None] * (factor.mT @ ratio))
        return lower, torch.linalg.solve_triangular(lower, ratio.mT, upper=False)

    # The methods below compute with the matrices Q (diag(p) + c V V^T) Q^T, which cover T^-1 and S T^-1; p has the
    # shape (1 or B, K, d or 1), c the shape (1 or B, 1, 1).

    def _apply(self, p: torch.Tensor, c: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        z = self.covariance._analyse(v)
        result = p * z
        if self._woodbury is not None:
            rows = self._woodbury[1]
            inner = torch.einsum("...krd,...kd->...kr", rows, z)
            result = result + c * torch.einsum("...krd,...kr->...kd", rows, inner)
        return self.covariance._synthesise(result)

    def _diagonal(self, p: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        basis = self.covariance.basis
        result = p.expand(*p.shape[:-1], self.covariance.dimensions)
        result = result if basis is None else basis.diagonal(result)
        if self._woodbury is None:
            return result
        rows = self._woodbury[1].movedim(-2, 0)  # (r, 1 or B, K, d): a basis takes vectors whose modes come last
        return result + c * self.covariance._synthesise(rows).square().sum(0)

    def _sum(self, p: torch.Tensor) -> torch.Tensor:
        # p of an isotropic mode has one column, which stands for all d dimensions.
        return p.sum(-1) * (self.covariance.dimensions // p.shape[-1])


def _dct_matrix(size: int) -> torch.Tensor:
    """Returns the orthonormal cosine matrix (size, size) in float64: row j is the j-th cosine."""
    import numpy
    from scipy.fft import dct

    return torch.from_numpy(dct(numpy.eye(size), type=2, norm="ortho", axis=0))


def _to_float64(name: str, value: torch.Tensor) -> torch.Tensor:
    """Returns `value` as float64. Half precision raises: eight bits of a variance are not enough to invert it."""
    check_finite_floats(name, value)
    return value.detach().double()


def check_finite_floats(name: str, values: torch.Tensor) -> None:
    """Raises `InputError` unless the argument `name` has finite values in float32 or float64."""
    if values.dtype not in (torch.float32, torch.float64):
        raise InputError(f"`{name}` has dtype {values.dtype}; allowed: float32, float64. Pass {name}.float().")
    if not bool(torch.isfinite(values).all()):
        raise InputError(f"`{name}` holds NaN or infinity. Pass finite values.")


def _check_positive(values: torch.Tensor, name: str, zero: bool = False) -> None:
    smallest = float(values.min())
    if smallest < 0 or (smallest == 0 and not zero):
        raise InputError(
            f"{name} must {'not be negative' if zero else 'be positive'}; the smallest is {smallest:.3g}."
            + ("" if zero else " Add a small multiple of the identity.")
        )
