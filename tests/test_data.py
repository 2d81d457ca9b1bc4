"""Images come from folders and datasets without changes, and errors name images that can't be read."""

import datasets
import numpy
import pytest
import torch
from image_folders import CAPTIONS, image_folder
from PIL import Image

from diffusers_fisher import InputError
from diffusers_fisher.data import CachedLatents, ImageData, UnreadableImageError, open_images


def pixels_of(path, channels=3):
    array = numpy.asarray(Image.open(path).convert("L" if channels == 1 else "RGB"), dtype=numpy.float32) / 255
    return torch.from_numpy(array[None] if channels == 1 else array.transpose(2, 0, 1).copy())


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_folder_gives_its_images_with_captions(tmp_path, channels):
    """The file names contain the name of a split, because of which ImageFolder would leave out the metadata."""
    folder = image_folder(tmp_path / "images")
    images = open_images(ImageData(str(folder), caption_column="text"), channels)
    assert len(images) == 12
    examples = {example.name: example for example in (images[index] for index in range(12))}
    for number in range(12):
        example = examples[f"train-{number}.png"]
        assert torch.equal(example.pixels, pixels_of(folder / example.name, channels))
        assert example.caption == CAPTIONS[number % 4]
    assert [images.name(index) for index in range(12)] == [images[index].name for index in range(12)]


def test_a_folder_without_captions_gives_as_many_images_as_the_limit(tmp_path):
    folder = image_folder(tmp_path / "images")
    (folder / "metadata.jsonl").unlink()
    images = open_images(ImageData(str(folder), limit=5))
    assert len(images) == 5 and images[0].caption is None


@pytest.mark.parametrize("metadata", [False, True])
def test_all_files_of_a_folder_are_read_or_named(tmp_path, metadata, caplog):
    """Names with and without the name of a split, an image that the metadata do not list, and an unknown ending."""
    folder = image_folder(tmp_path / "images", count=3)
    (folder / "train-2.png").rename(folder / "dog.png")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").unlink()
    if metadata:
        (folder / "metadata.jsonl").write_text("\n".join(lines[:2]) + "\n")
    (folder / "notes.txt").write_text("about them")
    (folder / ".hidden.png").write_bytes(b"")
    images = open_images(ImageData(str(folder)))
    names = ["train-0.png", "train-1.png"] if metadata else ["dog.png", "train-0.png", "train-1.png"]
    left_out = ["dog.png", "notes.txt"] if metadata else ["notes.txt"]
    assert [images.name(index) for index in range(len(images))] == names
    assert images.files_left_out == left_out
    assert f"{len(left_out)} files of '{folder}' are not among its images, such as '{left_out[0]}'" in caplog.text


def test_each_split_has_its_folder(tmp_path):
    image_folder(tmp_path / "images" / "train", count=2)
    image_folder(tmp_path / "images" / "test", count=3)
    splits = [open_images(ImageData(str(tmp_path / "images"), split=split)) for split in ("train", "test")]
    assert [len(images) for images in splits] == [2, 3]
    assert all(images.files_left_out == [] for images in splits)


def test_a_stream_gives_the_same_from_any_position(tmp_path):
    folder = image_folder(tmp_path / "images")
    data = ImageData(str(folder), caption_column="text", limit=10)
    images = open_images(data)
    stream = open_images(ImageData(str(folder), caption_column="text", limit=10, streaming=True))
    for start in (0, 4):
        rows = list(stream.undecoded(start))
        assert len(rows) == 10 - start
        for offset, row in enumerate(rows):
            example, expected = stream.example(row, start + offset), images[start + offset]
            assert (example.name, example.caption) == (expected.name, expected.caption)
            assert torch.equal(example.pixels, expected.pixels)
    with pytest.raises(TypeError, match="no length"):
        len(stream)


