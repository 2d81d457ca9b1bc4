"""The options of a likelihood bound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ..arguments import check_kinds
from ..errors import InputError
from ..fisher.estimate import Generators
from ..likelihood.prior import Moment
from ..settings import ChainVariance
from .draws import check_draws

SCHEDULE_VARIANCES = ("fixed_small", "fixed_large", "learned")

DEFAULT_STEPS, DEFAULT_DRAWS = 20, 8


@check_kinds
@dataclasses.dataclass(frozen=True)
class BoundOptions:
    """Says how a likelihood is bounded.

    Args:
        variance: variance of the reverse chain. "optimal" is one number per state from the trace, and "diagonal" one
            per element from the diagonal. "fixed_small", "fixed_large" and "learned" (by the network itself) are those
            of the papers on pixel models, on all steps of the training schedule.
        num_steps: number of steps of the chain, on the grid of `noise_grid`, at least 1; None: 20. It must be None for
            the variances of the papers.
        num_draws: number of noises per level: 1, 2, or an even number from 6 on. They are pairs of a noise and its
            negative, and the lengths of the pairs are stratified. None: 8, or 1 for the variances of the papers.
        num_probes: number of random directions of the trace per state; None: the exact trace or diagonal.
        prior_mean, prior_variance, prior_basis: as in `Integration`. The variances of the papers have a standard
            normal prior.
        generator, keys, space, on_step: as in `Integration`.
        bins: number of equally spaced values from -1 to 1 on which the samples lie. With the optimal variances each is
            moved to a random point of its bin; those of the papers have the papers' decoder, which gives the
            probability of the bins. None: the bound is that of a density.
        maps: whether to keep the bound's parts by element of a sample.

    Raises:
        InputError: a number of steps, draws or probes that is not allowed, or an option that the variance does not
            have.
    """

    variance: ChainVariance = "optimal"
    num_steps: int | None = None
    num_draws: int | None = None
    num_probes: int | None = None
    prior_mean: Moment = None
    prior_variance: Moment = None
    prior_basis: str = "pixel"
    generator: Generators = None
    keys: Sequence[str] | None = None
    bins: int | None = None
    space: str = "latent"
    maps: bool = False
    on_step: Callable[[], object] = lambda: None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 1:
            raise InputError(f"`num_steps` is {self.num_steps}; allowed: at least 1, sensibly 20 or more.")
        if self.num_probes is not None and self.num_probes < 1:
            raise InputError(f"`num_probes` is {self.num_probes}; allowed: at least 1, or None for the exact trace.")
        check_draws(self.draws)
        optimal_only = {
            "num_steps": self.num_steps, "num_probes": self.num_probes, "prior_mean": self.prior_mean,
            "prior_variance": self.prior_variance,
        }  # fmt: skip
        names = [name for name, value in optimal_only.items() if value is not None]
        if names and self.uses_schedule:
            raise InputError(
                f"`{names[0]}` belongs to variance 'optimal' or 'diagonal'; '{self.variance}' takes all steps of the "
                "training schedule and a standard normal prior. Leave it out."
            )

    @property
    def uses_schedule(self) -> bool:
        """Whether the chain is that of the training schedule, with a variance of the papers."""
        return self.variance in SCHEDULE_VARIANCES

    @property
    def draws(self) -> int:
        """Number of noises per level."""
        return (1 if self.uses_schedule else DEFAULT_DRAWS) if self.num_draws is None else self.num_draws

    @property
    def steps(self) -> int:
        """Number of steps of the chain in log(sigma/alpha)."""
        return DEFAULT_STEPS if self.num_steps is None else self.num_steps
