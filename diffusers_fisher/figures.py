"""Makes matplotlib figures without pyplot, whose backend is the caller's choice."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def make_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """Returns a figure of `width` x `height` inches, and its axes row by row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
