"""Rewards on tensors: their values, their exact gradients, and what they refuse."""

import json
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from cases import relative
from PIL import Image

from diffusers_fisher import (
    EMBEDDED_CLASSES,
    ClassifierReward,
    InputError,
    LinearReward,
    MeasurementReward,
    embedded_checkpoint,
    embedded_test_images,
    gaussian_blur,
)

CLASSIFIER = Path(embedded_checkpoint()) / "classifier"


@pytest.fixture(scope="module")
def classifier():
    return ClassifierReward.from_pretrained(CLASSIFIER, target="sneaker")


def make_reward(classifier, target, model=None):
    """Returns the reward by the embedded classifier for other targets."""
    return ClassifierReward(model or classifier.model, target, classifier.image_input)


def smooth_images(count, height, width, dtype=torch.float32):
    """Returns seeded images in [0, 1] without sharp edges."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1).to(dtype)


def eight_bit(images):
    """Returns images rounded to 8 bits, as tensors and as PIL images."""
    arrays = (images * 255).round().permute(0, 2, 3, 1).numpy().astype(numpy.uint8)
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    return tensor, [Image.fromarray(array) for array in arrays]


def transformers_pixels(pictures):
    """Returns the pixel values that the checkpoint's own image processor makes of PIL images."""
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(CLASSIFIER)(pictures, return_tensors="pt")["pixel_values"]


def pixels_of(reward, images):
    """Returns the pixel values that the reward gives to its model."""
    pixel_values = []
    hook = reward.model.register_forward_pre_hook(
        lambda module, args, kwargs: pixel_values.append(kwargs["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        reward.logits(images)
    hook.remove()
    return pixel_values[0]


def central_difference_error(reward, images, step):
    """Returns the largest relative error of autograd's slope along a seeded direction."""
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, []).sum(), leaf)
    with torch.no_grad():
        forward, backward = (reward(images + sign * step * direction, []) for sign in (1, -1))
    slope = (forward - backward) / (2 * step)
    assert gradient.dtype is slope.dtype is torch.float64
    assert bool((slope.abs() > 1e-6).all())  # there is something to compare
    return float((((gradient * direction).flatten(1).sum(1) - slope) / slope).abs().max())


# Classifiers


@pytest.mark.parametrize("target", [0, 9])
def test_log_probability_is_that_of_the_transformers_pipeline_on_pil_images(classifier, target):
    images, _ = embedded_test_images()
    tensor, pictures = eight_bit(images)
    assert torch.equal(tensor, images)  # the test images have 8 bits
    with torch.no_grad():
        expected = classifier.model(pixel_values=transformers_pixels(pictures)).logits.log_softmax(-1)[:, target]
        values = make_reward(classifier, target)(images, [])
    # float32: 1e-7 a pixel where the processor multiplies by 1/255 instead of dividing; measured 0.
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (96, 64), (20, 24)], ids=str)
def test_pixels_are_those_of_the_transformers_processor_at_any_size(classifier, size):
    tensor, pictures = eight_bit(smooth_images(3, *size))
    expected, pixels = transformers_pixels(pictures), pixels_of(classifier, tensor)
    assert pixels.shape == expected.shape == (3, 3, 32, 32)
    # PIL rounds to 8 bits after each of its two passes: half of 1/255 each, twice that in a range of 2.
    tolerance = 1e-6 if size == (32, 32) else 2 / 255 + 1e-5
    assert float((pixels - expected).abs().max()) <= tolerance
    assert float((pixels - expected).abs().mean()) <= tolerance / 3


def test_resize_is_antialiased(classifier):
    """A checkerboard of single pixels becomes grey at half the size; without a filter it would be black or white."""
    checkerboard = (torch.arange(64)[:, None] + torch.arange(64)) % 2
    pixels = pixels_of(classifier, checkerboard.expand(1, 3, 64, 64).float())
    assert float(pixels.abs().max()) < 0.1  # grey is 0


def test_real_images_are_recognised(classifier):
    images, labels = embedded_test_images()
    with torch.no_grad():
        values = make_reward(classifier, labels.tolist())(images, [])
    # 56 of 64 have a probability above one half; a wrong normalisation or order of classes leaves a tenth of that.
    assert float((values > torch.tensor(0.5).log()).float().mean()) > 0.8


