"""Every exception of the package is also the builtin that a caller would have expected."""

import pytest

from diffusers_fisher import errors

BUILTINS = {
    "InputError": ValueError,
    "UnsupportedError": TypeError,
    "CheckpointError": OSError,
    "TrajectoryError": RuntimeError,
    "NumericalError": ArithmeticError,
}


def test_table_covers_the_package():
    classes = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    names = {name for name, value in classes.items() if not issubclass(value, Warning)}
    assert names == {"FisherError", *BUILTINS}


@pytest.mark.parametrize("name", BUILTINS)
def test_error_is_the_packages_and_the_builtin(name):
    error = getattr(errors, name)("what was got")
    assert isinstance(error, errors.FisherError)
    assert isinstance(error, BUILTINS[name])
    assert str(error) == "what was got"
