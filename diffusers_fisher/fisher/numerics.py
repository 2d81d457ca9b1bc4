"""Linear algebra that uses matrix-vector products alone, for batches of operators.

Vectors are (B, ...), one per sample, and every sample has its own operator.
"""

import functools
from collections.abc import Callable

import torch

from ..errors import InputError, NumericalError
from ..noise import expand

Product = Callable[[torch.Tensor], torch.Tensor]


def widen(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in float64, on the CPU where its device has no float64 (Apple's)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Returns the inner product of every sample, (B,), accumulated in float64."""
    return (widen(left) * widen(right)).flatten(1).sum(1)


def conjugate_gradients(
    matvec: Product, b: torch.Tensor, tolerance: float = 1e-6, max_iterations: int | None = None
) -> torch.Tensor:
    """Solves A x = b for symmetric positive definite A, one system per sample (Hestenes and Stiefel, 1952).

    Args:
        matvec: function that returns A x for x (B, ...).
        b: (B, ...).
        tolerance: largest norm of the residual relative to the norm of `b`. The residual is that of the recurrence: in
            float32 the true residual stops falling at about 1e-7 times the condition number of A.
        max_iterations: largest number of products; None: ten times the dimension.

    Raises:
        NumericalError: A is not positive definite, or the tolerance was not reached.
    """
    limit = 10 * b[0].numel() if max_iterations is None else max_iterations
    x, residual = torch.zeros_like(b), b
    direction, size = residual, dot(residual, residual)
    target = tolerance**2 * size
    for _ in range(limit):
        active = size > target
        if not bool(active.any()):
            return x
        product = matvec(direction)
        curvature = dot(direction, product)
        if bool((active & ~(curvature > 0)).any()):
            raise NumericalError(
                "The operator is not positive definite (<v, A v> is not positive in a direction met by conjugate "
                "gradients), as the diffusion Fisher may be between modes; add damping: operator.damped(value)."
            )
        step = expand(torch.where(active, size / curvature, 0), x)
        x, residual = x + step * direction, residual - step * product
        following = dot(residual, residual)
        direction = residual + expand(torch.where(active, following / size, 0), x) * direction
        size = torch.where(active, following, size)
    if bool((size <= target).all()):
        return x
    error = float((size / dot(b, b))[size > target].max().sqrt())
    raise NumericalError(
        f"Conjugate gradients left a relative residual of {error:.2g} after {limit} products; allowed: {tolerance}. "
        "Raise `max_iterations` or `tolerance`, or add damping."
    )


def extreme_eigenpairs(
    matvec: Product, like: torch.Tensor, count: int, largest: bool, tolerance: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the `count` largest or smallest eigenvalues and eigenvectors of symmetric operators.

    The method is scipy's Lanczos iteration.

    Args:
        matvec: function that returns A v for v (B, ...).
        like: (B, ...), tensor with the shape, dtype and device of the vectors.
        tolerance: relative tolerance of the eigenvalues; None: 1e-12 for float64 vectors, 1e-4 for others.

    Returns:
        Eigenvalues (count, B) float64, the most extreme first, and vectors of norm one (count, B, ...).

    Raises:
        InputError: `count` is out of range.
        NumericalError: the iteration does not converge, or a product is not finite.
    """
    import numpy
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    dimensions = like[0].numel()
    if not 1 <= count < dimensions:
        raise InputError(f"`count` is {count}; allowed: 1 to {dimensions - 1}, one less than the dimension.")
    kind, default = (numpy.float64, 1e-12) if like.dtype is torch.float64 else (numpy.float32, 1e-4)
    tolerance = default if tolerance is None else tolerance
    values, vectors = [], []
    for index in range(len(like)):  # ARPACK takes one operator, so the vectors of all other samples are zero.

        def product(v, index=index, shift=0.0):
            batch = torch.zeros_like(like).flatten(1)
            batch[index] = torch.from_numpy(v.reshape(-1)).to(batch)
            values = matvec(batch.view_as(like)).flatten(1)[index].detach().cpu().numpy().astype(kind)
            if not numpy.isfinite(values).all():
                raise NumericalError(f"A product of sample {index} is not finite, so it has no eigenpairs.")
            return values + shift * v.reshape(-1)

        start = numpy.random.default_rng(0).standard_normal(dimensions).astype(kind)
        # ARPACK can't take a zero operator, which an operator of `DirectFisher` may be.
        shift = 0.0 if product(start).any() else 1.0
        operator = LinearOperator((dimensions, dimensions), matvec=functools.partial(product, shift=shift), dtype=kind)
        try:
            eigenvalues, columns = eigsh(operator, k=count, which="LA" if largest else "SA", v0=start, tol=tolerance)
        except ArpackError as error:
            raise NumericalError(
                f"Eigenpairs of sample {index} did not converge: {error}. Raise `tolerance`."
            ) from error
        order = numpy.argsort(-eigenvalues if largest else eigenvalues)
        values.append(torch.from_numpy(eigenvalues[order].astype(numpy.float64)) - shift)
        vectors.append(torch.from_numpy(columns.T[order].copy()).to(like))
    return torch.stack(values, 1), torch.stack(vectors, 1).view(count, *like.shape)


def leading_eigenpairs(
    matvec: Product, like: torch.Tensor, count: int, iterations: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Returns the largest eigenvalues of symmetric or nearly symmetric operators, for all samples at once.

    The method is a block Krylov iteration with two vectors more than are wanted (Musco and Musco, 1504.05477). Unlike
    `extreme_eigenpairs` it takes no more products for more samples, and stops before it has converged.

    Args:
        matvec: function that returns A v for v (B, ...).
        like: (B, ...), tensor with the shape, dtype and device of the vectors.
        iterations: number of blocks.

    Returns:
        Eigenvalues (count, B), the largest first, the norms of their residuals |A u - lambda u| (count, B), unit
        vectors (count, B, ...), all float64 on the CPU, and the number of products.

    Raises:
        NumericalError: a product is not finite.
    """
    batch, dimensions = len(like), like[0].numel()
    width = min(count + 2, dimensions)
    iterations = min(iterations, dimensions // width)
    # One start for all samples, so that a sample's numbers do not depend on its batch.
    start = torch.randn(dimensions, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block, basis = torch.linalg.qr(start)[0].expand(batch, -1, -1), torch.empty(batch, dimensions, 0).double()
    images = basis
    for _ in range(iterations):
        columns = [v.reshape(like.shape).to(like.dtype).to(like.device) for v in block.unbind(2)]
        products = torch.stack([matvec(v).detach().cpu().double().flatten(1) for v in columns], 2)
        if not torch.isfinite(products).all():
            raise NumericalError("A product of the operator is not finite, so it has no eigenpairs.")
        basis, images, block = torch.cat([basis, block], 2), torch.cat([images, products], 2), products
        for _ in range(2):  # once leaves what rounding makes of nearly dependent columns
            block = torch.linalg.qr(block - basis @ (basis.mT @ block))[0]
    small = basis.mT @ images
    values, weights = torch.linalg.eigh((small + small.mT) / 2)
    values, weights = values[:, -count:].flip(1), weights[:, :, -count:].flip(2)
    vectors = basis @ weights
    residuals = torch.linalg.vector_norm(images @ weights - values[:, None] * vectors, dim=1)
    return values.T, residuals.T, vectors.permute(2, 0, 1).reshape(count, *like.shape), iterations * width
