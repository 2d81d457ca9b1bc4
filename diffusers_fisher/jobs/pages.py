"""A report as one HTML file: text, tables, figures and pictures, with nothing beside it and nothing to fetch."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_path

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #888; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
figure { margin: 1rem 0; }
figcaption { color: #555; }
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; }
.pictures figure { margin: 0; max-width: 24rem; }
.pictures img { min-width: 128px; image-rendering: pixelated; }
"""


class Page:
    """An HTML page, built from top to bottom. All text is escaped."""

    def __init__(self, title: str):
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A heading of the second order."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """A table; numbers stand to the right, floating-point ones with four significant digits, None as a dash."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
        body = "\n".join(f"<tr>{''.join(_cell(value) for value in row)}</tr>" for row in rows)
        self._parts.append(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>")

    def figure(self, figure: Figure, caption: str) -> None:
        """A matplotlib figure."""
        written = io.BytesIO()
        figure.savefig(written, format="png", dpi=120)
        self._parts.append(_figure(written.getvalue(), caption))

    def pictures(self, pictures: Iterable[tuple[torch.Tensor | str | os.PathLike, str]]) -> None:
        """Pictures beside each other, each with its caption.

        Args:
            pictures: (picture, caption), a picture being a tensor (3, H, W) in [0, 1] or the path of a PNG file.
        """
        shown = "\n".join(_figure(_png(picture), caption) for picture, caption in pictures)
        self._parts.append(f'<div class="pictures">\n{shown}\n</div>')

    def text(self) -> str:
        """The page as it is written."""
        head = f'<meta charset="utf-8">\n<title>{html.escape(self.title)}</title>\n<style>{STYLE}</style>'
        body = "\n".join(self._parts)
        return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'

    def write(self, path: str | os.PathLike) -> None:
        """Writes the page, atomically."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")


def save_picture(image: torch.Tensor, path: str | os.PathLike) -> None:
    """Writes an image (3, H, W) in [0, 1] as PNG, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(_encoded(image))


def _cell(value: Any) -> str:
    if value is None:
        return "<td>-</td>"
    if isinstance(value, float):
        return f'<td class="number">{value:.4g}</td>'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'<td class="number">{value}</td>'
    return f"<td>{html.escape(str(value))}</td>"


def _figure(png: bytes, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    text = html.escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _png(picture: torch.Tensor | str | os.PathLike) -> bytes:
    return Path(picture).read_bytes() if isinstance(picture, (str, os.PathLike)) else _encoded(picture)


def _encoded(image: torch.Tensor) -> bytes:
    from PIL import Image

    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    written = io.BytesIO()
    Image.fromarray(array).save(written, format="png")
    return written.getvalue()
