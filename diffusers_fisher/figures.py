"""Makes matplotlib figures without pyplot, whose backend is the caller's choice, and writes users' words on them."""

import functools
import unicodedata
from pathlib import Path

import matplotlib
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

ORDERS_LETTERS = "__libraqm_version__" in vars(ft2font)
"""Whether matplotlib puts letters of scripts that run from right to left into their order; releases before 3.11
don't."""


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `width` x `height` inches, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def write_plain(text: Text, words: str, otherwise: str | None = None) -> None:
    """Writes a user's words into a text of a figure, letter by letter: a dollar sign begins no formula.

    Letters that the text's own fonts lack are drawn with other fonts of the system.

    Args:
        otherwise: what is written instead if a letter can't be drawn; None: such letters become escapes ("\\u65e5").
    """
    families = list(text.get_fontfamily())
    letters = [" " if letter.isspace() else letter for letter in words]
    drawable = [_find_family(letter, families) for letter in letters]
    if otherwise is not None and not all(drawable):
        letters, drawable = list(otherwise), [True] * len(otherwise)
    pairs = zip(letters, drawable, strict=True)
    content = "".join(letter if is_drawable else ascii(letter)[1:-1] for letter, is_drawable in pairs)
    text.set(text=content, parse_math=False, fontfamily=families)


def _find_family(letter: str, families: list[str]) -> bool:
    """Returns whether a font has the letter. A font of another family is added to `families`."""
    runs_to_the_left = unicodedata.bidirectional(letter) in ("R", "AL", "AN")
    if not letter.isprintable() or (runs_to_the_left and not ORDERS_LETTERS):
        return False
    for family in families:
        if letter in _letters_of(font_manager.findfont(font_manager.FontProperties(family=[family]))):
            return True
    for name, file in _system_fonts().items():
        if letter in _letters_of(file):
            families.append(name)
            return True
    return False


def _system_fonts() -> dict[str, str]:
    """Returns one file per family of the system. Matplotlib's own further fonts have symbols under letters' codes, or
    boxes for all letters."""
    folder = Path(matplotlib.get_data_path())
    names = {entry.name for entry in font_manager.fontManager.ttflist if not Path(entry.fname).is_relative_to(folder)}
    names = {name for name in names if "LastResort" not in name.replace(" ", "")}  # boxes again
    return {name: font_manager.findfont(font_manager.FontProperties(family=[name])) for name in sorted(names)}


@functools.cache
def _letters_of(file: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, ft2font.FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # a font that FreeType can't read
        return frozenset()
