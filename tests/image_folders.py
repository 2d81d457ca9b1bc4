"""Small folders of images, and tiny pipelines saved to disk, for what reads data."""

import json
from pathlib import Path

import numpy
import tiny
from PIL import Image

CAPTIONS = ["a b", "c", "d e", "f"]


def image_folder(
    folder: Path, count: int = 12, size: tuple[int, int] = (16, 16), corrupt: tuple[int, ...] = ()
) -> Path:
    """Writes `count` random images, train-0.png and so on, with captions; files of `corrupt` are truncated."""
    folder.mkdir(parents=True, exist_ok=True)
    random = numpy.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8)
        path = folder / f"train-{number}.png"
        Image.fromarray(pixels).save(path)
        if number in corrupt:
            path.write_bytes(path.read_bytes()[:100])
        caption = CAPTIONS[number % len(CAPTIONS)]
        lines.append(json.dumps({"file_name": path.name, "text": caption, "label": number % 3}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def saved_pipeline(folder: Path, make=tiny.stable_diffusion) -> str:
    make().save_pretrained(folder)
    return str(folder)
