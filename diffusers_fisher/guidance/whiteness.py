"""Tells whether noise is still white, by its power in bands of frequencies and its channels' correlations.

A model was trained on white noise. Ascent on a sphere keeps the noise's norm and nothing else: a reward for bright
left halves, say, moves power into the lowest frequencies of the noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy
import torch

from ..errors import InputError, check_floats
from .checks import normalise, norms
from .movers import shell_distance

PROJECTIONS = ("soft", "hard")
LARGEST_SCORE = 2.0  # standard deviations that the soft projection leaves
ROUNDS = 3  # of projections, because a return to the norm changes the powers a little
_SMALLEST = 1e-300  # of probabilities and powers: their logarithms and quotients stay finite


@dataclasses.dataclass(frozen=True)
class NoiseWhiteness:
    """Holds how far noise is from white noise, in standard deviations of the latter, and its p-values.

    Args:
        p_values: (B,) float64, the probability that white noise has scores whose squares have a sum at least as large.
            They are uniform for white noise, nearly 0 for noise of other colours, and nearly 1 for noise that is more
            regular than random noise.
        band_scores: (B, C, bands) float64, the power of every channel in every band of frequencies. A band has the
            coefficients of the orthonormal discrete Fourier transform whose largest number of waves along a side is 0
            (the mean), 1, 2, 3 to 4, 5 to 8, and so on.
        correlation_scores: (B, C * (C - 1) / 2) float64, the correlation of every pair of channels, in the order
            (0, 1), (0, 2), ..., (1, 2), ....
    """

    p_values: torch.Tensor
    band_scores: torch.Tensor
    correlation_scores: torch.Tensor


@dataclasses.dataclass(frozen=True)
class NoiseLayout:
    """Brings noise in a pipeline's layout to (B, C, ...), with one axis per direction in space or time, and back."""

    unpack: Callable[[torch.Tensor], torch.Tensor] = lambda noise: noise
    pack: Callable[[torch.Tensor], torch.Tensor] = lambda noise: noise

    def project(self, noise: torch.Tensor, projection: str) -> torch.Tensor:
        """Returns noise in the pipeline's layout after `project_to_white`."""
        return self.pack(project_to_white(self.unpack(noise), projection)).to(noise)


class _Spectrum:
    """Holds the Fourier coefficients of noise (B, C, ...), and its powers by band.

    A band has with every coefficient its complex conjugate, so its power is the squared norm of the noise's projection
    onto as many orthogonal directions as the band has coefficients: chi-square with that many degrees of freedom.
    """

    def __init__(self, noise: torch.Tensor):
        self._axes = tuple(range(2, noise.ndim))
        self._bands = _bands(noise.shape[2:])
        self.noise = noise
        self.coefficients = torch.fft.fftn(noise, dim=self._axes, norm="ortho")
        self.counts = self._bands.flatten().bincount().double()  # (bands,) coefficients of each band
        shape = (*noise.shape[:2], len(self.counts))
        squares = self.coefficients.abs().square().flatten(2)
        self.powers = torch.zeros(shape, dtype=torch.float64).index_add_(2, self._bands.flatten(), squares)

    def scores(self) -> torch.Tensor:
        """Returns the standard normal numbers, (B, C, bands), of the same probabilities as the powers."""
        from scipy.special import gammainc, gammaincc, ndtri

        shapes, halves = (self.counts / 2).numpy(), (self.powers / 2).numpy()
        lower, upper = (numpy.maximum(law(shapes, halves), _SMALLEST) for law in (gammainc, gammaincc))
        return torch.from_numpy(numpy.where(lower < upper, ndtri(lower), -ndtri(upper)))

    def powers_at(self, scores: torch.Tensor) -> torch.Tensor:
        """Returns the powers whose scores are `scores`."""
        from scipy.special import gammaincinv, ndtr

        return 2 * torch.from_numpy(gammaincinv((self.counts / 2).numpy(), ndtr(scores.numpy())))

    def correlations(self) -> torch.Tensor:
        """Returns the products of channels in standard deviations, (B, pairs).

        The deviations are those for the powers that the channels have: within a band white noise has every direction
        with the same probability. So the scores are not correlated with those of the powers.
        """
        flat = self.noise.flatten(2)
        deviations = ((self.powers / self.counts) @ self.powers.mT).sqrt()
        first, second = torch.triu_indices(flat.shape[1], flat.shape[1], offset=1)
        return ((flat @ flat.mT) / deviations.clamp_min(_SMALLEST))[:, first, second]

    def with_powers(self, powers: torch.Tensor) -> torch.Tensor:
        """Returns noise of other powers and the same phases; where no power of a sample changes, exactly its noise."""
        factors = (powers / self.powers.clamp_min(_SMALLEST)).sqrt()
        change = self.coefficients * (factors - 1)[..., self._bands]
        return self.noise + torch.fft.ifftn(change, dim=self._axes, norm="ortho").real


def _bands(sizes: Sequence[int]) -> torch.Tensor:
    """Returns the band of every Fourier coefficient, of the shape `sizes`: octaves of the number of waves."""
    waves = torch.zeros(tuple(sizes))
    for axis, size in enumerate(sizes):
        of_axis = torch.fft.fftfreq(size, 1 / size).abs()
        waves = torch.maximum(waves, of_axis.reshape(-1, *[1] * (len(sizes) - 1 - axis)))
    return torch.where(waves > 0, waves.clamp_min(1).log2().ceil() + 1, 0).long()


