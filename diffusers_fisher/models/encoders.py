"""Encoders of the trace model: they turn images or packed tokens into a vector per sample and features per position.

They have no normalisation layers, which would remove the amplitudes that tell how large the local variance is.
Residual branches start at zero instead.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..errors import InputError, check_shape

LOG_NOISE_LIMIT = 8.0  # the embedding sees log(sigma/alpha) clamped to +-8, beyond every usual schedule

FEATURE_LEVELS = 48  # so many that features are nearly linear between two levels
OUTLIER = 8.0  # standard deviations of a feature; a sample beyond them is unlike all training data


def _start_at_zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class NoiseEmbedding(nn.Module):
    """Embeds log(sigma/alpha), and a pooled text vector if there is one, as a vector of `channels` numbers."""

    def __init__(self, channels: int, pooled_channels: int | None):
        super().__init__()
        self.num_frequencies = 16
        self.first = nn.Linear(2 * self.num_frequencies + 1, channels)
        self.second = nn.Linear(channels, channels)
        self.pooled = None if pooled_channels is None else nn.Linear(pooled_channels, channels)

    def forward(self, log_noise: torch.Tensor, pooled: torch.Tensor | None) -> torch.Tensor:
        """Maps (B,) and (B, pooled_channels) to (B, channels)."""
        value = log_noise.clamp(-LOG_NOISE_LIMIT, LOG_NOISE_LIMIT)[:, None]
        exponents = torch.linspace(math.log(0.1), math.log(4.0), self.num_frequencies, device=value.device)
        angles = value * exponents.exp()  # radians per unit of log(sigma/alpha)
        features = torch.cat([angles.sin(), angles.cos(), value / 4], dim=1).to(self.first.weight.dtype)
        embedding = self.second(F.silu(self.first(features)))
        if self.pooled is not None and pooled is not None:
            embedding = embedding + self.pooled(pooled.to(embedding.dtype))
        return F.silu(embedding)


class ConvolutionBlock(nn.Module):
    """Computes h + conv(silu(scale * conv(silu(h)) + shift)); scale and shift depend on the noise level."""

    def __init__(self, channels: int, embedding_channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.modulation = nn.Linear(embedding_channels, 2 * channels)
        _start_at_zero(self.second)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        return h + self.second(F.silu((1 + scale) * self.first(F.silu(h)) + shift))


class ImageEncoder(nn.Module):
    """Cuts images into patches; a stem and stages of `ConvolutionBlock`s follow. Each stage halves the size.

    Attributes:
        features: length of the pooled vector.
        stem_channels: channels of the first feature map.
        channels: channels of the last feature map.
    """

    def __init__(self, in_channels: int, channels: list[int], layers: int, patch_size: int, embedding_channels: int):
        super().__init__()
        self.patch_size = patch_size
        self.stem = nn.Conv2d(in_channels * patch_size**2, channels[0], 3, padding=1)
        self.stages = nn.ModuleList()
        self.downs = nn.ModuleList()
        for index, width in enumerate(channels):
            if index:
                self.downs.append(nn.Conv2d(channels[index - 1], width, 3, stride=2, padding=1))
            self.stages.append(nn.ModuleList(ConvolutionBlock(width, embedding_channels) for _ in range(layers)))
        self.stem_channels, self.channels = channels[0], channels[-1]
        self.features = channels[0] + channels[-1]

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps (B, C, H, W) to a vector (B, features), the first feature map and the last."""
        if x.shape[-1] % self.patch_size or x.shape[-2] % self.patch_size:
            raise InputError(
                f"Samples are {tuple(x.shape[-2:])} wide; allowed: multiples of the trace model's `patch_size`, "
                f"{self.patch_size}."
            )
        stem = self.stem(F.pixel_unshuffle(x, self.patch_size))
        h = stem
        for index, stage in enumerate(self.stages):
            h = h if index == 0 else self.downs[index - 1](h)
            for block in stage:  # type: ignore[attr-defined]
                h = block(h, embedding)
        return torch.cat([log_energy(stem.flatten(2)), F.silu(h).mean((2, 3))], dim=1), stem, h


