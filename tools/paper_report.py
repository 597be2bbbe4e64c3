"""The report of the experiments' results, recipes/RESULTS.md, and the statistics over seeds in it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tools import paper_tables
from tools.experiments import Experiment, Outcome, Result, read_experiment, read_results, sort_results
from tools.markdown import head, row
from tools.over_seeds import Statistic, difference, over_seeds, signed

_COLUMNS = {
    "auc": "AUC", "ne": "NE", "logloss": "log loss", "calibration": "calibration", "ne_over_best": "NE / best possible"
}  # fmt: skip
_DIGITS = {"calibration": 3, "ne_over_best": 4}
_HEAD = """\
# Results

Written by `python tools/paper.py report` from `recipes/experiments` and `recipes/results`. Do not edit it by hand.

- **How results are chosen.** Arguments, and the step whose weights are tested, are chosen on the validation split. The
  test split is read once per entry and seed, after training, and nothing is chosen by it.
- **What a seed is.** It decides the initial weights, the order of the rows, and dropout. The data and its splits are
  the same for all seeds. Figures of the test split are the mean ± the standard deviation over the seeds.
- **Differences** between two entries are paired by seed. A mean of up to twice its standard error, which is the
  standard deviation divided by the square root of the number of seeds, is marked "not resolved".
- **CPU minutes** are those of all processes of a run, from start to end; the first run of a data set also prepares
  the data. NE is the normalized entropy. Calibration is the mean prediction divided by the click rate.
- **To repeat them,** run the command of a data set. It trains what has no line in its file in `recipes/results`, so
  give `--results` a new folder to train all of it again, or with `--entries` and `--first_seed` a part of it.
"""


def outcomes_of(experiments: Path, results: Path) -> dict[str, tuple[Experiment, Outcome]]:
    """All experiments in a folder by name. Raises ValueError or OSError, which names the file."""
    if not results.is_dir():
        raise FileNotFoundError(f"{results}: no such folder, so there are no results. Correct --results.")
    read = {file.stem: read_experiment(file) for file in sorted(experiments.glob("*.yaml"))}
    return {name: (of, sort_results(of, read_results(results / f"{name}.jsonl"))) for name, of in read.items()}


def report_of(outcomes: Mapping[str, tuple[Experiment, Outcome]]) -> str:
    """The report on the experiments."""
    return "\n".join([_HEAD, *("\n".join(_section(name, *of)) + "\n" for name, of in outcomes.items())])


def is_drawn(experiment: Experiment) -> bool:
    """Whether the experiment has the layout of the paper or is a scaling curve, and so a plot."""
    return bool(experiment.paper_points or paper_tables.families(experiment))


def _section(name: str, experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    yield f"## {experiment.title}\n\n{experiment.data}\n"
    yield f"```bash\npython tools/paper.py run recipes/experiments/{name}.yaml\n```\n"
    if experiment.nodes:
        yield from paper_tables.on_nodes(experiment, outcome)
    elif is_drawn(experiment):
        is_curve = paper_tables.families(experiment)
        yield from (paper_tables.scaling if is_curve else paper_tables.table)(experiment, outcome)
        if any(outcome.by_entry.values()):
            what = "Test NE over training FLOPs" if is_curve else "NE difference over the samples seen"
            yield f"\n![{what}](results/{name}.png)"
    else:
        yield from _table(experiment, outcome)
        yield from _differences(experiment, outcome)
    if experiment.goals:
        yield f"\nGoals: {experiment.goals}."
    if experiment.reading:
        yield f"\n{experiment.reading}"
    yield from _remarks(experiment, outcome)


def _table(experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    runs = outcome.by_entry
    knows_best = any(run.metric("ne_over_best") for of_entry in runs.values() for run in of_entry.values())
    columns = [key for key in _COLUMNS if knows_best or key != "ne_over_best"]
    titles = [_COLUMNS[key] for key in columns]
    groups = sorted({key for of in runs.values() for run in of.values() for key in run.test if key.startswith("gauc_")})
    columns, titles = columns + groups, titles + [f"gAUC by {key.removeprefix('gauc_')}" for key in groups]
    yield from head(["entry", "seeds", *titles, "validation AUC", "validation NE", "CPU minutes", "source"])
    for entry in experiment.entries:
        progress = experiment.progress(entry, len(runs[entry.name]))
        yield row([entry.title, progress, *_figures(runs[entry.name], columns), "this project"])
    for each in (*experiment.peers, *experiment.published):
        given = (getattr(each, key, None) for key in columns)
        figures = ("" if figure is None else f"{figure:g}" for figure in given)
        yield row([each.name, "", *figures, "", "", "", each.source])


def _figures(runs: Mapping[int, Result], columns: Sequence[str]) -> Iterator[str]:
    for key in columns:
        yield _mean(key, over_seeds([run.metric(key) for run in runs.values()]))
    for key in ("auc", "ne"):
        found = over_seeds([run.metric(key, "eval") for run in runs.values()])
        yield _shown(key, found and found.mean)
    minutes = over_seeds([run.cpu_seconds / 60 for run in runs.values()])
    yield f"{minutes.mean:.1f}" if minutes else ""


def _differences(experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    """A table of the entries and those that they are compared with: `against`, or the first entry."""
    runs, by_name = outcome.by_entry, {entry.name: entry for entry in experiment.entries}
    first, *others = experiment.entries
    pairs = [(entry, by_name[name]) for entry in experiment.entries for name in entry.against]
    pairs = pairs or [(entry, first) for entry in others]
    shared = [(one, other, len(runs[one.name].keys() & runs[other.name].keys())) for one, other in pairs]
    if any(count for *_, count in shared):
        yield "\nDifferences, paired by seed:\n"
        yield from head(["entry", "against", "seeds", "AUC", "NE", "log loss"])
    for one, other, count in shared:
        if count:
            found = [difference(runs[one.name], runs[other.name], key) for key in ("auc", "ne", "logloss")]
            yield row([one.title, other.title, str(count), *(signed(each, 5) for each in found)])


def _remarks(experiment: Experiment, outcome: Outcome) -> Iterator[str]:
    """Where the runs took place, what failed, and lines that no longer count."""
    runs = [run for of_entry in outcome.by_entry.values() for run in of_entry.values()]
    places = Counter(
        f"commit {(run.commit or 'unknown')[:10]}{' with changes' * run.is_dirty}, "
        f"{', '.join(f'{name} {version}' for name, version in run.versions.items())}, {run.cpu}, {run.ranks} ranks"
        for run in runs
    )
    if places:
        yield "\nRuns:\n"
    yield from (f"- {count} at {place}" for place, count in places.items())
    for title, some in (("Failed", outcome.failed), ("Stale: the experiment's arguments have changed", outcome.stale)):
        if some:
            yield f"\n{title}:\n"
        yield from (f"- {run.entry}, seed {run.seed}{run.error and f': {run.error}'}" for run in some)


def _mean(metric: str, found: Statistic | None) -> str:
    spread = found and found.spread
    return _shown(metric, found and found.mean) + ("" if spread is None else f" ± {_shown(metric, spread)}")


def _shown(metric: str, value: float | None) -> str:
    return "" if value is None else f"{value:.{_DIGITS.get(metric, 5)}f}"