def noise_whiteness(noise: torch.Tensor) -> NoiseWhiteness:
    """Compares noise with white noise of variance 1.

    Args:
        noise: (B, C, h, w), or (B, C, frames, h, w) for videos. Packed latents must be unpacked.

    Returns:
        `NoiseWhiteness`. Its p-values are right from 16 elements per channel on. Cost: one FFT on the CPU, in float64.

    Raises:
        InputError: noise of another form, or not finite.
    """
    spectrum = _Spectrum(_checked(noise))
    bands, correlations = spectrum.scores(), spectrum.correlations()
    return NoiseWhiteness(_p_values(bands, correlations), bands, correlations)


def project_to_white(noise: torch.Tensor, projection: str) -> torch.Tensor:
    """Returns the noise with the power of white noise in every band of frequencies of every channel.

    Each sample keeps its norm, and powers are those relative to the norm. Each Fourier coefficient keeps its phase,
    except in samples whose channels are so correlated that the sum of the squares of their scores is more than 2
    standard deviations above that of white noise: these channels are mixed until it is not.

    Args:
        noise: as in `noise_whiteness`.
        projection: "hard" gives every band the mean power of white noise. "soft" brings scores of bands to at most 2
            standard deviations, and makes all of them smaller where the sum of the squares of all scores is more
            than 2 standard deviations above that of white noise. Noise within these ranges changes by no more than
            rounding.

    Raises:
        InputError: another projection, or noise of another form or not finite.
    """
    check_projection(projection)
    checked_noise, shell = _checked(noise), shell_distance(noise)
    lengths, scale = norms(checked_noise), math.sqrt(checked_noise[0].numel())
    result = scale * normalise(checked_noise)[0]
    for place in range(ROUNDS):
        spectrum = _Spectrum(_with_less_correlation(result) if place else result)
        powers = spectrum.counts.expand_as(spectrum.powers) if projection == "hard" else _soft_powers(spectrum, shell)
        result = scale * normalise(spectrum.with_powers(powers))[0]
    return (lengths / scale * result).to(noise)


def _largest_sum(degrees: int) -> float:
    """Returns the sum of squares of `degrees` scores that is 2 standard deviations above that of white noise."""
    from scipy.special import chdtri, ndtr

    return float(chdtri(degrees, ndtr(-LARGEST_SCORE)))


def _soft_powers(spectrum: _Spectrum, shell: torch.Tensor) -> torch.Tensor:
    """Returns the powers of the soft projection, exactly the spectrum's own where a band's score does not change.

    Args:
        shell: (B,) deviations of the norm, which every band shares. The powers are those relative to the norm.
    """
    scores, correlations = spectrum.scores(), spectrum.correlations()
    others = correlations.square().sum(1) + shell.clamp(-LARGEST_SCORE, LARGEST_SCORE).square()
    room = (_largest_sum(scores[0].numel() + correlations.shape[1]) - others).clamp_min(0)
    target = scores.clamp(-LARGEST_SCORE, LARGEST_SCORE)
    shrinkage = (room / target.square().sum((1, 2)).clamp_min(_SMALLEST)).sqrt().clamp_max(1)
    target = target * shrinkage[:, None, None]
    return torch.where(target == scores, spectrum.powers, spectrum.powers_at(target))


def _with_less_correlation(noise: torch.Tensor) -> torch.Tensor:
    """Returns noise whose channels are mixed, with their norms, where their correlations are beyond their range.

    The mixture changes the correlation matrix R to a matrix between R and the identity: R'^(1/2) R^(-1/2) does.
    """
    if noise.shape[1] == 1:
        return noise
    scores = _Spectrum(noise).correlations()
    limits = _largest_sum(scores.shape[1]) / scores.square().sum(1).clamp_min(_SMALLEST)
    places = (limits < 1).nonzero().flatten()
    if len(places) == 0:
        return noise
    flat = noise[places].flatten(2)
    lengths = torch.linalg.vector_norm(flat, dim=2, keepdim=True).clamp_min(_SMALLEST)
    values, vectors = torch.linalg.eigh((flat / lengths) @ (flat / lengths).mT)
    values = values.clamp_min(1e-6)  # of channels that are equal, which no mixture tells apart
    new_values = 1 + limits[places, None].sqrt() * (values - 1)
    mixture = vectors @ torch.diag_embed((new_values / values).sqrt()) @ vectors.mT
    result = noise.clone()
    result[places] = (lengths * (mixture @ (flat / lengths))).view_as(noise[places])
    return result


def _p_values(bands: torch.Tensor, correlations: torch.Tensor) -> torch.Tensor:
    """Returns the probabilities (B,) of chi-square that the scores' squares have a sum at least as large."""
    from scipy.special import chdtrc

    squares = bands.square().sum((1, 2)) + correlations.square().sum(1)
    return torch.from_numpy(chdtrc(bands[0].numel() + correlations.shape[1], squares.numpy()))


def _checked(noise: torch.Tensor) -> torch.Tensor:
    """Returns the noise in float64 on the CPU, after a check of its form."""
    check_floats("`noise`", noise)
    noise_on_cpu = noise.detach().cpu().double()
    # Squares of squares must not overflow.
    if noise.ndim < 3 or not noise.numel() or not bool((noise_on_cpu.abs() < 1e70).all()):
        raise InputError(
            f"`noise` has shape {tuple(noise.shape)}; allowed: (B, C, h, w) or (B, C, frames, h, w), finite and below "
            "1e70. Unpack packed latents first."
        )
    return noise_on_cpu


def check_projection(projection: str) -> None:
    """Refuses a projection of another name. Raises `InputError`."""
    if projection not in PROJECTIONS:
        raise InputError(f"`noise_projection` is '{projection}'; allowed: {', '.join(PROJECTIONS)}, or None.")