@pytest.mark.parametrize("form", ["names", "numbers", "mixed"])
def test_one_target_for_each_image(classifier, form):
    images, names = embedded_test_images()[0][:3], ["coat", "bag", "t-shirt"]
    numbers = [EMBEDDED_CLASSES.index(name) for name in names]
    targets = {"names": names, "numbers": numbers, "mixed": [names[0], *numbers[1:]]}[form]
    with torch.no_grad():
        values = make_reward(classifier, targets)(images, [])
        singles = [make_reward(classifier, name)(images, [])[index] for index, name in enumerate(names)]
    assert torch.equal(values, torch.stack(singles))
    assert len({round(float(value), 4) for value in values}) == 3


def test_probabilities_over_all_classes_sum_to_one(classifier):
    images = embedded_test_images()[0][:1].expand(10, -1, -1, -1)
    with torch.no_grad():
        values = make_reward(classifier, list(range(10)))(images, [])
    assert float(values.exp().sum()) == pytest.approx(1, abs=1e-5)  # float32


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("boots", r"The classifier has no class 'boots'; allowed: .*'ankle boot': 9"),
        (10, "The classifier has no class 10; allowed: "),
        (-1, "The classifier has no class -1; allowed: "),
        (["coat", "Coat"], "The classifier has no class 'Coat'; allowed: "),
    ],
)
def test_unknown_target_is_refused_when_the_reward_is_made(classifier, target, message):
    with pytest.raises(InputError, match=message):
        make_reward(classifier, target)


@pytest.mark.parametrize("count", [0, 2, 4])
def test_wrong_number_of_targets_is_refused(classifier, count):
    with pytest.raises(InputError, match=f"Got {count} target classes for 3 images; allowed: one, or as many"):
        make_reward(classifier, ["coat"] * count)(torch.rand(3, 3, 32, 32), [])


@pytest.mark.parametrize("size", [(32, 32), (48, 40)], ids=["own size", "resized"])
def test_classifiers_gradient_is_exact(size):
    reward = ClassifierReward.from_pretrained(CLASSIFIER, target=["sneaker", 3], dtype=torch.float64)
    # The step is short of the next kink of a ReLU; rounding is 1e-15 of a reward of 10 over it. Measured 2e-8.
    images = 0.2 + 0.6 * smooth_images(2, *size, dtype=torch.float64)  # away from where the resize cuts off
    assert central_difference_error(reward, images, step=1e-8) < 1e-6


def test_half_precision_classifier_gives_single_precision_rewards(classifier):
    half = ClassifierReward.from_pretrained(CLASSIFIER, target="sneaker", dtype=torch.bfloat16)
    images = embedded_test_images()[0][:8].requires_grad_()
    values = half(images, [])
    (gradient,) = torch.autograd.grad(values.sum(), images)
    assert (half.model.dtype, values.dtype, gradient.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    with torch.no_grad():
        exact = classifier(images, [])
    # Two to three digits of bfloat16: measured 0.005.
    assert relative(values, exact) < 0.02


@pytest.mark.parametrize(
    ("size", "expected"),
    [({"height": 24, "width": 28}, (24, 28)), ({"shortest_edge": 24}, (24, 24)), (24, (24, 24))],
    ids=str,
)
def test_size_is_read_in_every_form_that_transformers_wrote(tmp_path, size, expected):
    folder = shutil.copytree(CLASSIFIER, tmp_path / "classifier")
    file = folder / "preprocessor_config.json"
    settings = json.loads(file.read_text()) | {
        "size": size,
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.3, 0.4],
    }
    file.write_text(json.dumps(settings))
    reward = ClassifierReward.from_pretrained(str(folder), target=0)
    assert reward.image_input.size == expected
    pixels = pixels_of(reward, torch.full((1, 3, 8, 8), 0.5))
    assert pixels.shape[-2:] == expected
    mean = torch.tensor([0.5, 0.0, -0.25])[:, None, None].expand(3, *expected)  # (0.5 - mean)/std
    torch.testing.assert_close(pixels[0], mean, rtol=0, atol=1e-6)


