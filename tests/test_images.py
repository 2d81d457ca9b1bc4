"""Pictures as files hold them: orientations, odd tags, damaged bytes, transparency, and sizes."""

import io
import struct
import warnings

import numpy
import pytest
import torch
from damaged_images import damaged_files, exif, whole_files
from PIL import Image, ImageOps

from diffusers_fisher import InputError
from diffusers_fisher.data import ImageData, UnreadableImageError, open_images
from diffusers_fisher.images import image_tensor

RANDOM = numpy.random.default_rng(0)


def picture(width=16, height=8, channels=3):
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, channels), dtype=numpy.uint8))


def write(folder, name, content):
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def from_folder(folder, **options):
    """Returns the first image of a folder as a batch of one."""
    return open_images(ImageData(str(folder), **options))[0].pixels[None]


def viewer_pixels(image, background="black"):
    """Returns the pixels that a viewer shows, (1, 3, H, W)."""
    canvas = Image.new("RGBA", image.size, background)
    canvas.alpha_composite(image.convert("RGBA"))
    return torch.from_numpy(numpy.asarray(canvas.convert("RGB")).copy()).permute(2, 0, 1)[None] / 255


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_files_and_opened_images_are_turned_alike(tmp_path, kind, orientation):
    picture().save(tmp_path / "a.png", kind, exif=exif(orientation))
    before = (tmp_path / "a.png").read_bytes()
    with Image.open(tmp_path / "a.png") as image:
        expected = viewer_pixels(ImageOps.exif_transpose(image))
    assert torch.equal(from_folder(tmp_path), expected)
    with Image.open(tmp_path / "a.png") as image:
        assert torch.equal(image_tensor(image, 1), expected)
        assert torch.equal(image_tensor(image, 1), expected)  # the first call has not changed the user's image
    assert (tmp_path / "a.png").read_bytes() == before


def odd_tags(*entries, orientation=6):
    """Returns EXIF data in TIFF's form, with the orientation and entries (tag, type, count, four bytes)."""
    rows = [struct.pack("<HHIHH", 274, 3, 1, orientation, 0)]
    rows += [struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries]
    head = struct.pack("<2sHIH", b"II", 42, 8, len(rows))
    return head + b"".join(rows) + bytes(4) + struct.pack("<iiII", -1, 0, 2**32 - 1, 0)


AFTER = 10 + 2 * 12 + 4  # place of the rationals behind the two entries
ODD_TAGS = {
    "rational below zero": odd_tags((282, 10, 1, struct.pack("<I", AFTER))),
    "signed value of an unsigned tag": odd_tags((282, 5, 1, struct.pack("<I", AFTER))),
    "rational of zero": odd_tags((282, 5, 1, struct.pack("<I", AFTER + 8))),
    "date as a number": odd_tags((306, 4, 1, struct.pack("<I", 2020))),
    "date as a signed number": odd_tags((306, 9, 1, struct.pack("<i", -5))),
    "place outside": odd_tags((282, 5, 1, struct.pack("<I", 10**6))),
    "folder of tags outside": odd_tags((34665, 4, 1, struct.pack("<I", 10**6))),
    "text as a float": odd_tags((270, 11, 1, struct.pack("<f", float("nan")))),
    "unknown type": odd_tags((270, 99, 1, bytes(4))),
    "negative width": odd_tags((256, 9, 1, struct.pack("<i", -3))),
}


@pytest.mark.parametrize("tags", ODD_TAGS.values(), ids=ODD_TAGS)
def test_odd_tags_cost_neither_the_picture_nor_its_orientation(tmp_path, tags):
    image, file = picture(), io.BytesIO()
    image.save(file, "JPEG")
    data = b"Exif\0\0" + tags
    content = file.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + file.getvalue()[2:]
    path = write(tmp_path / "photos", "a.jpg", content)
    with Image.open(file) as original:
        expected = viewer_pixels(original.transpose(Image.Transpose.ROTATE_270))
    assert torch.equal(from_folder(path.parent), expected)
    with warnings.catch_warnings(action="ignore"), Image.open(path) as tagged_image:  # Pillow warns of damaged tags
        assert torch.equal(image_tensor(tagged_image, 1), expected)


def test_a_tiff_whose_tags_can_not_be_rewritten_is_read(tmp_path):
    file = io.BytesIO()
    picture().save(file, "TIFF", exif=exif(6))
    content = bytearray(file.getvalue())
    place = content.index(struct.pack("<HH", 282, 5))
    content[place + 2 : place + 4] = struct.pack("<H", 10)  # a signed rational
    (value,) = struct.unpack("<I", content[place + 8 : place + 12])
    content[value : value + 8] = struct.pack("<ii", -1, 0)
    path = write(tmp_path / "photos", "a.tif", bytes(content))
    assert from_folder(path.parent).shape == (1, 3, 16, 8)


