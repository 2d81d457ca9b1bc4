"""Random probes, and estimates with their errors."""

import dataclasses

import torch

from ..arguments import check_generators, check_kinds
from ..errors import InputError, check_floats

Generators = torch.Generator | list[torch.Generator] | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Holds a number, or one number per coordinate, with its error.

    Args:
        value: (B,) float64 for a trace, (B, ...) for a diagonal.
        standard_error: standard error of `value`, same shape; 0 if `value` is exact, infinite with a single value.
        values: (n, *value.shape) float64, the independent values that were averaged; (0, ...) if `value` is exact.
        num_probes: number of random vectors, including those of a sketch; 0 if `value` is exact.
        num_denoiser_calls: number of forward evaluations of the denoiser.
    """

    value: torch.Tensor
    standard_error: torch.Tensor
    values: torch.Tensor
    num_probes: int
    num_denoiser_calls: int

    @classmethod
    def exact(cls, value: torch.Tensor, num_denoiser_calls: int) -> "Estimate":
        """Makes an estimate of a value that is known without probes."""
        return cls(value, torch.zeros_like(value), value.new_empty(0, *value.shape), 0, num_denoiser_calls)

    @classmethod
    def mean(cls, values: torch.Tensor, num_probes: int, num_denoiser_calls: int) -> "Estimate":
        """Makes an estimate from the mean of independent `values` (n, ...)."""
        count = len(values)
        error = values.std(0) / count**0.5 if count > 1 else torch.full_like(values[0], float("inf"))
        return cls(values.mean(0), error, values, num_probes, num_denoiser_calls)


@check_kinds
@dataclasses.dataclass(frozen=True)
class Probes:
    """Holds random vectors of mean zero and identity covariance, one set per sample.

    Pass one object to all states of a trajectory to use the same probes at every state.

    Args:
        vectors: (k, B, ...).
        group: number of consecutive vectors that depend on each other. The standard error is computed from the means
            of the groups, so it needs two groups or more.
    """

    vectors: torch.Tensor
    group: int = 1

    def __post_init__(self) -> None:
        if self.vectors.ndim < 2:
            raise InputError(f"Probes have shape {tuple(self.vectors.shape)}; allowed: (k, B, ...) with k >= 1.")
        if len(self.vectors) < 1 or self.group < 1 or len(self.vectors) % self.group:
            raise InputError(
                f"{len(self.vectors)} probes in groups of {self.group}; allowed: one or more, in whole groups."
            )

    def __len__(self) -> int:
        return len(self.vectors)

    def group_means(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the means (k/group, ...) of the groups, which are independent, from (k, ...) values of probes."""
        return values.unflatten(0, (-1, self.group)).mean(1)


def check_vectors(name: str, vectors: torch.Tensor, shape: torch.Size) -> None:
    """Raises `InputError` unless `vectors`, called `name`, are one or more per sample of `shape` (B, ...)."""
    check_floats(name, vectors)
    if vectors.ndim < 1 or len(vectors) < 1 or vectors.shape[1:] != shape:
        allowed = ", ".join(map(str, shape))
        raise InputError(f"{name} have shape {tuple(vectors.shape)}; allowed: (k, {allowed}) with k >= 1.")


@check_kinds
def rademacher(count: int, like: torch.Tensor, generator: Generators = None) -> Probes:
    """Draws `count` probes of random signs (Hutchinson, 1990) in the shape and dtype of `like` (B, ...)."""
    return Probes(torch.where(_normal(count, like, generator) < 0, -1.0, 1.0).to(like.dtype))


@check_kinds
def gaussian(count: int, like: torch.Tensor, generator: Generators = None) -> Probes:
    """Draws `count` standard normal probes in the shape and dtype of `like` (B, ...)."""
    return Probes(_normal(count, like, generator))


@check_kinds
def orthogonal(count: int, like: torch.Tensor, generator: Generators = None, group: int | None = None) -> Probes:
    """Draws uniformly distributed probes of norm sqrt(d) that are orthogonal to each other within every group.

    A full group of d probes gives the exact trace. Smaller groups still have less variance than independent probes.

    Args:
        group: number of probes per group, at most d; `count` must be a multiple of it. None: the largest number that
            makes two groups or more.

    Raises:
        InputError: `group` is larger than d, or does not divide `count`.
    """
    _check_like(like)
    dimensions = like[0].numel()
    if group is None:
        divisors = [size for size in range(1, min(count // 2, dimensions) + 1) if count % size == 0]
        group = max(divisors, default=1)
    if group > dimensions:
        raise InputError(f"`group` is {group}; allowed: at most {dimensions}, the dimension of a sample.")
    normal = Probes(_normal(count, like, generator), group).vectors  # checks count against group
    columns = normal.flatten(2).double().unflatten(0, (-1, group)).permute(0, 2, 3, 1)  # (groups, B, d, group)
    basis, triangle = torch.linalg.qr(columns)
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)  # without them QR is not uniform
    vectors = (basis * signs[..., None, :]).permute(0, 3, 1, 2).flatten(0, 1) * dimensions**0.5
    return Probes(vectors.to(like.dtype).view_as(normal), group)


@check_kinds
def antithetic(probes: Probes) -> Probes:
    """Returns probes in which every probe is followed by its negative.

    For a linear operator v and -v give the same value. With `FiniteDifferenceFisher` the pair cancels the first-order
    error of a forward difference, as `central=True` does.
    """
    return Probes(torch.stack([probes.vectors, -probes.vectors], dim=1).flatten(0, 1), 2 * probes.group)


def _check_like(like: torch.Tensor) -> None:
    check_floats("`like`", like)
    if like.ndim < 2 or not like.numel():
        raise InputError(f"`like` has shape {tuple(like.shape)}; allowed: (B, ...), a batch of samples.")


def _normal(count: int, like: torch.Tensor, generator: Generators) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    if count < 1:
        raise InputError(f"The number of probes is {count}; allowed: at least 1, or None for the exact trace.")
    _check_like(like)
    check_generators(generator, len(like))
    draws = [randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype) for _ in range(count)]
    return torch.stack(draws)