def test_classifier_is_in_evaluation_mode_and_keeps_its_gradients_to_itself(classifier):
    images = embedded_test_images()[0][:2].requires_grad_()
    torch.autograd.grad(classifier(images, []).sum(), images)
    assert not classifier.model.training
    assert all(parameter.grad is None for parameter in classifier.model.parameters())


# Linear rewards


@pytest.mark.parametrize("shape", [(4, 6), (1, 4, 6), (3, 4, 6)], ids=str)
def test_linear_reward_is_the_inner_product_averaged_over_channels(shape):
    images, weights = smooth_images(2, 4, 6), torch.randn(shape, generator=torch.Generator().manual_seed(2))
    expected = [(image * weights.expand(3, 4, 6)).sum() / 3 for image in images]
    # float32 sums in another order
    torch.testing.assert_close(LinearReward(weights)(images, []), torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("width", [6, 7, 2, 3])
def test_left_minus_right_is_the_difference_of_the_halves_means(width):
    reward, half = LinearReward.left_minus_right(5, width), width // 2
    images = smooth_images(4, 5, width)
    expected = images[..., :half].mean((1, 2, 3)) - images[..., -half:].mean((1, 2, 3))
    # float32 sums in another order
    torch.testing.assert_close(reward(images, []), expected, rtol=1e-5, atol=1e-6)
    assert float(reward(torch.full((1, 3, 5, width), 0.7), [])) == pytest.approx(0, abs=1e-6)
    left = torch.zeros(1, 3, 5, width)
    left[..., :half] = 1
    assert float(reward(left, [])) == pytest.approx(1, abs=1e-6)
    assert float(reward(left.flip(-1), [])) == pytest.approx(-1, abs=1e-6)


def test_linear_reward_of_another_size_is_refused():
    with pytest.raises(
        InputError, match=r"The weights have \(4, 6\) pixels, the images \(6, 4\). Pass weights of the"
    ):
        LinearReward(torch.ones(4, 6))(torch.rand(1, 3, 6, 4), [])


# Measurements


MASK = torch.tensor([[1.0, 0.0], [0.5, 0.0]])


@pytest.mark.parametrize("form", ["one target", "one per sample", "one in a batch"])
def test_measurement_is_minus_the_weighted_mean_square(form):
    images, targets = smooth_images(3, 2, 2), smooth_images(6, 2, 2)[3:]
    target = {"one target": targets[0], "one per sample": targets, "one in a batch": targets[:1]}[form]
    differences = images - (targets if form == "one per sample" else targets[0])
    squares = differences.square().mean(1)
    expected = -(squares[:, 0, 0] + 0.5 * squares[:, 1, 0]) / 1.5
    # float32 sums in another order
    torch.testing.assert_close(MeasurementReward(target, MASK)(images, []), expected, rtol=1e-5, atol=1e-7)


def test_measurement_is_zero_where_the_known_pixels_agree_and_negative_elsewhere():
    target, images = smooth_images(1, 2, 2)[0], smooth_images(1, 2, 2)
    images[..., 1] = 1 - images[..., 1]  # unknown pixels
    reward = MeasurementReward(target, MASK > 0)
    assert float(reward(images, [])) == 0
    images[..., 0, 0] += 0.1
    assert float(reward(images, [])) == pytest.approx(-(0.1**2) / 2, rel=1e-5)  # one pixel of two that are known


@pytest.mark.parametrize(
    "mask",
    [torch.zeros(2, 2), torch.tensor([[1.0, -0.1], [0.0, 0.0]]), torch.full((2, 2), torch.nan)],
    ids=["zero", "negative", "nan"],
)
def test_mask_of_zeros_is_refused(mask):
    with pytest.raises(
        InputError, match=r"The mask must be non-negative and not all zero\. Pass 1 for the known pixels"
    ):
        MeasurementReward(torch.rand(3, 2, 2), mask)


@pytest.mark.parametrize(
    ("target", "mask"),
    [((3, 4, 2), (2, 2)), ((1, 2, 2), (2, 2)), ((3, 2, 2), (2, 4)), ((2, 3, 2, 2), (2, 2))],
    ids=["target's size", "target's channels", "mask's size", "number of targets"],
)
def test_measurement_that_does_not_fit_the_images_is_refused(target, mask):
    reward = MeasurementReward(torch.rand(target), torch.ones(mask))
    with pytest.raises(
        InputError, match=r"do not fit images of shape \(3, 3, 2, 2\); allowed: one target, or one per image"
    ):
        reward(torch.rand(3, 3, 2, 2), [])


@pytest.mark.parametrize("std", [0.4, 1.0, 2.5])
def test_blur_is_the_gaussian_convolution(std):
    """The reference is the sum over all pixels, with the edge pixels repeated outwards."""
    images, radius = smooth_images(2, 7, 9, torch.float64), int(numpy.ceil(3 * std))
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / std) ** 2).double()
    weights = weights[:, None] * weights / weights.sum() ** 2
    expected = torch.zeros_like(images)
    for dy in range(len(offsets)):
        for dx in range(len(offsets)):
            rows = (torch.arange(7) + offsets[dy]).clamp(0, 6)
            columns = (torch.arange(9) + offsets[dx]).clamp(0, 8)
            expected += weights[dy, dx] * images[:, :, rows][..., columns]
    # float32 exponentials of integers in the reference
    torch.testing.assert_close(gaussian_blur(std)(images), expected, rtol=1e-6, atol=1e-7)