def test_resolution_scales_the_shorter_side_and_crops_the_centre(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    picture, centre = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 20), "blue")
    picture.paste(centre, (10, 0))
    picture.save(folder / "a.png")
    example = open_images(ImageData(str(folder), resolution=8))[0]
    assert example.pixels.shape == (3, 8, 8)
    # The centre square is blue. The filter reaches two pixels, so only the outer columns have some of the red.
    expected = torch.tensor([0.0, 0.0, 1.0])[:, None, None].expand(3, 8, 8)
    assert torch.allclose(example.pixels[..., 1:-1], expected[..., 1:-1], atol=0.02)
    assert torch.allclose(example.pixels, expected, atol=0.1)


def test_datasets_saved_to_disk_have_images_in_their_table(tmp_path):
    array = numpy.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=numpy.uint8)
    table = datasets.Dataset.from_dict(
        {"picture": [Image.fromarray(image) for image in array], "class": [1, 0, -1]},
        features=datasets.Features({"picture": datasets.Image(), "class": datasets.ClassLabel(names=["cat", "dog"])}),
    )
    table.save_to_disk(tmp_path / "set")
    data = ImageData(str(tmp_path / "set"), image_column="picture", caption_column="class")
    images = open_images(data)
    assert [images[index].caption for index in range(3)] == ["dog", "cat", None]
    assert [images[index].name for index in range(3)] == ["0", "1", "2"]
    assert torch.equal(images[2].pixels, torch.from_numpy(array[2]).permute(2, 0, 1) / 255)
    assert open_images(data, text_captions=False)[0].caption == 1
    stream = open_images(ImageData(**{**vars(data), "streaming": True}))
    assert [stream.example(row, 0).caption for row in stream.undecoded()] == ["dog", "cat", None]


def test_images_that_cannot_be_read_are_named(tmp_path):
    folder = image_folder(tmp_path / "images", corrupt=(3,))
    images = open_images(ImageData(str(folder)))
    names = [images.name(index) for index in range(12)]
    with pytest.raises(UnreadableImageError, match=r"'train-3\.png'"):
        images[names.index("train-3.png")]
    assert images[names.index("train-4.png")].name == "train-4.png"


@pytest.mark.parametrize("kind", ["I;16", "F", "I"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_more_than_8_bits_raise_an_error_that_names_them(tmp_path, kind, channels):
    dtype = {"I;16": numpy.uint16, "F": numpy.float32, "I": numpy.int32}[kind]
    Image.fromarray(numpy.full((8, 8), 200, dtype)).save(tmp_path / "deep.tiff")
    with pytest.raises(UnreadableImageError, match=f"'deep.tiff' of .* has mode '{kind}' .* allowed: 8-bit modes"):
        open_images(ImageData(str(tmp_path)), channels)[0]


@pytest.mark.parametrize(
    "changes, words",
    {
        "nothing there": ({"path": "/nonexistent"}, "can't be opened"),
        "split": ({"split": "test", "name": "x"}, "can't be opened"),
        "no such column": ({"caption_column": "caption"}, "no columns {'caption_column': 'caption'}; it has: image"),
        "no images in it": ({"image_column": "text"}, "'text' of .* holds no images"),
        "resolution": ({"resolution": 0}, "`resolution` is 0; allowed: greater than or equal to 1"),
        "limit": ({"limit": -1}, "`limit` is -1; allowed: greater than or equal to 1"),
    }.values(),
)
def test_data_that_cannot_be_opened_raise_an_error(tmp_path, changes, words):
    folder = image_folder(tmp_path / "images")
    with pytest.raises(InputError, match=words):
        open_images(ImageData(**{"path": str(folder), **changes}))


def test_an_empty_dataset_saved_to_disk_raises_an_error(tmp_path):
    datasets.Dataset.from_dict({"image": []}).save_to_disk(tmp_path)
    with pytest.raises(InputError, match="can't be opened"):
        open_images(ImageData(str(tmp_path)))


def test_a_folder_that_is_no_cache_raises_an_error(tmp_path):
    with pytest.raises(InputError, match="no finished cache of latents"):
        CachedLatents(str(tmp_path))
