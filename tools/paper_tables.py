"""An experiment in the paper's layout: NE differences over training, beside the paper's, as a table, CSV and a plot; or
a scaling curve.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from tools.experiments import Entry, Experiment, Outcome, Result
from tools.markdown import head, row
from tools.over_seeds import Statistic, over_seeds, signed

_POINTS = ("a third", "two thirds", "the end")


def ne_differences(own: Mapping[int, Result], base: Mapping[int, Result]) -> dict[int, list[float]]:
    """NE difference in percent of the base's NE, by samples seen: one value per seed that both have.

    Of the evaluations on the validation split that both runs of a seed made after the same number of samples.
    """
    found: dict[int, list[float]] = {}
    for seed in sorted(own.keys() & base.keys()):
        base_ne = {samples: ne for samples, ne, _ in base[seed].evaluations}
        for samples, ne, _ in own[seed].evaluations:
            if ne is not None and base_ne.get(samples):
                found.setdefault(int(samples), []).append(100 * (ne / base_ne[samples] - 1))
    return dict(sorted(found.items()))


def at_points(differences: Mapping[int, Sequence[float]]) -> list[Statistic | None]:
    """The differences after a third, two thirds and all of training: at the evaluations nearest to these points."""
    if not differences:
        return [None] * len(_POINTS)
    end = max(differences)
    nearest = [min(differences, key=lambda samples: abs(samples - end * k / 3)) for k in (1, 2, 3)]
    return [over_seeds(differences[samples]) for samples in nearest]


def table(experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    """The lines of the table. The paper's columns are the points of training that it reports."""
    runs, first = outcome.by_entry, experiment.entries[0]
    paper = [f"paper, {point}" for point in experiment.paper_points]
    yield f"NE difference to {first.title} in percent, on the validation split, after a part of training:\n"
    yield from head(["model", "seeds", *_POINTS, *paper, "MFLOPs per sample", "test NE", "CPU minutes"])
    for entry in experiment.entries:
        own = runs[entry.name]
        differences = [signed(point, 3) for point in at_points(ne_differences(own, runs[first.name]))]
        differences = ["baseline", "", ""] if entry is first else differences
        quoted = [f"{figure:+g}" for figure in entry.paper] or ["baseline" if entry is first else ""] * len(paper)
        yield row([entry.title, experiment.progress(entry, len(own)), *differences, *quoted, *_costs(own)])


