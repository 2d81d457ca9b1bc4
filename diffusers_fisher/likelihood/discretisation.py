"""The discretisation error of a likelihood, estimated from the evaluations of one run."""

from __future__ import annotations

import torch

from .schemes import Scheme, quadrature_weights


def estimated_error(
    prior_error: torch.Tensor, rests: torch.Tensor, variance: torch.Tensor, shifts: torch.Tensor, grid: torch.Tensor,
    scheme: Scheme,
) -> torch.Tensor:  # fmt: skip
    """Estimates the size of the discretisation error, (B,) nats per dimension, from one run.

    The fractions below were set on Gaussians and mixtures: docs/likelihood.md tells the cases that the sum covers, and
    its size. The probes' noise is known, so its part in every difference is taken away.

    Args:
        prior_error: (B,) nats per dimension, difference of the prior between the two solutions' ends: the error of the
            path.
        rests: (levels, B) 1 - r at the nodes.
        variance: (levels, B) variance of `rests` by the probes; an estimate, which may be below 0.
        shifts: (levels - 1, B) distance of each point where the trace was taken from the solution, in steps.
        grid: (levels,) log s.
    """
    variance = variance.clamp_min(0)
    # The error of the trace's integral if r were exact: the difference from another quadrature of the same values.
    pair = [quadrature_weights(grid, points) for points in (scheme.quadrature, scheme.companion_quadrature)]
    weights = (pair[0] - pair[1])[:, None]
    quadrature = _without_noise((weights * rests).sum(0), (weights.square() * variance).sum(0))
    # The error of r itself, which was taken beside the solution. How much r varies there is not known, but how much it
    # varies along the path is: a point that is off by a fraction of a step counts that fraction of the step's change
    # in r. The local variance v = s^2 r/(1 - r) tells a smooth change from a surprise: where log v (logit r + 2 log s)
    # grows or falls over a step as over the step before, the change of r was foreseeable.
    r = (1 - rests).clamp(1e-9, 1 - 1e-9)
    growth = (r.logit() + 2 * grid[:, None]).diff(dim=0)
    before = torch.nn.functional.pad(growth[:-1], (0, 0, 1, 0))
    steps = grid.diff()[:, None]
    foreseen = torch.sigmoid(r[:-1].logit() - 2 * steps + before)
    # The noise of logit r is that of r over r (1 - r); beyond 1, where r itself is lost in it, it is not linear.
    logit_noise = (variance.sqrt() / (r * (1 - r))).clamp_max(1).square()
    earlier = torch.nn.functional.pad(logit_noise[:-2], (0, 0, 1, 0))
    noise = variance[1:] + (foreseen * (1 - foreseen)).square() * (4 * logit_noise[:-1] + earlier)
    surprise = _without_noise(r[1:] - foreseen, noise)
    offsets = shifts * steps
    # On the cases that the fractions were set on, a twentieth of the whole change covers the error where r changes
    # smoothly; a surprise needs twice its size.
    smooth = (offsets * _without_noise(rests.diff(dim=0), variance[1:] + variance[:-1])).sum(0) / 20
    # Where the companions are of lower order than the result, all but the surprise overstate the error, and the more
    # the finer the grid: on grids of steps below 3 in log s they count less (`Scheme.fine`).
    share = scheme.fine + (scheme.coarse - scheme.fine) * min(1.0, float(steps.max()) / 3)
    return share * (prior_error + quadrature + smooth) + 2 * (offsets * surprise).sum(0)


def _without_noise(difference: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Returns the size of a difference whose noise has a known variance, without the noise."""
    return (difference.square() - variance).clamp_min(0).sqrt()
