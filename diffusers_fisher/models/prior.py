"""The Gaussian that a trace model starts from: independent coordinates with the data's mean and variances.

Notation: s = sigma/alpha; for x_0 ~ N(m, lambda) in each coordinate, Cov[eps|x_t] = lambda/(lambda + s^2).
"""

import torch
import torch.nn.functional as F
from torch import nn

from ..distributions.covariance import DCTBasis
from ..errors import InputError

VARIANCE_FLOOR = 1e-6  # part of the mean variance: coordinates that never vary must not have an infinite logarithm


class GaussianPrior(nn.Module):
    """Mean and variances of the data per coordinate, in the sample's own coordinates or those of the DCT.

    Args:
        shape: shape of the statistics, which broadcasts to one sample. For samples (C, H, W) of another size the
            statistics are interpolated: over the image for pixels, over the frequencies for the DCT. Statistics of
            tokens (N, C) can't be interpolated, so they serve samples of N tokens alone; (1, C) serves any number.
        basis: "pixel" or "dct". The mean is in the sample's own coordinates in both cases.
    """

    mean: torch.Tensor
    variance: torch.Tensor

    def __init__(self, shape: tuple[int, ...], basis: str):
        super().__init__()
        self.basis = basis
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.ones(shape))

    def set(self, mean: torch.Tensor | float, variance: torch.Tensor | float) -> None:
        """Sets the data's statistics, which broadcast to the prior's shape; variances are at least 1e-6 of their mean.

        Raises:
            InputError: shapes do not fit, or variances are negative, all zero or not finite.
        """
        mean, variance = (torch.as_tensor(value).detach().float() for value in (mean, variance))
        for name, value in (("mean", mean), ("variance", variance)):
            try:
                value.expand(self.mean.shape)
            except RuntimeError:
                raise InputError(
                    f"The prior's {name} has shape {tuple(value.shape)}; allowed: what broadcasts to "
                    f"{tuple(self.mean.shape)}, the trace model's `prior_shape`."
                ) from None
        if not (torch.isfinite(mean).all() and torch.isfinite(variance).all() and (variance >= 0).all()):
            raise InputError("The prior's mean must be finite, its variance finite and not negative.")
        if not bool((variance > 0).any()):
            raise InputError("The prior's variance is zero everywhere; give the variance of the training data.")
        self.mean.copy_(mean.expand(self.mean.shape))
        self.variance.copy_(variance.clamp_min(VARIANCE_FLOOR * float(variance.mean())).expand(self.mean.shape))

    def variances(self, shape: torch.Size) -> torch.Tensor:
        """Returns the variances for samples of `shape`, float32."""
        return self._resize(self.variance.float().clamp_min(1e-12).log(), shape).exp()

    def logits(self, log_noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Returns log(lambda/s^2), which is the logit of r, for every coordinate, (B, *shape) float32."""
        return self.variances(shape).log() - 2 * log_noise.float().view(-1, *[1] * len(shape))

    def mean_logit(self, log_noise: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Returns the logit of r, (B,) float32. r is the mean of lambda/(lambda + s^2) over the coordinates."""
        logits = self.logits(log_noise, shape).flatten(1)
        return torch.logsumexp(F.logsigmoid(logits), 1) - torch.logsumexp(F.logsigmoid(-logits), 1)

    def second_moment(self, sample: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Returns E[|x_0|^2/d | x], (B,) float32, from the variance-preserving sample (B, ...)."""
        shape = sample.shape[1:]
        mean, x = self._resize(self.mean.float(), shape).expand(shape), sample.float()
        gain = torch.sigmoid(self.logits(log_noise, shape))  # lambda/(lambda + s^2)
        norm = log_noise.float().exp().square().add(1).sqrt().view(-1, *[1] * len(shape))  # x/alpha = norm * x
        if self.basis == "dct":
            transform = DCTBasis(tuple(shape))
            mean, x = (transform.to(x.device).analyse(v.flatten(-3).double()).float().view(v.shape) for v in (mean, x))
        posterior = (1 - gain) * mean + gain * norm * x
        return (posterior.square() + (1 - gain) * self.variances(shape)).flatten(1).mean(1)

    def _resize(self, statistic: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Returns a statistic for samples of `shape`. Raises `InputError` if it does not fit them."""
        sizes = tuple(statistic.shape)
        if len(sizes) == len(shape) and all(size in (1, target) for size, target in zip(sizes, shape, strict=True)):
            return statistic.expand(shape)
        if len(sizes) == 3 and len(shape) == 3 and sizes[0] in (1, shape[0]):
            result = F.interpolate(statistic[None], shape[-2:], mode="bilinear", align_corners=False)[0]
            return result.expand(shape)
        if len(sizes) == len(shape) == 2:
            raise InputError(
                f"The trace model's prior has statistics of {sizes[0]} tokens of {sizes[1]} channels, samples have "
                f"{shape[0]} of {shape[1]}; allowed: {sizes[0]} tokens, so images of the size it was trained on. For "
                "other sizes train one with statistics per channel (`prior: channel`)."
            )
        raise InputError(
            f"The trace model's prior has shape {sizes}, samples have {tuple(shape)}; allowed: the same number of "
            "axes and channels."
        )
