"""The contract of Fisher operators as one function, which tests any estimator.

Notation: F, C and M as in `diffusers_fisher.fisher.operator`; D is F as a matrix.
"""

from collections.abc import Callable, Sequence

import torch

from ..errors import FisherError, InputError, UnsupportedError
from ..fisher import Estimate, FisherEstimator, FisherOperator, gaussian, rademacher
from ..noise import DenoisingState, NoiseLevel, expand

NUM_PROBES, SKETCH = 4, 2  # numbers of probes and of sketch vectors per estimate


class ContractError(FisherError, AssertionError):
    """A Fisher operator breaks a property of all Fisher operators.

    The message names the property, what was got and what is allowed.
    """


def check_fisher(
    operator: FisherOperator,
    exact: torch.Tensor | FisherOperator | None = None,  # (B, d, d)
    tolerance: float | None = 1e-10,
    *,
    rounding: float = 1e-10,
    estimator: FisherEstimator | None = None,
    endpoint: torch.Tensor | None = None,
    num_estimates: int = 100,
    generator: torch.Generator | None = None,
) -> None:
    """Checks all properties that a `FisherOperator` must have, and its agreement with the exact Fisher if passed.

    Errors are measured per sample in units of 1/sigma^2 + |F|, because F is a difference of terms of size 1/sigma^2.
    Use batches of at least two samples, so that operators that mix samples are found.

    The error names the property: shape, dtype, finite, zero, linearity, independence (of the other samples' vectors),
    matmat, dense, symmetry or transpose, diagonal, trace, epsilon jacobian, covariance, original jacobian, output
    jacobian, exact matrix, batch invariance, solve, and for Hutchinson's and Hutch++'s estimates the mean (within four
    standard errors) and the standard error (right within 50%).

    Args:
        operator: the operator to check.
        exact: the exact Fisher as matrices or as an operator; None: only properties are checked.
        tolerance: allowed difference from `exact`. The default is for estimators that are exact in float64. None is
            for approximate estimators: only properties are checked.
        rounding: allowed violation of the properties. Pass the truncation error for finite differences. `tolerance`
            and `rounding` are raised to at least a thousand roundings of the operator's dtype.
        estimator: the estimator that made the operator. It is called again for each sample alone, to check batch
            invariance; None: no such check.
        endpoint: (B, ...), argument of `estimator`.
        num_estimates: number of draws for the checks of stochastic traces; 0: no such checks.
        generator: generator of vectors and probes; None: a generator with seed 0.

    Raises:
        ContractError: a property is broken.
        InputError: `exact` or `endpoint` has a wrong shape.

    Cost: 3 d products, some tens more, and 12 per estimate.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    contract = _Contract(operator, rounding, generator)
    contract.products()
    contract.matrix()
    contract.jacobians()
    if exact is not None and tolerance is not None:
        contract.agreement(exact, tolerance)
    if estimator is not None:
        contract.batch_invariance(estimator, endpoint)
    contract.solve()
    if num_estimates:
        contract.stochastic_traces(num_estimates, generator)


class _Contract:
    """Holds an operator with its matrix, two vectors per sample and the unit of errors, (B,)."""

    def __init__(self, operator: FisherOperator, rounding: float, generator: torch.Generator):
        sample = operator.state.sample
        self.operator, self.rounding = operator, _raise_to_rounding(rounding, sample.dtype)
        self.v, self.w = gaussian(2, sample, generator).vectors
        self.dense = operator.dense()
        self._form("dense", self.dense, (len(sample), sample[0].numel(), sample[0].numel()), sample.dtype)
        self.unit = _unit(self.dense, operator.state.level)

    # The properties

    def products(self) -> None:
        """Checks `matvec` and `matmat`."""
        operator, v, w = self.operator, self.v, self.w
        product, other = operator.matvec(v), operator.matvec(w)
        self._form("matvec", product, v.shape, v.dtype)
        self._compare("zero", operator.matvec(torch.zeros_like(v)), torch.zeros_like(v), v)
        self._compare("linearity", operator.matvec(2 * v - 3 * w), 2 * product - 3 * other, 2 * v.abs() + 3 * w.abs())
        if len(v) > 1:
            mixed_vectors, expected = torch.cat([v[:1], w[1:]]), torch.cat([product[:1], other[1:]])
            self._compare("independence", operator.matvec(mixed_vectors), expected, v.abs() + w.abs())
        pair = operator.matmat(torch.stack([v, w]))
        self._form("matmat", pair, (2, *v.shape), v.dtype)
        self._compare("matmat", pair[0], product, v)
        self._compare("matmat", pair[1], other, w)
        self._compare("dense", _apply(self.dense, v), product, v)

    def matrix(self) -> None:
        """Checks symmetry, diagonal and trace against `dense`."""
        operator, state, dense = self.operator, self.operator.state, self.dense
        dimensions = dense.shape[-1]
        if operator.symmetric:
            self._compare("symmetry", dense, dense.mT, size=dimensions**0.5)
        elif (transposed := _unless_unsupported(operator.transposed)) is not None:
            self._compare("transpose", _apply(dense.mT, self.w), transposed.matvec(self.w), self.w)
        diagonal, trace = operator.diagonal(), operator.trace()
        for name, estimate, shape in (("diagonal", diagonal, state.sample.shape), ("trace", trace, (len(dense),))):
            self._form(name, estimate.value, shape, torch.float64)
            zero = torch.zeros_like(estimate.value)
            self._compare(f"{name} standard error", estimate.standard_error, zero, size=0.0)
        exact = dense.diagonal(dim1=1, dim2=2).double()
        self._compare("diagonal", diagonal.value.flatten(1), exact, size=dimensions**0.5)
        self._compare("trace", trace.value, exact.sum(1), size=dimensions)

    def jacobians(self) -> None:
        """Checks the Jacobians and the covariance product. Each is converted to F v, so that all have one unit."""
        operator, v, level = self.operator, self.v, self.operator.state.level
        alpha, sigma = expand(level.alpha, v), expand(level.sigma, v)
        product = operator.matvec(v)
        epsilon = operator.epsilon_jacobian(v)
        self._compare("epsilon jacobian", epsilon / sigma, product, v)
        if bool((level.alpha > 0).all()):
            self._compare("covariance", v / sigma**2 - alpha**2 / sigma**4 * operator.covariance(v), product, v)
            clean = operator.original_jacobian(v)
            self._compare("original jacobian", (v - alpha * clean) / sigma**2, product, v)
        expected = FisherOperator.output_jacobian(operator, v)  # the base class computes it from the other Jacobians
        noise, original, identity = (
            expand(factor, v).abs() for factor in operator.state.prediction.output_coefficients(level)
        )
        # An error of F becomes an error of C times sigma^4/alpha^2, and of the Jacobian of x_0 times sigma^2/alpha.
        size = noise * sigma + original * sigma**2 / alpha.clamp_min(1e-6) + identity * sigma**2
        self._compare("output jacobian", operator.output_jacobian(v), expected, size * v)

    def agreement(self, exact: torch.Tensor | FisherOperator, tolerance: float) -> None:
        """Checks the matrix against the exact matrix, and with it diagonal and trace, which `matrix` compared."""
        matrix = exact if isinstance(exact, torch.Tensor) else exact.dense()
        if matrix.shape != self.dense.shape:
            raise InputError(f"`exact` has shape {tuple(matrix.shape)}; allowed: {tuple(self.dense.shape)}.")
        unit = _unit(matrix, self.operator.state.level)
        allowed = _raise_to_rounding(tolerance, self.v.dtype) * unit * matrix.shape[-1] ** 0.5
        self._check_limit("exact matrix", _norms(self.dense.double() - matrix.double()), allowed)

    def batch_invariance(self, estimator: FisherEstimator, endpoint: torch.Tensor | None) -> None:
        """Checks that the product of every sample equals the product of the sample alone."""
        if endpoint is not None and endpoint.shape != self.v.shape:
            raise InputError(f"`endpoint` has shape {tuple(endpoint.shape)}; allowed: {tuple(self.v.shape)}.")
        products = []
        for index in range(len(self.v)):
            part = slice(index, index + 1)
            operator = estimator(_part(self.operator.state, part), None if endpoint is None else endpoint[part])
            products.append(operator.matvec(self.v[part]))
        self._compare("batch invariance", torch.cat(products), self.operator.matvec(self.v), self.v)

    def solve(self) -> None:
        """Checks that the solution x fulfils F x = v, with damping where F is nearly singular or indefinite."""
        operator = _unless_unsupported(self.operator.symmetrised)
        if operator is None:
            return
        lowest = torch.linalg.eigvalsh((self.dense + self.dense.mT).double() / 2)[:, 0].cpu()
        damping = (0.1 * self.unit - lowest).clamp_min(0)  # condition numbers of at most about ten
        if bool((damping > 0).any()):
            operator = operator.damped(damping)
        solution = operator.solve(self.v, tolerance=self.rounding)
        self._form("solve", solution, self.v.shape, self.v.dtype)
        self._compare("solve", operator.matvec(solution), self.v, 100 * self.v / expand(self.unit, self.v))

    def stochastic_traces(self, count: int, generator: torch.Generator) -> None:
        """Checks Hutchinson's trace, and Hutch++'s trace where the dimension allows a sketch."""
        like, size, trace = self.v, min(SKETCH, self.dense.shape[-1] - 1), self.operator.trace
        draws = [trace(rademacher(NUM_PROBES, like, generator)) for _ in range(count)]
        self._estimates("Hutchinson", draws, NUM_PROBES)
        if size:
            # All draws share one sketch: with a new sketch per draw, few draws would not show their spread.
            sketch = gaussian(size, like, generator)
            draws = [trace(rademacher(NUM_PROBES, like, generator), sketch) for _ in range(count)]
            self._estimates("Hutch++", draws, NUM_PROBES + size)

    # Helpers of the checks

    def _estimates(self, name: str, draws: Sequence[Estimate], num_probes: int) -> None:
        self._form(f"{name} mean", draws[0].value, self.unit.shape, torch.float64)
        self._form(f"{name} standard error", draws[0].standard_error, self.unit.shape, torch.float64)
        if draws[0].num_probes != num_probes:
            raise self._error(f"{name} probes", f"{draws[0].num_probes}", f"{num_probes}")
        values = torch.stack([estimate.value for estimate in draws]).cpu()
        standard_error = torch.stack([estimate.standard_error for estimate in draws]).square().mean(0).sqrt().cpu()
        exact = self.dense.diagonal(dim1=1, dim2=2).double().sum(1).cpu()
        spread = values.std(0)
        floor = self.rounding * self.dense.shape[-1] * self.unit  # rounding is the only error of an exact estimate
        self._check_limit(f"{name} mean", (values.mean(0) - exact).abs(), 4 * spread / len(draws) ** 0.5 + floor)
        self._check_limit(f"{name} standard error", (standard_error - spread).abs(), spread / 2 + floor)

    def _form(self, name: str, value: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if value.shape != shape:
            raise self._error(f"shape of {name}", f"{tuple(value.shape)}", f"{tuple(shape)}")
        if value.dtype != dtype:
            raise self._error(f"dtype of {name}", f"{value.dtype}", f"{dtype}")
        if not bool(torch.isfinite(value).all()):
            raise self._error(f"finite {name}", "NaN or infinity", "finite values")

    def _compare(
        self, name: str, got: torch.Tensor, expected: torch.Tensor, like: torch.Tensor | None = None, size: float = 1.0
    ) -> None:
        """Checks every sample's norm of the difference: at most `rounding` units times `size` or |`like`|."""
        allowed = self.rounding * self.unit * (size if like is None else _norms(like))
        self._check_limit(name, _norms(got.double() - expected.double()), allowed)

    def _check_limit(self, name: str, error: torch.Tensor, allowed: torch.Tensor) -> None:
        for index, (got, limit) in enumerate(zip(error.tolist(), allowed.tolist(), strict=True)):
            if not got <= limit:  # also true for NaN
                raise self._error(name, f"a difference of {got:.3g} at sample {index}", f"{limit:.3g}")

    def _error(self, name: str, got: str, allowed: str) -> ContractError:
        return ContractError(f"{type(self.operator).__name__} breaks '{name}': got {got}; allowed: {allowed}.")


