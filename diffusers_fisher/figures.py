"""Makes matplotlib figures without pyplot, whose backend is the caller's choice, and writes users' words on them."""

import functools
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .errors import InputError

BAND = 2.0  # half the width of a band, in standard errors
ORDERS_LETTERS = "__libraqm_version__" in vars(ft2font)
"""Whether matplotlib puts letters of scripts that run from right to left into their order; releases before 3.11
don't."""


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `width` x `height` inches, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def draw_curve(axes: Axes, x: torch.Tensor, y: torch.Tensor, error: torch.Tensor) -> Line2D:
    """Draws y (levels,) with the band of its standard errors, where they are finite; returns the line."""
    (curve,) = axes.plot(x.numpy(), y.numpy(), marker=".")
    width = torch.where(torch.isfinite(error), BAND * error, 0)
    if bool((width > 0).any()):
        low, high = (y - width).numpy(), (y + width).numpy()
        axes.fill_between(x.numpy(), low, high, color=curve.get_color(), alpha=0.25, linewidth=0)
    return curve


def finish_curves(axes: Axes, label: str, curves: Sequence[Line2D], names: Sequence[str]) -> None:
    """Labels the axes of curves by noise level, and makes the legend."""
    axes.set(xscale="log", xlabel=r"noise to signal, $\sigma/\alpha$", ylabel=label)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e4 * low else (1,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    legend = axes.legend(curves, map(str, range(len(curves))))
    for text, name in zip(legend.get_texts(), names, strict=True):
        write_plain(text, name)


def check_index(index: int, counts: Mapping[str, int], function: str) -> None:
    """Raises `InputError` unless there are outputs of `function`, and all have an image of this index."""
    if not counts:
        raise InputError(f"There are no outputs; give at least one name with an output of `{function}`.")
    for name, count in counts.items():
        if not 0 <= index < count:
            raise InputError(f"`index` is {index}; '{name}' has the images 0 to {count - 1}.")


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