@pytest.mark.parametrize("exif_data", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nothing at all"])
def test_without_a_readable_orientation_the_picture_stays(tmp_path, exif_data):
    file = io.BytesIO()
    picture().save(file, "JPEG", exif=exif_data)
    write(tmp_path / "photos", "a.jpg", file.getvalue())
    assert from_folder(tmp_path / "photos").shape == (1, 3, 8, 16)


def check_damaged(folder, count, seed):
    """Checks that every file gives pixels, the same as Pillow's, or an error that names it; counts the former."""
    folder.mkdir()
    for number, (_, content) in enumerate(damaged_files(count, seed)):
        write(folder, f"{number:04d}.png", content)
    images, num_readable = (
        open_images(ImageData(str(folder), max_pixels=2**28)),
        0,
    )  # opened images have no limit but Pillow's
    assert len(images) == count
    for position in range(count):
        name, pixels = images.name(position), None
        try:
            pixels = images[position].pixels
        except UnreadableImageError as error:
            assert f"Image '{name}' of '{folder}' can't be read: " in str(error)
        else:
            assert pixels.ndim == 3 and pixels.numel() and bool(((pixels >= 0) & (pixels <= 1)).all())
            num_readable += 1
        with warnings.catch_warnings(action="ignore"):
            try:
                pillow_image = Image.open(io.BytesIO((folder / name).read_bytes()))
            except Exception:  # the error of Pillow reaches its user, not this package
                assert pixels is None
                continue
            try:
                assert torch.equal(image_tensor(pillow_image, 1)[0], pixels if pixels is not None else torch.empty(0))
            except InputError:
                assert pixels is None
    return num_readable


def test_damaged_files_give_pixels_or_errors_that_name_them(tmp_path):
    assert len(whole_files()) >= 20
    assert 30 < check_damaged(tmp_path / "files", 120, seed=0) < 90


@pytest.mark.slow
def test_3000_damaged_files_give_pixels_or_errors_that_name_them(tmp_path):
    assert 750 < check_damaged(tmp_path / "files", 3000, seed=1) < 2250


def test_an_opened_image_that_can_not_be_read_is_refused():
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    truncated_image = Image.open(io.BytesIO(file.getvalue()[:-2000]))
    with pytest.raises(InputError, match=r"Image 1 of the call can't be read: OSError: .*truncated.* Leave it out"):
        image_tensor([picture(64, 64), truncated_image], 1)


def cutout(mode):
    """Returns a picture of random colours whose left half is transparent."""
    image = picture(16, 16, 4)
    alpha = numpy.repeat([[0, 255]], 16, 0).repeat(8, 1) if mode != "half" else numpy.full((16, 16), 128)
    image = image.convert("PA") if mode == "PA" else image  # before, because old versions of Pillow drop alpha here
    image.putalpha(Image.fromarray(alpha.astype(numpy.uint8)))
    return image.convert(mode) if mode == "LA" else image


@pytest.mark.parametrize("mode", ["RGBA", "half", "LA", "PA"])
def test_transparent_pixels_are_composed_on_black_and_said(mode):
    image = cutout(mode)
    with pytest.warns(UserWarning, match="1 of 2 images have transparent pixels, which were composed on black"):
        pixels = image_tensor([image, picture(16, 16)], 1)
    assert torch.equal(pixels[:1], viewer_pixels(image))
    if mode == "RGBA":
        assert float(pixels[0, :, :, :8].max()) == 0


@pytest.mark.parametrize(
    ("kind", "mode"), [("PNG", "RGBA"), ("PNG", "P"), ("GIF", "P"), ("PNG", "RGB"), ("WEBP", "RGBA")]
)
def test_transparency_of_files(tmp_path, caplog, kind, mode):
    image = picture(16, 16, 4 if mode == "RGBA" else 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    if mode == "RGBA":
        image.putalpha(cutout("RGBA").getchannel("A"))
    elif mode == "P":
        image, options = image.quantize(8), {"transparency": 3}
    else:
        options = {"transparency": image.getpixel((0, 0))}
    image.save(tmp_path / "a.png", kind, **options)
    images = open_images(ImageData(str(tmp_path)))
    example, _ = images[0], images[0]
    assert caplog.text.count("'a.png' has transparent pixels, which are composed on black") == 1
    with Image.open(tmp_path / "a.png") as file_image:
        assert example.transparent and torch.equal(example.pixels[None], viewer_pixels(file_image))


def test_opaque_images_are_not_called_transparent(tmp_path):
    image = picture(16, 16)
    image.putalpha(255)
    image.save(tmp_path / "a.png")
    example = open_images(ImageData(str(tmp_path)))[0]
    assert not example.transparent
    assert torch.equal(example.pixels[None], image_tensor(image, 1))  # a warning would be an error here


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            r"'a\.png' of .* can't be read: it has 4096x1025 pixels; allowed: 1 to 4194304 pixels\. Set `resolution`",
        ),
        ({"max_pixels": 99}, "4096x1025 pixels; allowed: 1 to 99 pixels"),
        ({"max_pixels": 99, "resolution": 8}, "4096x1025 pixels; allowed: 1 to 99 pixels"),
    ],
)
def test_an_image_with_more_pixels_than_the_limit_is_refused(tmp_path, options, words):
    Image.new("L", (4096, 1025)).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match=words):
        from_folder(tmp_path, **options)
    for allowed in ({"max_pixels": 4096 * 1025}, {"resolution": 8}):
        assert from_folder(tmp_path, **allowed).shape[2] in (8, 1025)


def test_the_limit_is_read_from_the_header(tmp_path):
    """The file states its pixels and has none: an attempt to read them would say that they are missing."""
    header = b"P6\n13000 13000\n255\n"
    write(tmp_path, "a.ppm", header)
    with pytest.raises(UnreadableImageError, match="it has 13000x13000 pixels; allowed: 1 to 4194304"):
        from_folder(tmp_path)
    write(tmp_path, "a.ppm", b"P6\n40000 40000\n255\n")
    with pytest.raises(UnreadableImageError, match="exceeds limit of 178956970 pixels"):
        from_folder(tmp_path, resolution=8)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(InputError, match=r"Images are of shape \(1, 3, 0, 8\); allowed: at least one pixel"):
        image_tensor(torch.rand(3, 0, 8), 1)


def test_complex_images_are_refused():
    with pytest.raises(InputError, match=r"Images have dtype torch.complex64; allowed: real numbers"):
        image_tensor(torch.zeros(1, 3, 8, 8, dtype=torch.complex64), 8)
