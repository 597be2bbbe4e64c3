"""tools/paper.py: runs become lines, lines become the report, and nothing is run or counted twice."""

import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from dhen.data.synthetic import RECIPES, generated_log
from tests import ROOT
from tests.recipes.launch import prepared_click_log
from tests.tools import forked_python
from tests.tools.test_cluster import why_not
from tools.experiments import Experiment, Result, add_result, code, read_experiment, read_results, sort_results
from tools.over_seeds import Statistic, difference, over_seeds
from tools.paper_report import outcomes_of, report_of

call = functools.partial(forked_python.call, "tools/paper.py")
EXPERIMENTS = sorted((ROOT / "recipes/experiments").glob("*.yaml"))
ENTRIES = [{"name": "first", "title": "First"}, {"name": "second", "title": "Second", "seeds": 4}]
QUICKSTART = {
    "title": "Log", "data": "A log.", "config": "recipes/configs/quickstart.yaml",
    "ds_config": "ds_configs/zero0.json", "seeds": 3, "entries": ENTRIES,
}  # fmt: skip


def write_experiment(path: Path, **changes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(QUICKSTART | changes))
    return path


def lines(experiment: Experiment, aucs: dict[str, list[float]], **more) -> list[Result]:
    """A finished run for each AUC; its NE is 1 - AUC."""
    entries = {entry.name: entry for entry in experiment.entries}
    return [
        Result(
            entry=name, seed=seed, digest=experiment.digest(entries[name]), arguments={}, ranks=1,
            cpu_seconds=60, test={"auc": auc, "ne": 1 - auc, "best_possible_ne": 0.1, "logloss": None}, **more,
        )
        for name, values in aucs.items() for seed, auc in enumerate(values)
    ]  # fmt: skip


def report(folder: Path, results: list[Result], **changes) -> str:
    write_experiment(folder / "experiments/log.yaml", **changes)
    file = folder / "results/log.jsonl"
    file.unlink(missing_ok=True)
    for result in results:
        add_result(file, result)
    assert read_results(file) == results if results else not file.exists()
    return report_of(outcomes_of(folder / "experiments", folder / "results"))


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    return read_experiment(write_experiment(tmp_path / "log.yaml"))


