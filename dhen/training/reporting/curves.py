"""curves.png: loss, NE, AUC and learning rate over the samples seen."""

import csv
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

CURVES_FILE = "curves.png"
_PANELS = (("loss", "log loss"), ("ne", "normalized entropy"), ("auc", "AUC"), ("learning_rate", "learning rate"))
_COLORS = {"train": "#8aa1b4", "validation": "#c4502f"}


def draw_curves(metrics: Path, best_possible_ne: float | None = None) -> Path:
    """Draw curves.png beside a run's metrics.csv, and return its path.

    best_possible_ne: if known, drawn as a line in the NE panel.
    """
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for axis, (column, title) in zip(axes.flat, _PANELS, strict=True):
        _draw(axis, rows, column)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("samples seen")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if best_possible_ne is not None:
        axes.flat[1].axhline(best_possible_ne, color="#3a7d44", linestyle="--", linewidth=1, label="best possible")
    for axis in axes.flat:
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(frameon=False)
    path = metrics.with_name(CURVES_FILE)
    figure.savefig(path, dpi=130)
    return path


def _draw(axis: Axes, rows: list[dict[str, str]], column: str) -> None:
    tasks = dict.fromkeys(row["split"] for row in rows if row["split"] not in _COLORS)
    colors = _COLORS | {split: f"C{number}" for number, split in enumerate(tasks, 1)}
    for split, color in colors.items():
        points = [
            (int(row["samples_seen"]), float(row[column])) for row in rows if row["split"] == split and row[column]
        ]
        if points:
            style = {"marker": "o", "markersize": 4} if split != "train" else {}
            axis.plot(*zip(*points, strict=True), color=color, label=split, linewidth=1.5, **style)
