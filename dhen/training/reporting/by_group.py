"""The metrics of the groups of examples as a table, a CSV file and a plot."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
from matplotlib.figure import Figure

from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.encoding.vocabulary import vocabulary_path
from dhen.data.schema import MISSING_ID, SparseColumn
from dhen.training.evaluation.group_metrics import GroupedValues
from dhen.training.reporting.run_folder import print_metrics

_ROWS, _BARS = 10, 40


def summary_of_groups(by_group: Mapping[str, GroupedValues]) -> dict[str, dict[str, float]]:
    """The grouped AUC and the numbers of groups by feature, without the groups themselves."""
    names = [item.name for item in fields(GroupedValues) if item.name not in ("largest", "openness")]
    return {name: {key: getattr(values, key) for key in names} for name, values in by_group.items()}


def report_groups(name: str, values: GroupedValues, loader: BatchLoader, output: Path | None) -> None:
    """Print gAUC and the largest groups. output: the file of the metrics, beside which a CSV file and a plot go."""
    (column,) = (column for column in loader.schema.sparse if column.name == name)
    names = _names(column, list(values.largest), loader.folder)
    by_group = {names[group]: asdict(of_group) for group, of_group in values.largest.items()}
    openness = {names[group]: of_group for group, of_group in values.openness.items()}
    print(f"\n{loader.split} by {name}: gAUC {values.gauc:.5f} over {values.groups - values.one_class:,} groups")
    print(f"left out: {values.one_class:,} groups with one label ({values.left_out:,} examples)")
    print_metrics({group: by_group[group] for group in list(by_group)[:_ROWS]}, of="group")
    if output is not None:
        path = output.with_name(f"{output.stem}-by-{name}.csv")
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            gates = range(len(next(iter(openness.values()), [])))
            writer.writerow(["group", *next(iter(by_group.values())), *(f"gate_{place}" for place in gates)])
            writer.writerows(
                [group, *of_group.values(), *openness.get(group, [])] for group, of_group in by_group.items()
            )
        _draw(name, by_group, path.with_suffix(".png"))
        print(f"written to {path} and {path.with_suffix('.png')}")
        if openness:
            _draw_gates(name, openness, path.with_name(f"{path.stem}-gates.png"))


def _names(column: SparseColumn, ids: list[int], folder: Path) -> dict[int, str]:
    """What the ids stand for: the keys of a vocabulary, or numbers of bins or of hashed rows."""
    names = {group: f"{'bin' if column.encoding == 'bins' else 'row'} {group}" for group in ids}
    if column.encoding == "vocabulary":
        table = pyarrow.parquet.read_table(vocabulary_path(folder, column.table_name), columns=["id", "key"])
        table = table.filter(pc.is_in(table["id"], pa.array(ids)))
        names |= dict(zip(table["id"].to_pylist(), table["key"].to_pylist(), strict=True))
    return names | {MISSING_ID: "(blank or unknown)" if column.encoding == "vocabulary" else "(blank)"}


def _draw_gates(name: str, openness: Mapping[str, Sequence[float]], path: Path) -> None:
    """The mean openness of each layer's gate (columns) in the largest groups (rows)."""
    rows = list(openness.items())[:_BARS]
    figure = Figure(figsize=(3 + 0.8 * len(rows[0][1]), 1.5 + 0.25 * len(rows)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow([values for _, values in rows], vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axis.set_yticks(range(len(rows)), [group for group, _ in rows])
    axis.set_xticks(range(len(rows[0][1])))
    axis.set_xlabel("gate, from the input up")
    axis.set_title(f"openness by {name}", loc="left", fontsize=11)
    figure.colorbar(image)
    figure.savefig(path, dpi=130)


def _draw(name: str, by_group: dict[str, dict[str, float]], path: Path) -> None:
    """NE and calibration of the largest groups, one bar each; a line at 1."""
    bars = list(by_group.items())[:_BARS]
    figure = Figure(figsize=(10, 1.5 + 0.25 * len(bars)), layout="constrained")
    for axis, metric in zip(figure.subplots(1, 2, sharey=True), ("ne", "calibration"), strict=True):
        known = [0.0 if math.isnan(of_group[metric]) else of_group[metric] for _, of_group in bars]
        axis.barh([f"{group} ({of_group['examples']:,})" for group, of_group in bars], known, color="#c4502f")
        axis.axvline(1.0, color="#3a7d44", linestyle="--", linewidth=1)
        axis.set_title(f"{metric} by {name} (examples)", loc="left", fontsize=11)
    axis.invert_yaxis()
    figure.savefig(path, dpi=130)
