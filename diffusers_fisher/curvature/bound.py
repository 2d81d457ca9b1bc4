"""An upper bound on the negative log-likelihood of samples under a denoiser: no ODE, and no graph."""

from __future__ import annotations

import torch

from ..arguments import check_kinds
from ..denoiser import Denoiser
from ..errors import InputError
from ..fisher.estimator import FisherEstimator
from ..likelihood.problem import Integration, prepare_problem
from .chain import Chain, sum_chain
from .optimal_chain import OptimalChain
from .options import BoundOptions
from .output import LikelihoodBound
from .schedule_chain import ScheduleChain


@check_kinds
def denoiser_likelihood_bound(
    denoiser: Denoiser,
    samples: torch.Tensor,
    estimator: FisherEstimator | None = None,
    options: BoundOptions | None = None,
) -> LikelihoodBound:
    """Bounds -log p of clean `samples` (B, ...) under the model behind `denoiser` from above.

    The bound is the negative ELBO of a reverse chain of Gaussian steps. With the optimal variance the density is that
    of `integrate_log_likelihood`: of the data smoothed with the schedule's lowest noise, at the sample itself. The
    bound holds for every estimator: a wrong trace loosens it. With the variances of the papers it is the papers'
    "NLL". An image's draws depend on the seed, its key, the level and the draw alone.

    Args:
        denoiser: denoiser at guidance scale 1.
        samples: clean samples in the model's coordinates (scaled latents), finite; half precision becomes float32.
        estimator: gives the trace at every state; one without a denoiser gets this one. None: for the variances of
            the papers, which have none.
        options: how to bound; None: `BoundOptions()`.

    Returns:
        `LikelihoodBound`. Cost: one evaluation per step and draw, with the estimator's trace, and no graph unless the
        estimator needs one.

    Raises:
        InputError: an estimator is missing or has no use; else as `integrate_log_likelihood`.
        UnsupportedError: a variance of the papers without a variance-preserving schedule, or a learned one without a
            network that has it.
        NumericalError: a bound or a trace that is not finite.
    """
    options = options or BoundOptions()
    if options.uses_schedule == (estimator is not None):
        raise InputError(
            f"The variance is '{options.variance}' and the estimator {estimator!r}; allowed: an estimator for "
            "'optimal' and 'diagonal', such as FiniteDifferenceFisher(), and None for the others."
        )
    chain: Chain
    if estimator is None:
        chain = ScheduleChain(denoiser, samples, options)
    else:
        integration = Integration(
            options.steps, options.num_probes, prior_mean=options.prior_mean, prior_variance=options.prior_variance,
            prior_basis=options.prior_basis,
            generator=options.generator, keys=options.keys, bins=options.bins, space=options.space,
        )  # fmt: skip
        chain = OptimalChain(prepare_problem(denoiser, samples, estimator, integration), options)
    return sum_chain(chain, options.draws, options.maps, options.on_step)