class TokenBlock(nn.Module):
    """Adds to h a two-layer network of each token, its neighbours (a depthwise convolution) and the tokens' mean."""

    def __init__(self, channels: int, embedding_channels: int):
        super().__init__()
        self.neighbours = nn.Conv1d(channels, channels, 3, padding=1, groups=channels)
        self.first = nn.Linear(channels, 2 * channels)
        self.mean = nn.Linear(channels, 2 * channels)
        self.second = nn.Linear(2 * channels, channels)
        self.modulation = nn.Linear(embedding_channels, 4 * channels)
        _start_at_zero(self.second)

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        active = F.silu(h)
        mixture = active + self.neighbours(active.mT).mT
        scale, shift = self.modulation(embedding)[:, None].chunk(2, dim=2)
        hidden = self.first(mixture) + self.mean(active.mean(1, keepdim=True))
        return h + self.second(F.silu((1 + scale) * hidden + shift))


class TokenEncoder(nn.Module):
    """Encodes packed tokens by a stem and `TokenBlock`s of one width. The attributes are those of `ImageEncoder`."""

    def __init__(self, in_channels: int, channels: list[int], layers: int, patch_size: int, embedding_channels: int):
        super().__init__()
        width = channels[0]
        self.stem = nn.Linear(in_channels, width)
        self.blocks = nn.ModuleList(TokenBlock(width, embedding_channels) for _ in range(layers * len(channels)))
        self.stem_channels = self.channels = width
        self.features = 2 * width

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Maps (B, N, C) to a vector (B, features), the first features of every token and the last."""
        stem = self.stem(x)
        h = stem
        for block in self.blocks:
            h = block(h, embedding)
        return torch.cat([log_energy(stem.mT), F.silu(h).mean(1)], dim=1), stem, h


def log_energy(x: torch.Tensor) -> torch.Tensor:
    """Returns the logarithm of the mean square over positions, (B, C) of (B, C, N): how strongly every filter answers.

    If predicted noise is among the inputs, this number tells the local variance: E|eps*|^2/d = 1 - E[r].
    """
    return (x.float().square().mean(2) + 1e-6).log().to(x.dtype)


class TraceHead(nn.Module):
    """Maps one vector per sample to `out` numbers; the last layer starts at zero."""

    def __init__(self, features: int, embedding_channels: int, channels: int, out: int):
        super().__init__()
        self.first = nn.Linear(features, channels)
        self.modulation = nn.Linear(embedding_channels, 2 * channels)
        self.second = nn.Linear(channels, channels)
        self.last = nn.Linear(channels, out)
        _start_at_zero(self.last)

    def forward(self, vector: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        hidden = F.silu((1 + scale) * self.first(vector) + shift)
        return self.last(hidden + F.silu(self.second(hidden)))


class FeatureStatistics(nn.Module):
    """Mean and deviation of the denoiser's features on training data, by noise level; float32 in models of any dtype.

    Features differ less between samples than between levels.
    """

    log_noise: torch.Tensor
    mean: torch.Tensor
    deviation: torch.Tensor

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("log_noise", torch.linspace(-LOG_NOISE_LIMIT, LOG_NOISE_LIMIT, FEATURE_LEVELS))
        self.register_buffer("mean", torch.zeros(FEATURE_LEVELS, features))
        self.register_buffer("deviation", torch.ones(FEATURE_LEVELS, features))

    def set(self, log_noise: torch.Tensor, mean: torch.Tensor, deviation: torch.Tensor) -> None:
        """Sets rising log(sigma/alpha) (levels,) with `FEATURE_LEVELS` levels, and two statistics (levels, features).

        Raises:
            InputError: shapes do not fit, levels do not rise, or values are no mean and deviation.
        """
        statistics = {"log_noise": log_noise, "mean": mean, "deviation": deviation}
        for name, value in statistics.items():
            shape = getattr(self, name).shape
            check_shape(f"The features' `{name}`", value.shape, shape, "Measure it for this model.")
            if not bool(torch.isfinite(value).all()):
                raise InputError(f"The features' `{name}` holds NaN or infinity. Pass finite values.")
        if bool((log_noise.diff() <= 0).any()) or bool((deviation < 0).any()):
            raise InputError("The features' statistics need rising `log_noise`, and a `deviation` not below zero.")
        for name, value in statistics.items():
            getattr(self, name).copy_(value)

    def standardised(self, features: torch.Tensor, log_noise: torch.Tensor) -> torch.Tensor:
        """Returns (B, features) with mean 0 and deviation 1 on training data of the same levels (B,), float32.

        The statistics are linear between the levels, and constant beyond the first and the last.
        """
        levels, tables = self.log_noise.float(), (self.mean.float(), self.deviation.float())
        value = log_noise.float().clamp(levels[0], levels[-1]).contiguous()
        right = torch.searchsorted(levels, value).clamp(1, len(levels) - 1)
        share = (value - levels[right - 1]) / (levels[right] - levels[right - 1])
        mean, deviation = (torch.lerp(table[right - 1], table[right], share[:, None]) for table in tables)
        return ((features.float() - mean) / (deviation + 1e-5)).clamp(-OUTLIER, OUTLIER)


class FeatureEncoder(nn.Module):
    """Maps summaries of the denoiser's last hidden layer to a vector, which starts at zero.

    A learned vector stands for samples without a summary.

    Args:
        features: number of features per sample.
        channels: length of the vector.
    """

    def __init__(self, features: int, embedding_channels: int, channels: int):
        super().__init__()
        self.features = features
        self.statistics = FeatureStatistics(features)
        self.head = TraceHead(features, embedding_channels, 2 * channels, channels)
        self.none = nn.Parameter(torch.zeros(channels))

    def forward(self, features: torch.Tensor | None, log_noise: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Maps (B, features), or None, and (B,) to (B, channels)."""
        if features is not None:
            standard = self.statistics.standardised(features, log_noise)
            return self.head(standard.to(embedding.dtype), embedding) + 0 * self.none
        # All parameters take part in both cases: processes that train together wait for the gradient of each.
        zeros = torch.zeros(len(log_noise), self.features, device=embedding.device, dtype=embedding.dtype)
        return self.none + 0 * self.head(zeros, embedding)


