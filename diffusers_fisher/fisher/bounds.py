"""Error bounds of Fisher estimators, from bounds on what they are made of.

Notation: F, C as in `operator`; x_0^ = E[x_0|x_t] of the model, eps_theta its noise prediction, eps* the exact one;
|.|_op the largest singular value, |.| the Euclidean norm of a whole sample. Compare Wang et al., ICML 2025 (arXiv
2505.23264), for the trace target and the endpoint form; here every constant is stated.

All take a `NoiseLevel` and numbers or (B,) tensors, compute in float64 and return (B,), or () where everything is a
number. None is asymptotic: where the premises hold, so does the bound.
"""

import torch

from ..errors import InputError
from ..noise import NoiseLevel

Constant = float | torch.Tensor


def norm_trace_error_bound(
    level: NoiseLevel, dimensions: int, target_error: Constant, epsilon_error: Constant, mean_norm: Constant
) -> torch.Tensor:
    """Trace error of tr F ~ d/sigma^2 - (alpha^2/sigma^4)(d t - |x_0^|^2), the paper's "norm" target.

    (alpha^2/sigma^4) d target_error + epsilon_error^2/sigma^2 + 2 alpha epsilon_error mean_norm/sigma^3. The first
    term grows as sigma^-4 where the data's own trace is of order sigma^-2: the target is ill-conditioned.

    Args:
        dimensions: d of one sample.
        target_error: bound of |t - E[|x_0|^2/d | x_t]|.
        epsilon_error: bound of |eps_theta - eps*|.
        mean_norm: |E[x_0|x_t]|, the exact one's or the model's.

    Raises:
        InputError: a constant that is negative, not finite or of another shape; sigma = 0.
    """
    _check_dimensions(dimensions)
    alpha, sigma, target, epsilon, mean = _constants(
        level, target_error=target_error, epsilon_error=epsilon_error, mean_norm=mean_norm
    )
    return alpha**2 / sigma**4 * dimensions * target + epsilon**2 / sigma**2 + 2 * alpha * epsilon * mean / sigma**3


def residual_trace_error_bound(
    level: NoiseLevel, dimensions: int, target_error: Constant, epsilon_error: Constant
) -> torch.Tensor:
    """Trace error of tr F ~ d (1 - r)/sigma^2, the "residual" target.

    (d target_error + epsilon_error^2)/sigma^2: relative to d/sigma^2, the error of r and the model's mean squared one.

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


def endpoint_error_bound(
    level: NoiseLevel, radius: Constant, epsilon_error: Constant, moment_error: Constant | None = None
) -> torch.Tensor:
    """|F^ - F|_op of `EndpointFisher()`, the paper's form, for data and endpoint in a ball of `radius` about 0.

    (alpha^2/sigma^4) (moment_error + (2 radius + delta) delta), delta = (sigma/alpha) epsilon_error the error of x_0^.

    Args:
        radius: of a ball about the origin that holds all the data and the endpoint x_0.
        epsilon_error: bound of |eps_theta - eps*|.
        moment_error: bound of |x_0 x_0^T - E[x_0 x_0^T|x_t]|_op; None: radius^2, which always holds.

    Raises:
        InputError: as `norm_trace_error_bound`.
    """
    alpha, sigma, radius, epsilon = _constants(level, radius=radius, epsilon_error=epsilon_error)
    *_, moment = _constants(level, moment_error=radius**2 if moment_error is None else moment_error)
    # alpha^2/sigma^4 multiplied in, so that alpha = 0 exists.
    model = 2 * alpha * radius * epsilon / sigma**3 + epsilon**2 / sigma**2
    return alpha**2 / sigma**4 * moment + model


def centred_endpoint_error_bound(level: NoiseLevel, distance: Constant, covariance_norm: Constant) -> torch.Tensor:
    """|F^ - F|_op of `EndpointFisher(centred=True)`: (alpha^2/sigma^4) max(distance^2, covariance_norm).

    A difference of two positive matrices is no larger than the larger one. The model's error enters through
    `distance` alone, which a run knows.

    Args:
        distance: |x_0 - x_0^|, or a bound.
        covariance_norm: bound of |Cov[x_0|x_t]|_op: R^2 for data in any ball of radius R.

    Raises:
        InputError: as `norm_trace_error_bound`.
    """
    alpha, sigma, distance, covariance = _constants(level, distance=distance, covariance_norm=covariance_norm)
    return alpha**2 / sigma**4 * torch.maximum(distance**2, covariance)


def _check_dimensions(dimensions: int) -> None:
    if dimensions < 1:
        raise InputError(f"`dimensions` is {dimensions}; allowed: at least 1.")


def _constants(level: NoiseLevel, **values: Constant) -> list[torch.Tensor]:
    """Returns alpha, sigma and the constants as float64 on the level's device, checked."""
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
