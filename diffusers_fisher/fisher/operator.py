"""The diffusion Fisher at a state as a linear operator, the central object of the package.

Notation: F = -grad^2 log q_t(x_t) (Wang et al., ICML 2025, arXiv 2505.23264), C = Cov[x_0|x_t];
F = I/sigma^2 - (alpha^2/sigma^4) C. The Jacobian of the predicted noise is sigma F, that of the predicted x_0 is
(alpha/sigma^2) C. M = I - sigma^2 F = (alpha^2/sigma^2) C = Cov[eps|x_t] has eigenvalues of order one at every level.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence

import torch

from ..arguments import check_kinds
from ..errors import InputError, NumericalError, UnsupportedError, check_floats, check_shape
from ..noise import DenoisingState, combine, expand
from .estimate import Estimate, Generators, Probes, check_vectors, rademacher
from .numerics import conjugate_gradients, dot, extreme_eigenpairs


class FisherOperator(abc.ABC):
    """Represents the diffusion Fisher F at `state`, by products with the posterior covariance.

    Subclasses implement `covariance(v)`; all other methods follow from it. Every product takes and returns (B, ...)
    tensors of the state's shape, one vector per sample, in the scheduler's carried coordinates. Operators form a
    vector space (`a + b`, `2.0 * a`), and `operator @ v` is F v. They can be damped, symmetrised and inverted, and
    have extreme eigenpairs.
    """

    symmetric = True  # whether products are those of a symmetric matrix
    chunk_size = 1  # number of vectors that `matmat` takes at once
    calls_per_state = 0  # number of denoiser evaluations per operator
    calls_per_product = 0  # number of denoiser evaluations per product

    def __init__(self, state: DenoisingState):
        self.state = state

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (B, d, d) of `dense()`: one matrix per sample, over the d elements of a sample."""
        dimensions = self.state.sample[0].numel()
        return len(self.state.sample), dimensions, dimensions

    def __repr__(self) -> str:
        samples = f"samples {tuple(self.state.sample.shape)}"
        return f"<{type(self).__name__}: shape {self.shape}, {samples}, {self.calls_per_product} calls per product>"

    @abc.abstractmethod
    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        """Returns C v, the product with the posterior covariance Cov[x_0|x_t]."""

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the product with the transposed Jacobian of the predicted x_0: (alpha/sigma^2) C v."""
        level = self.state.level
        return expand(level.alpha / level.sigma**2, v) * self.covariance(v)

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the product with the transposed Jacobian of the predicted noise, sigma F v.

        It is computed as (v - alpha J_{x_0}^T v)/sigma.
        """
        level = self.state.level
        return (v - expand(level.alpha, v) * self.original_jacobian(v)) / expand(level.sigma, v)

    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the product with the transposed Jacobian of the raw model output, for every prediction type."""
        noise, original, identity = self.state.prediction.output_coefficients(self.state.level)
        result = expand(identity, v) * v
        if bool((noise != 0).any()):
            result = result + expand(noise, v) * self.epsilon_jacobian(v)
        if bool((original != 0).any()):
            result = result + expand(original, v) * self.original_jacobian(v)
        return result

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Returns F v, (B, ...)."""
        self._check(v)
        self._check_noise()
        return self.epsilon_jacobian(v) / expand(self.state.level.sigma, v)

    def __matmul__(self, v: torch.Tensor) -> torch.Tensor:
        return self.matvec(v)

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns F v for many vectors per sample, (k, B, ...)."""
        self._check_many(vectors)
        return torch.stack([self.matvec(v) for v in vectors])

    def transposed(self) -> FisherOperator:
        """Returns the operator of the transposed matrix, which is the same object if F is symmetric.

        Raises:
            UnsupportedError: the estimator can't multiply by the other side of its Jacobian.
        """
        if self.symmetric:
            return self
        raise UnsupportedError(
            f"{type(self).__name__} knows products with one side of its Jacobian only; use AutodiffFisher, which "
            "knows both."
        )

    # Combinations

    @check_kinds
    def __add__(self, other: FisherOperator) -> FisherOperator:
        return CombinedOperator([(1.0, self), (1.0, other)])

    @check_kinds
    def __mul__(self, factor: float | torch.Tensor) -> FisherOperator:
        return CombinedOperator([(factor, self)])

    __rmul__ = __mul__

    @check_kinds
    def damped(self, damping: float | torch.Tensor) -> FisherOperator:
        """Returns F + damping * I; `damping` is a number or (B,)."""
        return CombinedOperator([(1.0, self)], damping)

    def symmetrised(self) -> FisherOperator:
        """Returns (F + F^T)/2. Raises `UnsupportedError` if F^T is not known."""
        return self if self.symmetric else CombinedOperator([(0.5, self), (0.5, self.transposed())], symmetric=True)

    # Inverses and eigenpairs

    @check_kinds
    def solve(self, v: torch.Tensor, tolerance: float = 1e-6, max_iterations: int | None = None) -> torch.Tensor:
        """Returns F^-1 v, (B, ...), in closed form (Woodbury) if there is one, and by conjugate gradients otherwise.

        Args:
            tolerance, max_iterations: arguments of `numerics.conjugate_gradients`.

        Raises:
            NumericalError: F is singular (closed forms) or not positive definite, or conjugate gradients do not
                converge.
            UnsupportedError: F is not symmetric.
        """
        self._check(v)
        self._check_noise()
        solution = self.inverse_product(v, self._numbers(0.0))
        if solution is not None:
            residual = self.matvec(solution) - v
            if not bool((dot(residual, residual) <= 1e-4 * dot(v, v)).all()):  # also true for NaN
                raise NumericalError("The operator is singular, or nearly; add damping: operator.damped(value).")
            return solution
        self._check_symmetric("solve")
        return conjugate_gradients(self.matvec, v, tolerance, max_iterations)

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        """Returns (F + shift I)^-1 v in closed form, or None if there is no closed form; `shift` is (B,) float64."""
        return None

    @check_kinds
    def eigenpairs(
        self, count: int, largest: bool = True, tolerance: float | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns extreme eigenvalues (count, B) and unit eigenvectors (count, B, ...) of F, the most extreme first.

        The eigenvectors are the directions in which the log density is most (`largest`) or least curved. Cost: some
        tens of products per sample. Every product is one of the whole batch, so pass one sample at a time if products
        are expensive.

        Raises:
            InputError: `count` is out of range.
            UnsupportedError: F is not symmetric (see `symmetrised`).
        """
        self._check_symmetric("eigenpairs")
        return extreme_eigenpairs(self.matvec, self.state.sample, count, largest, tolerance)

    # Whole matrix, diagonal, trace

    def dense(self) -> torch.Tensor:
        """Returns F as one matrix per sample, (B, d, d), so that `dense() @ v == matvec(v)`. Cost: d products."""
        return torch.cat([columns for _, columns in self._columns()]).permute(1, 2, 0)

    @check_kinds
    def diagonal(self, probes: int | Probes | torch.Tensor | None = None, generator: Generators = None) -> Estimate:
        """Returns the diagonal of F, value (B, ...).

        Args:
            probes: probes of the estimate E[v * F v] (Bekas et al., 2007), or their number; None: the exact diagonal,
                which costs d products if the operator has no closed form.
            generator: source of the random signs where `probes` is a number.
        """
        self._check_noise()
        if probes is None:
            value, products = self.exact_diagonal()
            return Estimate.exact(value, self._calls(products))
        probes = self._probes(probes, generator)
        return self._estimate(probes, probes.vectors.double() * self.products(probes.vectors).double())

    @check_kinds
    def trace(
        self,
        probes: int | Probes | torch.Tensor | None = None,
        sketch: int | Probes | torch.Tensor | None = None,
        generator: Generators = None,
    ) -> Estimate:
        """Returns the trace of F, value (B,).

        Args:
            probes: `Probes`, (k, B, ...) or the number k for Hutchinson's estimate (Hutchinson, 1990): `trace(16)`
                draws 16 vectors of random signs. None: the exact trace, which costs d products if the operator has
                no closed form.
            sketch: (m, B, ...) more random vectors, or their number m. The trace of M on their range is exact, and the
                probes estimate the rest (Hutch++, Meyer et al., 2010.09649). A sketch helps if M has few large
                eigenvalues. It costs 2 m more products.
            generator: source of the random signs where `probes` or `sketch` is a number.

        Raises:
            InputError: there is no probe, or probes have another shape; or the sketch comes without probes, equals
                the probes (which makes a bias) or has as many vectors as dimensions.
        """
        self._check_noise()
        if probes is None:
            if sketch is not None:
                raise InputError("A sketch needs probes for what it leaves; pass `probes` too, or neither.")
            value, products = self.exact_trace()
            return Estimate.exact(value, self._calls(products))
        probes = self._probes(probes, generator)
        if sketch is not None:
            vectors = self._probes(sketch, generator).vectors
            if vectors is probes.vectors:
                raise InputError("The sketch is the probes themselves, which biases the trace; draw it separately.")
            return self._sketched_trace(probes, vectors)
        pairs = zip(probes.vectors, self.products(probes.vectors), strict=True)
        return self._estimate(probes, torch.stack([dot(v, product) for v, product in pairs]))

    def exact_trace(self) -> tuple[torch.Tensor, int]:
        """Returns tr F (B,) float64 and its number of products, which is 0 in closed form."""
        diagonal, products = self.exact_diagonal()
        return diagonal.flatten(1).sum(1), products

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        """Returns the diagonal of F (B, ...) float64 and its number of products, which is 0 in closed form."""
        entries = [columns.diagonal(offset=start, dim1=0, dim2=2) for start, columns in self._columns()]
        diagonal = torch.cat(entries, dim=-1).double()
        return diagonal.view_as(self.state.sample), diagonal.shape[1]

    def _columns(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yields pieces of k columns of F: the index of the first column, and the columns (k, B, d)."""
        sample = self.state.sample
        dimensions = sample[0].numel()
        for start in range(0, dimensions, self.chunk_size):
            size = min(self.chunk_size, dimensions - start)
            basis = torch.zeros(size, len(sample), dimensions, dtype=sample.dtype, device=sample.device)
            basis.diagonal(offset=start, dim1=0, dim2=2).fill_(1)
            yield start, self.matmat(basis.view(size, *sample.shape)).flatten(2)

    def products(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns F v for many vectors per sample, (k, B, ...), `chunk_size` at once."""
        return torch.cat([self.matmat(piece) for piece in vectors.split(self.chunk_size)])

    def _sketched_trace(self, probes: Probes, sketch: torch.Tensor) -> Estimate:
        """Estimates tr F = (d - tr M)/sigma^2: exactly on the range of M on the sketch, by probes on the rest."""
        dimensions, size = sketch[0, 0].numel(), len(sketch)
        if size >= dimensions:
            raise InputError(f"The sketch has {size} vectors in {dimensions} dimensions; ask for the exact trace.")
        noise = self.state.level.sigma.to(sketch.device) ** 2

        def shrink(vectors: torch.Tensor) -> torch.Tensor:  # returns M v, (k, B, d) float64
            products = self.products(vectors.to(sketch.dtype).view(-1, *sketch.shape[1:])).double()
            return vectors.double() - noise.expand(sketch.shape[1])[:, None] * products.flatten(2)

        basis = torch.linalg.qr(shrink(sketch.flatten(2)).permute(1, 2, 0))[0].permute(2, 0, 1)  # (m, B, d)
        sketch_trace = (basis * shrink(basis)).sum((0, 2))
        vectors = probes.vectors.double().flatten(2)
        complement = vectors - torch.einsum("mbd,kbm->kbd", basis, torch.einsum("mbd,kbd->kbm", basis, vectors))
        complement_trace = (complement * shrink(complement)).sum(2)
        values = probes.group_means((dimensions - sketch_trace - complement_trace) / noise)
        return Estimate.mean(values, len(probes) + size, self._calls(len(probes) + 2 * size))

    def _estimate(self, probes: Probes, values: torch.Tensor) -> Estimate:
        return Estimate.mean(probes.group_means(values), len(probes), self._calls(len(probes)))

    def _calls(self, products: int) -> int:
        return self.calls_per_state + products * self.calls_per_product

    def _probes(self, probes: int | Probes | torch.Tensor, generator: Generators) -> Probes:
        if isinstance(probes, int):
            return rademacher(probes, self.state.sample, generator)
        probes = probes if isinstance(probes, Probes) else Probes(probes)
        check_vectors("Probes", probes.vectors, self.state.sample.shape)
        return probes

    def _numbers(self, value: float | torch.Tensor) -> torch.Tensor:
        """Returns a number or (B,) as (B,) float64 on the CPU."""
        numbers, count = torch.as_tensor(value, dtype=torch.float64, device="cpu"), len(self.state.sample)
        if numbers.shape not in ((), (1,), (count,)):
            raise InputError(f"Got factors of shape {tuple(numbers.shape)}; allowed: a number, or ({count},).")
        return numbers.expand(count)

    def _check(self, v: torch.Tensor) -> None:
        check_floats("The vector", v)
        check_shape("The vector", v.shape, self.state.sample.shape, "Pass one vector per sample of the state.")

    def _check_many(self, vectors: torch.Tensor) -> None:
        check_vectors("Vectors", vectors, self.state.sample.shape)

    def _check_noise(self) -> None:
        if not bool((self.state.level.sigma > 0).all()):
            raise InputError(
                "The noise level has sigma = 0, where the diffusion Fisher is infinite; take a state with noise. The "
                "products `covariance` and `original_jacobian` exist there."
            )

    def _check_symmetric(self, name: str) -> None:
        if not self.symmetric:
            raise UnsupportedError(
                f"`{name}` needs a symmetric operator, and a learned Jacobian is not quite symmetric; ask "
                f"operator.symmetrised().{name}(...)."
            )


class JacobianOperator(FisherOperator):
    """Base class of operators that implement `original_jacobian`; the covariance follows and needs alpha > 0."""

    @abc.abstractmethod
    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the product with the transposed Jacobian of the predicted x_0, (B, ...)."""

    def covariance(self, v: torch.Tensor) -> torch.Tensor:
        level = self.state.level
        return expand(level.sigma**2 / level.alpha, v) * self.original_jacobian(v)


class FisherMatrixOperator(JacobianOperator):
    """Base class of operators that implement `matvec`; the Jacobians follow and need alpha > 0."""

    @abc.abstractmethod
    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        """Returns F v, (B, ...)."""

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return expand(self.state.level.sigma, v) * self.matvec(v)

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        level = self.state.level
        return (v - expand(level.sigma**2, v) * self.matvec(v)) / expand(level.alpha, v)


class ModelFisherOperator(JacobianOperator):
    """Base class of operators that implement `output_jacobian`, the product with the model's transposed Jacobian.

    A learned Jacobian is not symmetric, so `matvec` is the product with the transposed F. For a true score the two
    products are equal.
    """

    symmetric = False

    @abc.abstractmethod
    def output_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        """Returns the product with the transposed Jacobian of the raw model output at the carried sample."""

    def output_jacobians(self, vectors: torch.Tensor) -> torch.Tensor:
        """Returns the products of `output_jacobian` for many vectors per sample, (k, B, ...)."""
        return torch.stack([self.output_jacobian(v) for v in vectors])

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self._check_many(vectors)
        self._check_noise()
        level, like = self.state.level, vectors[0]
        factors = self.state.prediction.epsilon_coefficients(level)
        return combine(factors, vectors, self.output_jacobians(vectors), like) / expand(level.sigma, like)

    def original_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return combine(self.state.prediction.original_coefficients(self.state.level), v, self.output_jacobian(v), v)

    def epsilon_jacobian(self, v: torch.Tensor) -> torch.Tensor:
        return combine(self.state.prediction.epsilon_coefficients(self.state.level), v, self.output_jacobian(v), v)


class CombinedOperator(FisherMatrixOperator):
    """Represents the sum of factor_i * F_i, plus shift * I, at one state.

    Args:
        terms: pairs of a factor, a number or (B,), and an operator.
        shift: a number or (B,).
        symmetric: whether the sum is symmetric; None: it is symmetric if every term is.
    """

    def __init__(
        self,
        terms: Sequence[tuple[float | torch.Tensor, FisherOperator]],
        shift: torch.Tensor | float = 0.0,
        symmetric: bool | None = None,
    ):
        shapes = {tuple(operator.state.sample.shape) for _, operator in terms}
        if len(shapes) != 1:
            raise InputError(f"Operators at samples of shapes {sorted(shapes)} can't be added; make all at one state.")
        super().__init__(terms[0][1].state)
        self._terms = [(self._numbers(factor), operator) for factor, operator in terms]
        self._shift = self._numbers(shift)
        self.symmetric = all(operator.symmetric for _, operator in terms) if symmetric is None else symmetric
        self.chunk_size = min(operator.chunk_size for _, operator in terms)
        self.calls_per_state = sum(operator.calls_per_state for _, operator in terms)
        self.calls_per_product = sum(operator.calls_per_product for _, operator in terms)

    def matvec(self, v: torch.Tensor) -> torch.Tensor:
        products = [expand(factor, v) * operator.matvec(v) for factor, operator in self._terms]
        return torch.stack([*products, expand(self._shift, v) * v]).sum(0)

    def matmat(self, vectors: torch.Tensor) -> torch.Tensor:
        self._check_many(vectors)
        first = vectors[0]
        products = [expand(factor, first) * operator.matmat(vectors) for factor, operator in self._terms]
        return torch.stack([*products, expand(self._shift, first) * vectors]).sum(0)

    def transposed(self) -> FisherOperator:
        if self.symmetric:
            return self
        return CombinedOperator([(factor, operator.transposed()) for factor, operator in self._terms], self._shift)

    def inverse_product(self, v: torch.Tensor, shift: torch.Tensor) -> torch.Tensor | None:
        factor, operator = self._terms[0]
        if len(self._terms) > 1 or bool((factor == 0).any()):
            return None
        inner = operator.inverse_product(v, (self._shift + shift) / factor)
        return None if inner is None else inner / expand(factor, v)

    def exact_diagonal(self) -> tuple[torch.Tensor, int]:
        return self._sum([operator.exact_diagonal() for _, operator in self._terms], 1)

    def exact_trace(self) -> tuple[torch.Tensor, int]:
        return self._sum([operator.exact_trace() for _, operator in self._terms], self.state.sample[0].numel())

    def _sum(self, parts: list[tuple[torch.Tensor, int]], identity: int) -> tuple[torch.Tensor, int]:
        """Returns the sum of the terms' values (B, ...) and the number of products; `identity` is the value of I."""
        values, products = zip(*parts, strict=True)
        terms = [expand(factor, value) * value for (factor, _), value in zip(self._terms, values, strict=True)]
        total = torch.stack(terms).sum(0)
        return total + identity * expand(self._shift, total), max(products)
