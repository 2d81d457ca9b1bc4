"""Image files of many formats with odd tags and changed bytes."""

import functools
import io
import random
import warnings
from collections.abc import Iterator

import numpy
from PIL import ExifTags, Image

FORMATS = {
    name: (name.partition(" ")[0], mode, options)
    for name, mode, options in [
        ("AVIF", "RGB", {}), ("BLP", "P", {}), ("BMP", "RGB", {}), ("DDS", "RGBA", {}), ("DIB", "RGB", {}),
        ("GIF", "P", {}), ("ICNS", "RGBA", {}), ("ICO", "RGBA", {}), ("IM", "RGB", {}), ("JPEG", "RGB", {}),
        ("JPEG2000", "RGB", {}), ("MPO", "RGB", {}), ("MSP", "1", {}), ("PCX", "RGB", {}), ("PNG", "RGBA", {}),
        ("PPM", "RGB", {}), ("QOI", "RGB", {}), ("SGI", "RGB", {}), ("SPIDER", "F", {}), ("TGA", "RGB", {}),
        ("TIFF", "RGB", {}), ("TIFF lzw", "RGB", {"compression": "tiff_lzw"}), ("WEBP", "RGB", {}), ("XBM", "1", {}),
    ]
}  # fmt: skip
"""Format, mode and options of saving, by name."""


def exif(orientation: int = 6) -> Image.Exif:
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    tags[ExifTags.Base.DateTime] = "2020:01:01 00:00:00"
    tags[ExifTags.Base.XResolution] = 72.0
    return tags


@functools.cache
def whole_files(side: int = 16) -> dict[str, bytes]:
    """Returns one file of each format that this Pillow can write."""
    pixels = numpy.random.default_rng(0).integers(0, 256, (side, side + 8, 4), dtype=numpy.uint8)
    files = {}
    for name, (kind, mode, options) in FORMATS.items():
        picture = Image.fromarray(pixels, "RGBA") if mode == "RGBA" else Image.fromarray(pixels[..., :3]).convert(mode)
        if kind in ("JPEG", "TIFF", "PNG", "WEBP", "MPO", "AVIF"):
            options = {**options, "exif": exif()}
        file = io.BytesIO()
        try:
            with warnings.catch_warnings(action="ignore"):  # a later Pillow will lack some formats
                picture.save(file, kind, **options)
        except (KeyError, OSError, ValueError):  # this Pillow has no such encoder
            continue
        files[name] = file.getvalue()
    return files


def damaged_files(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yields `count` files with changed, missing or added bytes, most of them near the beginning, where tags are."""
    draw, files = random.Random(seed), whole_files()
    names = sorted(files)
    for number in range(count):
        name = names[number % len(names)]
        content = bytearray(files[name])
        for _ in range(draw.choice([1, 1, 2, 4, 16])):
            place = int(len(content) * draw.random() ** draw.choice([1, 3, 6]))
            content[min(place, len(content) - 1)] = draw.choice([0, 255, 128, draw.randrange(256)])
        if draw.random() < 0.15:
            del content[draw.randrange(1, len(content)) :]
        elif draw.random() < 0.1:
            content[place:place] = draw.randbytes(draw.randrange(1, 9))
        yield name, bytes(content)