def test_blur_without_width_is_refused():
    with pytest.raises(InputError, match=r"`std` is 0; allowed: a positive number of pixels"):
        gaussian_blur(0)


def test_deblurring_is_best_at_the_sharp_image():
    sharp, blur = embedded_test_images()[0][:2], gaussian_blur(1.0)
    reward = MeasurementReward(blur(sharp), operator=blur)
    assert reward(sharp, []).tolist() == [0, 0]
    assert bool((reward(blur(sharp), []) < -1e-4).all())
    leaf = blur(sharp).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(leaf, []).sum(), leaf)
    assert bool(
        ((gradient * (sharp - leaf)).flatten(1).sum(1) > 0).all()
    )  # the gradient points toward the sharp image


def test_measurements_of_another_size_are_refused():
    reward = MeasurementReward(torch.rand(3, 2, 2), operator=lambda images: images[..., ::2, ::2])
    assert reward(torch.rand(1, 3, 4, 4), []).shape == (1,)
    with pytest.raises(
        InputError, match=r"do not fit measurements of shape \(1, 3, 1, 1\); allowed: .* measurements' size"
    ):
        reward(torch.rand(1, 3, 2, 2), [])


@pytest.mark.parametrize(
    "reward",
    [
        LinearReward(smooth_images(1, 6, 8)[0] - 0.3),
        MeasurementReward(smooth_images(3, 6, 8)[2], smooth_images(1, 6, 8)[0, 0]),
        MeasurementReward(smooth_images(3, 6, 8)[2], operator=gaussian_blur(1.5)),
    ],
    ids=["linear", "measurement", "deblurring"],
)
def test_gradients_of_simple_rewards_are_exact(reward):
    # Quadratic at most, so truncation is nothing; rounding is 1e-16 of a reward of 0.1 over a step of 1e-4.
    assert central_difference_error(reward, smooth_images(2, 6, 8, dtype=torch.float64), step=1e-4) < 1e-10


def test_targets_are_the_same_as_images_of_every_kind():
    """A PIL image, an array of floats and a tensor in [-1, 1] stand for one target, up to float32 rounding."""
    from PIL import Image

    pixels = torch.randint(0, 256, (4, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    tensor = pixels.permute(2, 0, 1) / 255
    images = torch.rand(1, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = MeasurementReward(tensor)(images, [])
    rewards = [
        MeasurementReward(Image.fromarray(pixels.numpy())),
        MeasurementReward(pixels.numpy() / 255),
        MeasurementReward(2 * tensor - 1, data_range=(-1.0, 1.0)),
    ]
    for reward in rewards:
        torch.testing.assert_close(reward(images, []), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "target",
    [torch.rand(4, 6), torch.full((3, 4, 6), 255.0), torch.full((3, 4, 6), torch.nan)],
    ids=["flat", "bytes", "NaN"],
)
def test_targets_that_are_no_images_are_refused_when_the_reward_is_made(target):
    with pytest.raises(InputError, match="The target of the reward: "):
        MeasurementReward(target)