def scaling(experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    """The lines of a scaling curve: the sizes of each family, and the slope of those with two sizes or more."""
    yield from head(["model", "seeds", "MFLOPs per sample", "test NE", "CPU minutes"])
    for entry in experiment.entries:
        own = outcome.by_entry[entry.name]
        yield row([entry.title, experiment.progress(entry, len(own)), *_costs(own)])
    slopes = {family: slope(outcome, entries) for family, entries in families(experiment).items()}
    if any(slopes.values()):
        yield "\nChange of the test NE in percent per decade of training FLOPs, ± its standard error:\n"
        yield from head(["family", "runs", "slope"])
    for family, found in slopes.items():
        if found:
            value, error, num_runs = found
            yield row([family, str(num_runs), f"{value:+.3f} ± {error:.3f}"])


def on_nodes(experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    """The lines of an experiment on nodes: each entry against the first, paired by seed."""
    runs, first = outcome.by_entry, experiment.entries[0]
    columns = ("speed", "bytes between nodes", "bytes of the tables", "NE difference in percent")
    yield f"Ratios to {first.title}, paired by seed, on {experiment.nodes} nodes of two ranks:\n"
    yield from head(["set-up", "seeds", *columns])
    for entry in experiment.entries:
        pairs = [(run, runs[first.name][seed]) for seed, run in runs[entry.name].items() if seed in runs[first.name]]
        if not pairs:
            yield row([entry.title, experiment.progress(entry, 0), *[""] * len(columns)])
            continue
        ratios = [
            statistics.fmean(
                base.measured["seconds_per_step"] / run.measured["seconds_per_step"] for run, base in pairs
            ),
            statistics.fmean(run.measured["bytes_per_step"] / base.measured["bytes_per_step"] for run, base in pairs),
            statistics.fmean(run.measured["table_bytes"] / base.measured["table_bytes"] for run, base in pairs),
        ]
        ne = over_seeds([100 * (run.metric("ne") / base.metric("ne") - 1) for run, base in pairs])
        shown = "" if entry is first else signed(ne, 3)
        yield row([entry.title, experiment.progress(entry, len(pairs)), *(f"{ratio:.2f}" for ratio in ratios), shown])


def _costs(runs: Mapping[int, Result]) -> Iterator[str]:
    for digits, values in (
        (3, [run.training_flops_per_sample and run.training_flops_per_sample / 1e6 for run in runs.values()]),
        (5, [run.metric("ne") for run in runs.values()]),
        (1, [run.cpu_seconds / 60 for run in runs.values()]),
    ):
        found = over_seeds(values)
        yield f"{found.mean:.{digits}f}" if found else ""


def families(experiment: Experiment) -> dict[str, list[Entry]]:
    """The entries of each family, for a scaling curve."""
    found: dict[str, list[Entry]] = {}
    for entry in experiment.entries:
        if entry.family:
            found.setdefault(entry.family, []).append(entry)
    return found


def slope(outcome: Outcome, entries: Sequence[Entry]) -> tuple[float, float, int] | None:
    """Slope of 100 ln(NE) over log10(FLOPs per sample), its standard error, and the number of runs.

    None for fewer than three runs or two sizes.
    """
    runs = [run for entry in entries for run in outcome.by_entry[entry.name].values()]
    points = [(run.training_flops_per_sample, run.metric("ne")) for run in runs]
    points = [(math.log10(flops), 100 * math.log(ne)) for flops, ne in points if flops and ne]
    if len(points) < 3 or len({x for x, _ in points}) < 2:
        return None
    (fitted, _), covariance = np.polyfit(*zip(*points, strict=True), deg=1, cov=True)
    return float(fitted), float(covariance[0, 0] ** 0.5), len(points)


def as_csv(experiment: Experiment, outcome: Outcome) -> str:
    """All evaluations: entry, seed, samples seen, NE on the validation split."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["entry", "seed", "samples_seen", "validation_ne"])
    for entry in experiment.entries:
        for seed, run in sorted(outcome.by_entry[entry.name].items()):
            writer.writerows([entry.name, seed, int(samples), ne] for samples, ne, _ in run.evaluations)
    return text.getvalue()


def draw(experiment: Experiment, outcome: Outcome, path: Path) -> None:
    """Draw a scaling curve, or the NE differences over training."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    (_draw_scaling if families(experiment) else _draw_differences)(experiment, outcome, axis)
    axis.set_title(experiment.title)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _draw_scaling(experiment: Experiment, outcome: Outcome, axis: Axes) -> None:
    """Test NE over training FLOPs: the mean of each size, a line per family, and a dot per run."""
    for family, entries in families(experiment).items():
        runs = [list(outcome.by_entry[entry.name].values()) for entry in entries]
        sizes = [(of[0].training_flops_per_sample, [run.metric("ne") for run in of]) for of in runs if of]
        means = [(flops, found.mean) for flops, values in sizes if flops and (found := over_seeds(values))]
        if means:
            (line,) = axis.plot(*zip(*sorted(means), strict=True), label=family)
            dots = [(flops, ne) for flops, values in sizes for ne in values if flops and ne]
            axis.plot(*zip(*dots, strict=True), linestyle="", marker="o", markersize=4, color=line.get_color())
    axis.set(xlabel="training FLOPs per sample", ylabel="test NE", xscale="log")


def _draw_differences(experiment: Experiment, outcome: Outcome, axis: Axes) -> None:
    """NE differences over the samples seen: mean, and a band of one standard deviation."""
    first, *others = experiment.entries
    axis.axhline(0, color="gray", linewidth=1, label=first.title)
    for entry in others:
        differences = ne_differences(outcome.by_entry[entry.name], outcome.by_entry[first.name])
        if differences:
            found = [over_seeds(values) for values in differences.values()]
            means, spreads = [each.mean for each in found], [each.spread or 0 for each in found]
            (line,) = axis.plot(list(differences), means, label=entry.title, marker="o", markersize=3)
            low, high = np.subtract(means, spreads), np.add(means, spreads)
            axis.fill_between(list(differences), low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    axis.set(xlabel="samples seen", ylabel="NE difference in percent")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