def _unit(matrix: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """Returns 1/sigma^2 + |F|, (B,) float64 on the CPU."""
    return 1 / level.sigma.cpu() ** 2 + torch.linalg.matrix_norm(matrix.double(), ord=2).cpu()


def _norms(v: torch.Tensor) -> torch.Tensor:
    """Returns the norm of every sample, (B,) float64 on the CPU."""
    return torch.linalg.vector_norm(v.double().reshape(len(v), -1), dim=1).cpu()


def _raise_to_rounding(tolerance: float, dtype: torch.dtype) -> float:
    return max(tolerance, 1e3 * torch.finfo(dtype).eps)


def _apply(matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bde,be->bd", matrix, v.flatten(1)).view_as(v)


def _unless_unsupported(make: Callable[[], FisherOperator]) -> FisherOperator | None:
    try:
        return make()
    except UnsupportedError:
        return None


def _part(state: DenoisingState, part: slice) -> DenoisingState:
    """Returns the state of some of the samples."""

    def select(value):
        return value[part] if isinstance(value, torch.Tensor) and value.ndim else value

    return DenoisingState(
        state.sample[part], state.model_output[part], NoiseLevel(select(state.level.alpha), select(state.level.sigma)),
        state.prediction, select(state.timestep), select(state.input_scale),
    )  # fmt: skip
