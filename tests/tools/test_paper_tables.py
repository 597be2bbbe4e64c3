"""Tables in the paper's layout: NE differences over training, scaling curves, and the command of each table."""

import csv
import functools
import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.tools import forked_python
from tools.experiments import Experiment, Outcome, Result, read_experiment
from tools.paper_tables import as_csv, at_points, draw, families, ne_differences, scaling, slope, table

call = functools.partial(forked_python.call, "tools/paper.py")
EXPERIMENT = {
    "title": "Table", "data": "A log.", "config": "recipes/configs/quickstart.yaml",
    "ds_config": "ds_configs/zero0.json", "seeds": 3, "paper_points": ["5B", "15B"],
    "entries": [
        {"name": "first", "title": "First", "family": "one"},
        {"name": "second", "title": "Second", "paper": [-0.07, 0.2], "family": "one"},
        {"name": "third", "title": "Third"},
    ],
}  # fmt: skip
BASE = Result(entry="first", seed=0, digest="", arguments={}, ranks=1, cpu_seconds=60.0)


def run(entry: str, seed: int, nes: dict[int, float], flops: int = 1_000_000) -> Result:
    evaluations = [[float(samples), ne, 0.5] for samples, ne in nes.items()]
    test = {"ne": list(nes.values())[-1]}
    made = replace(BASE, entry=entry, seed=seed, evaluations=evaluations, test=test)
    return replace(made, training_flops_per_sample=flops)


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    return read_experiment(tmp_path / "table.yaml")


@pytest.fixture
def outcome() -> Outcome:
    """Two seeds; the third entry has no runs."""
    first = {seed: run("first", seed, {100: 0.9 + seed / 100, 200: 0.8, 300: 0.7}) for seed in (0, 1)}
    second = {seed: run("second", seed, {100: 0.9, 190: 0.1, 200: 0.76, 300: 0.72}, 10**7) for seed in (0, 1, 2)}
    return Outcome({"first": first, "second": second, "third": {}}, [], [])


def test_differences_are_in_percent_and_paired_by_seed_and_samples(outcome):
    found = ne_differences(outcome.by_entry["second"], outcome.by_entry["first"])
    assert found.keys() == {100, 200, 300}, "at 190 samples there is only one of the two"
    assert found[100] == pytest.approx([0.0, 100 * (0.9 / 0.91 - 1)])
    assert found[200] == pytest.approx([-5.0, -5.0])
    means = [point.mean for point in at_points(found)]
    assert means == pytest.approx([np.mean(found[100]), -5.0, 100 * (0.72 / 0.7 - 1)])
    assert at_points(found)[0].spread == pytest.approx(np.std(found[100], ddof=1))
    assert at_points({}) == [None, None, None]
    assert at_points({90: [1.0], 110: [2.0], 300: [3.0]})[0].mean == 1.0, "the nearest to a third; the first of two"


def test_the_table_stands_beside_the_papers(experiment, outcome):
    lines = list(table(experiment, outcome))
    assert "| paper, 5B | paper, 15B |" in lines[1]
    first, second, third = lines[3:6]
    assert first == "| First | 2 of 3 | baseline |  |  | baseline | baseline | 1.000 | 0.70000 | 1.0 |"
    assert second.startswith("| Second | 3 | -0.549 ± 0.777, not resolved | -5.000 ± 0.000 | +2.857 ± 0.000 | -0.07 |")
    assert second.endswith("| +0.2 | 10.000 | 0.72000 | 1.0 |")
    assert third == "| Third | not run |  |  |  |  |  |  |  |  |"


def test_a_scaling_curve_has_its_sizes_and_slopes(experiment, outcome, tmp_path):
    lines = list(scaling(experiment, outcome))
    assert "| Second | 3 | 10.000 | 0.72000 | 1.0 |" in lines
    assert any(line.startswith("| one | 5 |") for line in lines)
    draw(experiment, outcome, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_the_slope_is_that_of_least_squares(experiment):
    """NE falls by a factor exp(-0.01) per decade, with noise."""
    noise = np.random.default_rng(0).normal(0, 1e-3, 6)
    x = np.log10([10**5, 10**6, 10**7] * 2)
    y = 100 * (-0.01 * x + noise)
    runs = [run("", 0, {1: math.exp(value / 100)}, round(10**flops)) for flops, value in zip(x, y, strict=True)]
    by_entry = {"first": dict(enumerate(runs[:3])), "second": dict(enumerate(runs[3:])), "third": {}}
    found, error, count = slope(Outcome(by_entry, [], []), families(experiment)["one"])
    centered = x - x.mean()
    expected = (centered * y).sum() / (centered**2).sum()
    residual = y - y.mean() - expected * centered
    assert count == 6
    assert found == pytest.approx(expected, rel=1e-6)
    assert error == pytest.approx(math.sqrt((residual**2).sum() / (6 - 2) / (centered**2).sum()), rel=1e-6)
    one_size = {"first": dict(enumerate([runs[0]] * 3)), "second": {}, "third": {}}
    assert slope(Outcome(one_size, [], []), families(experiment)["one"]) is None


def test_every_evaluation_is_in_the_csv_and_the_plot_is_drawn(experiment, outcome, tmp_path):
    rows = list(csv.DictReader(io.StringIO(as_csv(experiment, outcome))))
    assert len(rows) == 2 * 3 + 3 * 4
    assert rows[0] == {"entry": "first", "seed": "0", "samples_seen": "100", "validation_ne": "0.9"}
    entries = [replace(entry, family=None) for entry in experiment.entries]  # otherwise it is a scaling curve
    draw(replace(experiment, entries=entries), outcome, tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_figures_of_the_paper_fit_its_points(tmp_path):
    wrong = EXPERIMENT | {"paper_points": ["5B"]}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(wrong))
    with pytest.raises(ValueError, match="entry second: paper has 2 figures for 1 paper_points"):
        read_experiment(tmp_path / "table.yaml")


def test_a_table_has_a_command(tmp_path):
    done = call("table1", "--data=flight")
    assert done.status == 1
    assert done.stderr == "paper: unknown data 'flight'. Did you mean 'flights'? Allowed: flights, planted.\n"
    done = call("table2", "--data=planted", "--entries=two", f"--results={tmp_path}", f"--runs={tmp_path}")
    assert "unknown entry 'two'" in done.stderr
    assert not list(Path(tmp_path).iterdir())
