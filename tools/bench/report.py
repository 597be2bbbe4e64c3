"""Tables of results on the terminal, and lines of a figure."""

import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table

_WIDTH = 160  # of a table that does not go to a terminal
Points = Sequence[tuple[int, float | None]]
"""Samples/s by depth; None: the model does not fit."""


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


def plot_over_depth(lines: Mapping[str, tuple[Points, dict[str, Any]]], title: str, path: Path) -> None:
    """Draw points and their style by label: the paper's figure 6. Where a line stops, an x marks its last depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for label, (points, style) in lines.items():
        fits = [point for point in sorted(points, key=lambda point: point[0]) if point[1] is not None]
        if not fits:
            axes.plot([], [], label=f"{label}: fits at no depth")
            continue
        (line,) = axes.plot(*zip(*fits, strict=True), marker="o", label=label, **style)
        if len(fits) < len(points):
            axes.plot(*fits[-1], "x", markersize=14, markeredgewidth=2, color=line.get_color())
    axes.set(xlabel="DHEN layers", ylabel="samples/s", title=title)
    axes.set_xticks(sorted({depth for points, _ in lines.values() for depth, _ in points}))
    axes.set_ylim(bottom=0)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
