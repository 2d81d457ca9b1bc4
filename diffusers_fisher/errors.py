"""The package's exceptions. Each also inherits the builtin that a caller would have expected."""


class FisherError(Exception):
    """Base class of every error raised on purpose by `diffusers_fisher`."""


class InputError(FisherError, ValueError):
    """An argument has a value, shape or type that can't be used; the message says what was got and what is allowed."""


class UnsupportedError(FisherError, TypeError):
    """A scheduler, prediction type or pipeline that the library does not know; the message lists those it does."""


class CheckpointError(FisherError, OSError):
    """A checkpoint file is missing, truncated or of another kind."""


class TrajectoryError(FisherError, RuntimeError):
    """A differentiable sampling run can't be continued or differentiated as it stands."""


class NumericalError(FisherError, ArithmeticError):
    """A result is NaN or infinite. NaN never leaves silently."""


class CoarseGridWarning(UserWarning):
    """A likelihood's discretisation error is large; the message says how large. Take more steps."""