def test_a_run_becomes_one_line_and_is_not_repeated(tmp_path):
    """One entry trains with values that no flag can give, the other fails; before, a call is ended in its first run."""
    log = prepared_click_log(tmp_path / "log")
    architecture = {"head_mlp": [], "interactions": [{"kind": "advanced_dlrm", "use_dense": True}, "linear"]}
    good = {"name": "good", "title": "Good", "arguments": architecture}
    bad = {"name": "bad", "title": "Bad", "arguments": {"learning_rate": 1e10, "table_learning_rate": 1e15}}
    common = {"dataset_name": str(log), "per_device_train_batch_size": 64, "warmup_steps": 0}
    after = {"name": "after", "title": "After", "starts_from": "bad"}
    file = write_experiment(tmp_path / "log.yaml", seeds=1, arguments=common, entries=[good, bad, after])
    folders = [f"--results={tmp_path / 'results'}", f"--runs={tmp_path / 'runs'}"]
    flags = ["run", str(file), *folders, "--budget=tiny"]

    process = subprocess.Popen([sys.executable, "tools/paper.py", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "runs/log/good-0/log.txt").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "Only the runs in progress are lost" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not (tmp_path / "results").exists()

    done = call(*flags, "--jobs=2")
    assert done.status == 1, "a run failed"
    results = {result.entry: result for result in read_results(tmp_path / "results/log.jsonl")}
    good, bad = results["good"], results["bad"]
    assert results["after"].error.endswith("log/bad-0 failed, whose model it needs")
    assert (good.steps, good.ranks, good.error) == (3, 1, "")
    assert len(good.evaluations) == 3
    assert good.tested_step in {1, 2, 3}
    assert good.training_flops_per_sample > 0
    assert {"head_mlp", "max_steps", "dataset_name"} < good.arguments.keys()
    assert good.arguments["head_mlp"] == []
    assert "interactions" not in good.arguments, "as in the recipe"
    assert good.versions.keys() >= {"torch", "deepspeed"}
    assert (
        good.commit
        == subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout[:-1]
    )
    assert 1 < good.cpu_seconds < 300
    assert 0 < good.eval["ne"] < 10
    assert good.test["examples"] == 300
    assert "the validation loss is nan" in bad.error
    assert not (tmp_path / "runs/log/good-0").exists()
    assert (tmp_path / "runs/log/bad-0/log.txt").is_file(), "a failed run can be looked at"

    again = call(*flags, "--entries=good")
    assert again.status == 0, again.stderr
    assert "skipped: good, seed 0" in again.stdout
    assert "0 runs to do" in again.stdout
    assert len(read_results(tmp_path / "results/log.jsonl")) == 3


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_runs(file, tmp_path):
    """All entries are checked. The first one makes three steps; of one experiment, the last, which fine-tunes."""
    experiment = read_experiment(file)
    if experiment.nodes and (reason := why_not()):
        pytest.skip(f"no cluster on this machine: {reason}")
    for key in ("train_file", "dataset_name"):
        data = experiment.recipe.get(key, "quickstart")
        if data not in RECIPES and not (ROOT / data).exists():
            pytest.skip(f"{ROOT / data} is not there")
    starts_from = experiment.entries[-1].starts_from if experiment.rows == "criteo" else None
    flags = ["--budget=tiny", f"--entries={experiment.entries[-1 if starts_from else 0].name}"]
    done = call("run", str(file), *flags, f"--results={tmp_path / 'results'}", f"--runs={tmp_path / 'runs'}")
    assert done.status == 0, done.stdout + done.stderr
    *base, result = read_results(tmp_path / f"results/{file.stem}.jsonl")
    assert [each.entry for each in base] == ([starts_from] if starts_from else []), "the model to start from"
    assert 0 < result.metric("ne") < 10
    name = str((experiment.recipe | experiment.arguments).get("dataset_name"))
    assert (result.metric("ne_over_best") is not None) == (generated_log(name) is not None)


def test_the_report_is_up_to_date(tmp_path):
    """The report needs no torch."""
    other = tmp_path / "RESULTS.md"
    none = call("report", f"--output={other}", f"--results={tmp_path / 'typo'}")
    assert (none.status, none.stderr) == (
        1,
        f"paper: {tmp_path / 'typo'}: no such folder, so there are no results. Correct --results.\n",
    )
    assert not other.exists()
    code = "import sys; sys.modules['torch'] = None; from tools.paper import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "report", f"--output={other}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert other.read_text() == (ROOT / "recipes/RESULTS.md").read_text(), "run python tools/paper.py report"


def test_statistics_are_those_of_the_formulas(experiment):
    values = np.random.default_rng(0).normal(0.9, 0.01, (2, 5))
    first, second = (lines(experiment, {"first": list(row)}) for row in values)
    own, base = ({result.seed: result for result in some} for some in (first, second))
    found = over_seeds(list(values[0]))
    assert found == pytest.approx((values[0].mean(), values[0].std(ddof=1), 5), rel=1e-12)
    differences = values[0] - values[1]
    expected = (differences.mean(), differences.std(ddof=1), 5)
    assert difference(own, base, "auc") == pytest.approx(expected, rel=1e-9)
    del own[0], base[3]
    differences = differences[[1, 2, 4]]
    expected = (differences.mean(), differences.std(ddof=1), 3)
    assert difference(own, base, "auc") == pytest.approx(expected, rel=1e-9), "only seeds that both have"
    assert difference(own, base, "logloss") is None
    assert over_seeds([None, 0.5]) == Statistic(0.5, None, 1)


def test_the_report_has_means_differences_and_progress(tmp_path, experiment):
    aucs = {"first": [0.90, 0.92, 0.94], "second": [0.91, 0.935, 0.947]}
    quoted = {"name": "Peer", "auc": 0.91, "source": "a paper"}
    results = lines(experiment, aucs, cpu="Some CPU", commit="a" * 40, is_dirty=True)
    text = report(tmp_path, results, published=[quoted], goals="much")
    assert "\nGoals: much.\n" in text
    assert f"| First | 3 | 0.92000 ± {statistics.stdev(aucs['first']):.5f} | 0.08000 ± 0.02000 |" in text
    assert "| Second | 3 of 4 | 0.93067 ± " in text
    assert "| Peer |  | 0.91 |" in text
    assert "| a paper |" in text
    assert "NE / best possible" in text
    assert "| Second | First | 3 | +0.01067 ± 0.00404 | -0.01067 ± 0.00404 |  |" in text
    assert "- 6 at commit aaaaaaaaaa with changes" in text
    close = report(tmp_path, lines(experiment, aucs | {"second": [0.91, 0.93, 0.92]}))
    assert "| Second | First | 3 | +0.00000 ± 0.01732, not resolved |" in close
    one = report(tmp_path, lines(experiment, {"first": [0.9], "second": [0.8]}))
    assert "| Second | First | 1 | -0.10000, not resolved |" in one, "one pair has no standard error"
    assert "| Second | not run |" in report(tmp_path, [])
    entries = [ENTRIES[0] | {"against": ["second"]}, ENTRIES[1]]
    other_way = report(tmp_path, lines(experiment, aucs), entries=entries)
    assert "| First | Second | 3 | -0.01067 ± 0.00404 |" in other_way
    assert "| Second | First |" not in other_way, "only against those that are named"


def test_an_entry_may_show_a_further_task_of_another_one(tmp_path):
    entries = [*ENTRIES, {"name": "buys", "title": "Buys", "runs_of": "first", "task": "buy"}]
    experiment = read_experiment(write_experiment(tmp_path / "log.yaml", entries=entries))
    tasks = {"test": {"buy": {"auc": 0.9, "ne": 0.25}}}
    text = report(tmp_path, lines(experiment, {"first": [0.7, 0.8]}, tasks=tasks), entries=entries)
    assert "| First | 2 of 3 | 0.75000 ± 0.07071 | 0.25000 ± 0.07071 |" in text
    assert "| Buys | 2 of 3 | 0.90000 ± 0.00000 | 0.25000 ± 0.00000 |" in text


def test_lines_with_other_arguments_are_stale_and_failures_are_listed(tmp_path, experiment):
    results = lines(experiment, {"first": [0.9, 0.8, 0.7], "second": [0.6, 0.5]})
    results[1] = replace(results[1], digest="0" * 16)
    results[2] = replace(results[2], error="status 1: too hot", test={})
    results[3] = replace(results[3], entry="gone")
    outcome = sort_results(experiment, results)
    assert {name: list(runs) for name, runs in outcome.by_entry.items()} == {"first": [0], "second": [1]}
    assert outcome.stale == [results[1], results[3]]
    assert outcome.failed == [results[2]]
    text = report(tmp_path, results)
    assert "- first, seed 1\n- gone, seed 0\n" in text
    assert "- first, seed 2: status 1: too hot\n" in text
    assert "| First | 1 of 3 | 0.90000 |" in text
    later = replace(results[2], error="", test={"auc": 0.6})
    outcome = sort_results(experiment, [*results, later, replace(later, test={"auc": 0.99})])
    assert not outcome.failed, "a later run succeeded"
    assert outcome.by_entry["first"][2] == later, "the first result counts"


def test_all_that_decides_a_result_is_in_its_digest(tmp_path):
    def digest(**changes) -> str:
        experiment = read_experiment(write_experiment(tmp_path / "log.yaml", **changes))
        return experiment.digest(experiment.entries[0])

    schema = tmp_path / "schema.yaml"
    schema.write_text("label: y")
    one = digest()
    assert digest(title="Other", seeds=7, arguments={"embedding_dim": 16, "logging_steps": 3}) == one
    of_schema = digest(arguments={"dataset_schema": str(schema)})
    schema.write_text("label: z")
    others = [
        digest(arguments={"num_layers": 3}), digest(ds_config="ds_configs/zero1.json"), of_schema,
        digest(arguments={"dataset_schema": str(schema)}), digest(config="recipes/configs/criteo.yaml"),
    ]  # fmt: skip
    assert len({one, *others}) == 6


def test_changes_of_the_code_are_marked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert code(tmp_path) == {"commit": None, "is_dirty": False}
    (tmp_path / "dhen").mkdir()
    (tmp_path / "dhen/a.py").write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "results.jsonl").write_text("{}")
    assert not code(tmp_path)["is_dirty"], "results are no code"
    (tmp_path / "dhen/a.py").write_text("1")
    assert code(tmp_path)["is_dirty"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"titel": "x"}, "log.yaml: unknown key 'titel'. Did you mean 'title'?"),
        ({"entries": [{"name": "a", "title": "A", "argument": {}}]}, "entries.0: unknown key 'argument'. Did you mean"),
        ({"seeds": 0}, "seeds is 0. Use 1 or more"),
        ({"entries": []}, "entries is []"),
        ({"entries": [ENTRIES[0], ENTRIES[0]]}, "entries: two of first, first have the same name"),
        ({"arguments": {"seed": 1}}, "arguments: seed is set by the tool. Remove it"),
        ({"entries": [ENTRIES[0] | {"starts_from": "first"}]}, "entry first: unknown entry in starts_from 'first'"),
        ({"entries": [ENTRIES[0] | {"against": ["third"]}]}, "entry first: unknown entry in against 'third'"),
        ({"entries": [ENTRIES[0] | {"task": "buy"}]}, "entry first: runs_of and task go together"),
        ({"entries": [ENTRIES[0] | {"task": "buy", "runs_of": "none"}]}, "unknown entry in runs_of 'none'"),
        ({"rows": "flight"}, "unknown data set in rows 'flight'. Did you mean 'flights'?"),
        ({"published": [{"name": "x", "source": "y", "auc": "high"}]}, "published.0.auc is 'high'"),
        ({"arguments": {"num_layer": 1}}, "entry first: .*unknown argument 'num_layer'. Did you mean 'num_layers'?"),
        ({"config": "recipes/configs/none.yaml"}, "recipes/configs/none.yaml: no such file"),
        ({"ds_config": "auto"}, "auto: no such file. Use a file of ds_configs as ds_config."),
    ],
)  # fmt: skip
def test_a_mistake_in_an_experiment_is_one_line(tmp_path, changes, message):
    file = write_experiment(tmp_path / "log.yaml", **changes)
    done = call("run", str(file), "--budget=tiny", f"--results={tmp_path}", f"--runs={tmp_path / 'runs'}")
    assert done.status == 1
    assert len(done.stderr.splitlines()) == 1, done.stderr
    head, _, tail = message.partition(".*")
    assert head in done.stderr
    assert tail in done.stderr


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"entry"')
    with pytest.raises(ValueError, match=r"log\.jsonl: line 1 is not JSON\. Delete it"):
        read_results(tmp_path / "log.jsonl")
    (tmp_path / "log.jsonl").write_text(json.dumps({"entry": "first"}))
    with pytest.raises(ValueError, match=r"log\.jsonl: line 1: seed: "):
        read_results(tmp_path / "log.jsonl")
    line = {"entry": "first", "seed": 0, "digest": "", "arguments": {}, "ranks": 1}
    (tmp_path / "log.jsonl").write_text(json.dumps(line | {"command": "of another version"}))
    assert read_results(tmp_path / "log.jsonl") == [Result(**line)]


def test_ranks_divide_the_batch(tmp_path):
    done = call("run", str(write_experiment(tmp_path / "log.yaml")), "--nproc=3", "--budget=tiny", f"--runs={tmp_path}")
    assert done.status == 1
    assert "3 ranks do not divide first's batch of 1024" in done.stderr
    assert os.listdir(tmp_path) == ["log.yaml"]
