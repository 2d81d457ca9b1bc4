"""Writes a report as one HTML file with its text, tables, figures and pictures inside, so that it needs no other."""

import base64
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from ..files import atomic_path, write_text

Cell = str | float | None


class Page:
    """An HTML page, built from top to bottom. All text is escaped."""

    def __init__(self, title: str):
        self.title = title
        self._parts: list[dict[str, object]] = []  # as templates/page.html takes them, each with its "kind"

    def heading(self, text: str) -> None:
        """Adds a heading of the second order."""
        self._parts.append({"kind": "heading", "text": text})

    def paragraph(self, text: str) -> None:
        """Adds a paragraph of plain text."""
        self._parts.append({"kind": "paragraph", "text": text})

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Adds a table. Numbers stand to the right, fractions with four significant digits; None is a dash."""
        self._parts.append({"kind": "table", "columns": columns, "rows": list(rows)})

    def figure(self, figure: Figure, caption: str) -> None:
        """Adds a matplotlib figure."""
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=120)
        self._parts.append({"kind": "figure", "png": _base64(png.getvalue()), "caption": caption})

    def pictures(self, pictures: Iterable[tuple[torch.Tensor | str | os.PathLike, str]]) -> None:
        """Adds pictures beside each other, each with its caption.

        Args:
            pictures: pairs (picture, caption); a picture is a tensor (3, H, W) in [0, 1] or the path of a PNG file.
        """
        parts = [(_base64(_read_png(picture)), caption) for picture, caption in pictures]
        self._parts.append({"kind": "pictures", "pictures": parts})

    def text(self) -> str:
        """Returns the page as HTML."""
        environment = Environment(
            loader=PackageLoader(__package__), autoescape=True, undefined=StrictUndefined,
            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        )  # fmt: skip
        return environment.get_template("page.html").render(title=self.title, parts=self._parts)

    def write(self, path: str | os.PathLike) -> None:
        """Writes the page, atomically."""
        write_text(path, self.text())


def save_picture(image: torch.Tensor, path: str | os.PathLike) -> None:
    """Writes an image (3, H, W) in [0, 1] as PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(encode_png(image))


def _base64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def _read_png(picture: torch.Tensor | str | os.PathLike) -> bytes:
    return Path(picture).read_bytes() if isinstance(picture, (str, os.PathLike)) else encode_png(picture)


def encode_png(image: torch.Tensor) -> bytes:
    """Returns an image (3, H, W) in [0, 1] as the bytes of a PNG file."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    png = io.BytesIO()
    Image.fromarray(array).save(png, format="png")
    return png.getvalue()
