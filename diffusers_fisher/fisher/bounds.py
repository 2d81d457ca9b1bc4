"""Error bounds of Fisher estimators, computed from bounds on the errors of their inputs.

Notation: F, C as in `operator`; x_0^ = E[x_0|x_t] of the model, eps_theta its noise prediction, eps* the exact one;
|.|_op the largest singular value, |.| the Euclidean norm of a whole sample. Compare Wang et al., ICML 2025 (arXiv
2505.23264), for the trace target and the endpoint form; here every constant is stated.

All functions take a `NoiseLevel` and numbers or (B,) tensors, and compute in float64. They return (B,), or () if all
arguments are numbers. No bound is asymptotic: a bound holds wherever its premises hold.
"""

import torch

from ..arguments import check_kinds
from ..errors import InputError
from ..noise import NoiseLevel

Constant = float | torch.Tensor


@check_kinds
def norm_trace_error_bound(
    level: NoiseLevel, dimensions: int, target_error: Constant, epsilon_error: Constant, mean_norm: Constant
) -> torch.Tensor:
    """Bounds the error of the trace tr F ~ d/sigma^2 - (alpha^2/sigma^4)(d t - |x_0^|^2), the paper's "norm" target.

    The bound is (alpha^2/sigma^4) d target_error + epsilon_error^2/sigma^2 + 2 alpha epsilon_error mean_norm/sigma^3.
    The first term grows as sigma^-4, but the data's own trace is of order sigma^-2: the target is ill-conditioned.

    Args:
        dimensions: d of one sample.
        target_error: bound of |t - E[|x_0|^2/d | x_t]|.
        epsilon_error: bound of |eps_theta - eps*|.
        mean_norm: |E[x_0|x_t]| of the exact mean or of the model's mean.

    Raises:
        InputError: a constant is negative, not finite or of another shape, or sigma is 0.
    """
    _check_dimensions(dimensions)
    alpha, sigma, target, epsilon, mean = _constants(
        level, target_error=target_error, epsilon_error=epsilon_error, mean_norm=mean_norm
    )
    return alpha**2 / sigma**4 * dimensions * target + epsilon**2 / sigma**2 + 2 * alpha * epsilon * mean / sigma**3


@check_kinds
def residual_trace_error_bound(
    level: NoiseLevel, dimensions: int, target_error: Constant, epsilon_error: Constant
) -> torch.Tensor:
    """Bounds the error of the trace tr F ~ d (1 - r)/sigma^2, the "residual" target.

    The bound is (d target_error + epsilon_error^2)/sigma^2. Relative to d/sigma^2 it is the error of r plus the
    model's mean squared error.

    Args:
        dimensions: d of one sample.
        target_error: bound of |r - E[|eps - eps_theta|^2/d | x_t]|.
        epsilon_error: bound of |eps_theta - eps*|.

    Raises:
        InputError: as `norm_trace_error_bound`.
    """
    _check_dimensions(dimensions)
    _, sigma, target, epsilon = _constants(level, target_error=target_error, epsilon_error=epsilon_error)
    return (dimensions * target + epsilon**2) / sigma**2


@check_kinds
def endpoint_error_bound(
    level: NoiseLevel, radius: Constant, epsilon_error: Constant, moment_error: Constant | None = None
) -> torch.Tensor:
    """Bounds |F^ - F|_op of `EndpointFisher()`, the paper's form.

    The bound is (alpha^2/sigma^4) (moment_error + (2 radius + delta) delta), where delta = (sigma/alpha) epsilon_error
    is the error of x_0^.

    Args:
        radius: radius of a ball about the origin that holds all data and the endpoint x_0.
        epsilon_error: bound of |eps_theta - eps*|.
        moment_error: bound of |x_0 x_0^T - E[x_0 x_0^T|x_t]|_op; None: radius^2, which is always a bound.

    Raises:
        InputError: as `norm_trace_error_bound`.
    """
    alpha, sigma, radius, epsilon = _constants(level, radius=radius, epsilon_error=epsilon_error)
    *_, moment = _constants(level, moment_error=radius**2 if moment_error is None else moment_error)
    # The factor alpha^2/sigma^4 is multiplied in, so that no term divides by alpha.
    model = 2 * alpha * radius * epsilon / sigma**3 + epsilon**2 / sigma**2
    return alpha**2 / sigma**4 * moment + model


@check_kinds
def centred_endpoint_error_bound(level: NoiseLevel, distance: Constant, covariance_norm: Constant) -> torch.Tensor:
    """Bounds |F^ - F|_op of `EndpointFisher(centred=True)` by (alpha^2/sigma^4) max(distance^2, covariance_norm).

    The norm of a difference of two positive matrices is at most the larger of their norms. The model's error enters
    through `distance` alone, which is known after a run.

    Args:
        distance: |x_0 - x_0^|, or a bound of it.
        covariance_norm: bound of |Cov[x_0|x_t]|_op; R^2 for data in any ball of radius R.

    Raises:
        InputError: as `norm_trace_error_bound`.
    """
    alpha, sigma, distance, covariance = _constants(level, distance=distance, covariance_norm=covariance_norm)
    return alpha**2 / sigma**4 * torch.maximum(distance**2, covariance)


def _check_dimensions(dimensions: int) -> None:
    if dimensions < 1:
        raise InputError(f"`dimensions` is {dimensions}; allowed: at least 1.")


def _constants(level: NoiseLevel, **values: Constant) -> list[torch.Tensor]:
    """Checks the level and the constants, and returns alpha, sigma and the constants as float64 on its device."""
    alpha, sigma = level.alpha.double(), level.sigma.double()
    if not bool((sigma > 0).all()):
        raise InputError("The noise level has sigma = 0, where the diffusion Fisher is infinite; take one with noise.")
    constants = {
        name: torch.as_tensor(value, dtype=torch.float64, device=alpha.device) for name, value in values.items()
    }
    shapes = {tuple(value.shape) for value in (alpha, *constants.values())} - {()}
    for name, value in constants.items():
        if value.ndim > 1 or len(shapes) > 1:
            raise InputError(
                f"`{name}` has shape {tuple(value.shape)}, the level {tuple(alpha.shape)}; allowed: a number, or one "
                "per sample, (B,), the same B everywhere."
            )
        if not bool((torch.isfinite(value) & (value >= 0)).all()):
            raise InputError(f"`{name}` is {value.tolist()}; allowed: finite, at least 0.")
    return [alpha, sigma, *constants.values()]