class PixelHead(nn.Module):
    """Maps the first and last feature maps to one number per coordinate; the last layer starts at zero."""

    def __init__(self, encoder: ImageEncoder | TokenEncoder, channels: int, out_channels: int):
        super().__init__()
        self.patch_size = encoder.patch_size if isinstance(encoder, ImageEncoder) else 0
        kind = nn.Linear if not self.patch_size else (lambda inputs, outputs: nn.Conv2d(inputs, outputs, 1))
        self.first = kind(encoder.stem_channels + encoder.channels, channels)
        self.last = kind(channels, out_channels * max(1, self.patch_size) ** 2)
        _start_at_zero(self.last)

    def forward(self, stem: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        if not self.patch_size:
            return self.last(F.silu(self.first(torch.cat([stem, h], dim=2))))
        h = F.interpolate(h, stem.shape[-2:], mode="nearest")
        return F.pixel_shuffle(self.last(F.silu(self.first(torch.cat([stem, h], dim=1)))), self.patch_size)


class SpectralHead(nn.Module):
    """Maps one vector per sample to one number per DCT coefficient, by learned functions of the frequency.

    Frequencies are in half cycles per pixel, so that one model serves samples of every size.
    """

    def __init__(self, in_channels: int, rank: int = 16):
        super().__init__()
        self.in_channels, self.rank = in_channels, rank
        self.first = nn.Linear(4, 64)
        self.last = nn.Linear(64, rank * in_channels)

    def forward(self, weights: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Maps `weights` (B, rank) to (B, C, H, W) with `shape` (C, H, W)."""
        device = weights.device
        rows, columns = (torch.arange(size, device=device) / size for size in shape[-2:])
        grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1)
        radius = torch.linalg.vector_norm(grid, dim=-1, keepdim=True)
        features = torch.cat([grid, radius, (radius + 1 / 64).log()], dim=-1).to(weights.dtype)
        table = self.last(F.silu(self.first(features)))
        return torch.einsum("hwcr,br->bchw", table.unflatten(-1, (self.in_channels, self.rank)), weights)
