"""Changed images are images, differ from the originals, and depend on the generator alone."""

import pytest
import torch

from diffusers_fisher.seeds import step_generator
from diffusers_fisher.training import changes

WAYS = ["_invert", "_add_noise", "_rotate", "_blur", "_mix", "_shuffle", "_fade", "_fill"]


@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (64, 1, 15, 18)])
def test_changed_images_are_images(shape):
    pixels = torch.rand(shape, generator=step_generator(0))
    images = changes.change_images(pixels, step_generator(1))
    assert images.shape == pixels.shape and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, changes.change_images(pixels, step_generator(1)))
    same = (images == pixels).flatten(1).all(1)
    assert int(same.sum()) < 8  # an image may be mixed with itself, or its quarters keep their order


@pytest.mark.parametrize("change_name", WAYS)
def test_every_way_changes_and_keeps_the_shape(change_name):
    pixels = torch.rand(4, 3, 16, 16, generator=step_generator(0))
    images = [getattr(changes, change_name)(pixels, 1, step_generator(seed)) for seed in range(6)]
    assert all(image.shape == (3, 16, 16) for image in images)
    assert any(not torch.allclose(image, pixels[1], atol=0.05) for image in images)


def test_what_some_ways_do():
    pixels = torch.rand(1, 1, 8, 8, generator=step_generator(0))
    assert torch.equal(changes._invert(pixels, 0, step_generator(0)), 1 - pixels[0])
    assert changes._fill(pixels, 0, step_generator(0)).unique().numel() == 1
    rotation = changes._rotate(pixels, 0, step_generator(0))
    assert any(torch.equal(rotation, pixels[0].rot90(quarters, (-2, -1))) for quarters in (1, 2, 3))
    shuffle = changes._shuffle(pixels, 0, step_generator(0))
    assert torch.equal(shuffle.flatten().sort().values, pixels.flatten().sort().values)
