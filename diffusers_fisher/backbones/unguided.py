"""What makes a likelihood's call unguided: each backbone's `unguided_scale` checks its scales with this function."""

from ..arguments import fit
from ..errors import InputError


def check_unguided(name: str, scale: float) -> None:
    """Refuses a likelihood of a guided output. Raises `InputError`."""
    if fit(name, scale, {name: float}) != 1.0:
        raise InputError(
            f"`{name}` is {scale}; a likelihood is at 1.0, because a guided output is the score of no density. Leave "
            "it out."
        )
