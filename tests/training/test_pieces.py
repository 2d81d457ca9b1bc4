"""Pieces of batches are the same for any number of processes, and images that can't be read don't stop a run."""

import itertools

import pytest
import torch
from image_folders import image_folder

from diffusers_fisher import InputError
from diffusers_fisher.data import ImageData, open_images
from diffusers_fisher.training.pieces import BatchShare, TrainingData
from diffusers_fisher.training.schedule import Optimisation


def training_data(folder, batch_size=4, held_out=3, streaming=True, steps=6, count=12, corrupt=()):
    source = open_images(ImageData(str(image_folder(folder, count, corrupt=corrupt)), streaming=streaming))
    settings = Optimisation(steps, batch_size, 1e-3, 0.0, warmup_steps=0, ema_decay=0.0, save_every=1)
    return TrainingData(source, settings, held_out, seed=0)


def image(folder, number):
    """Returns the pixels of train-`number`.png."""
    images = open_images(ImageData(str(folder)))
    names = [images.name(index) for index in range(len(images))]
    return images[names.index(f"train-{number}.png")].pixels


def order(folder):
    """Returns the numbers of the images in the order of the data."""
    images = open_images(ImageData(str(folder)))
    return [int(images.name(index).removeprefix("train-").removesuffix(".png")) for index in range(len(images))]


@pytest.mark.parametrize("streaming", [True, False])
def test_pieces_do_not_depend_on_the_processes_and_corrupt_images_are_replaced(tmp_path, streaming):
    """Four processes with pieces of one image give the batches of one process, from any step on."""
    data = training_data(tmp_path, streaming=streaming, corrupt=(4, 5, 7))
    all_pieces = list(data.pieces(BatchShare(4), 0, 0))
    assert len(all_pieces) == 6
    for start in (0, 3):
        parts = [list(data.pieces(BatchShare(4, 4, process), start, 0)) for process in range(4)]
        for batch, pieces in zip(all_pieces[start:], zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat([piece.samples for piece in pieces]), batch.samples)
            assert [name for piece in pieces for name in piece.skipped] == batch.skipped
    names = {name for piece in all_pieces for name in piece.skipped}
    assert names and names <= {"train-4.png", "train-5.png", "train-7.png"}


def test_a_stream_of_unreadable_images_raises(tmp_path):
    data = training_data(tmp_path, corrupt=range(12))
    with pytest.raises(InputError, match=r"None of 1000 images in a row can be read; the first is 'train-"):
        next(iter(data.pieces(BatchShare(4), 0, 0)))
    with pytest.raises(InputError, match=r"None of 3 images in a row can be read; the first is 'train-"):
        data.held_out()


@pytest.mark.parametrize("streaming", [True, False])
def test_held_out_images_replace_held_out_images_alone(tmp_path, streaming):
    folder = image_folder(tmp_path)
    names = order(folder)[:3] if streaming else order(folder)[-3:]
    piece = training_data(tmp_path, streaming=streaming, corrupt=names[-1:]).held_out()
    assert piece.skipped == [f"train-{names[-1]}.png"]
    expected = [image(folder, names[index]) for index in (0, 1, 0)]
    assert torch.equal(piece.samples, torch.stack(expected))


def test_a_stream_without_enough_held_out_images_is_refused(tmp_path):
    with pytest.raises(InputError, match="has 2 images; 3 are to be held out"):
        training_data(tmp_path, count=2).held_out()


def test_some_samples_of_a_stream_leave_out_unreadable_images(tmp_path):
    numbers = order(image_folder(tmp_path))[3:]
    data = training_data(tmp_path, corrupt=(*numbers[:2], numbers[5]))
    pieces = list(data.some(100, 1))  # pieces of one, as the last piece may be
    assert [piece.skipped for piece in pieces] == [
        [f"train-{number}.png" for number in numbers[:2]], [], [], [f"train-{numbers[5]}.png"], [], [],
    ]  # fmt: skip
    readable = itertools.chain(numbers[2:5], numbers[6:])
    expected = torch.stack([image(tmp_path, number) for number in readable])
    assert torch.equal(torch.cat([piece.samples for piece in pieces]), expected)
