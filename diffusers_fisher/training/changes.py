"""Changes images, so that a trace model is also right for images that are unlike the training data."""

import torch
import torch.nn.functional as F


def change_images(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns images (n, C, H, W) in [0, 1], each changed in one random way.

    An image is inverted, noised, turned, blurred, mixed with another image, shuffled in blocks, made paler or darker,
    or replaced by one colour.
    """
    functions = (_invert, _add_noise, _add_noise, _rotate, _blur, _mix, _shuffle, _fade, _fill)
    order = torch.randint(len(functions), (len(pixels),), generator=generator).tolist()
    rows = [functions[index](pixels, row, generator) for row, index in enumerate(order)]
    return torch.stack(rows).clamp(0, 1)


def _number(generator: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=generator))


def _invert(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    return 1 - pixels[row]


def _add_noise(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(pixels[row].shape, generator=generator).to(pixels)
    return pixels[row] + _number(generator, 0.02, 0.6) * noise


def _rotate(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    square = pixels.shape[-1] == pixels.shape[-2]
    quarters = int(torch.randint(1, 4, (), generator=generator)) if square else 2
    return pixels[row].rot90(quarters, (-2, -1))


def _blur(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    factor = int(torch.randint(2, 5, (), generator=generator))
    small_image = F.interpolate(pixels[row : row + 1], scale_factor=1 / factor, mode="area")
    return F.interpolate(small_image, pixels.shape[-2:], mode="bilinear")[0]


def _mix(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    other = int(torch.randint(len(pixels), (), generator=generator))
    return torch.lerp(pixels[row], pixels[other], _number(generator, 0.2, 0.8))


def _shuffle(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    """Puts the quarters into a random order; rolls images of odd sizes by half their size."""
    image = pixels[row]
    if image.shape[-1] % 2 or image.shape[-2] % 2:
        return image.roll((image.shape[-2] // 2, image.shape[-1] // 2), (-2, -1))
    quarters = [part for half in image.chunk(2, -2) for part in half.chunk(2, -1)]
    a, b, c, d = (quarters[index] for index in torch.randperm(4, generator=generator).tolist())
    return torch.cat([torch.cat([a, b], -1), torch.cat([c, d], -1)], -2)


def _fade(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    return _number(generator, 0.2, 1.5) * (pixels[row] - 0.5) + _number(generator, 0.3, 0.7)


def _fill(pixels: torch.Tensor, row: int, generator: torch.Generator) -> torch.Tensor:
    colour = torch.rand(len(pixels[row]), 1, 1, generator=generator).to(pixels)
    return colour.expand(pixels[row].shape)
