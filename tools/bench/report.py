"""Tables of results on the terminal, and lines of a figure."""

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

_WIDTH = 160  # of a table that does not go to a terminal


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] = (), file: TextIO | None = None
) -> None:
    """Print rows under the names of their columns. left: the columns of text, aligned to the left. file: not stdout."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if (file or sys.stdout).isatty() else _WIDTH, file=file).print(table, soft_wrap=True)


def draw_over_depth(axes: Any, points: Sequence[tuple[int, float | None]], label: str, **style: Any) -> None:
    """Draw samples/s over depth in matplotlib's `axes`. None: it does not fit; an x marks the depth before."""
    fits = [point for point in points if point[1] is not None]
    if not fits:
        axes.plot([], [], label=f"{label}: fits at no depth")
        return
    (line,) = axes.plot(*zip(*fits, strict=True), marker="o", label=label, **style)
    if len(fits) < len(points):
        axes.plot(*fits[-1], "x", markersize=14, markeredgewidth=2, color=line.get_color())
