"""tools/tune.py: real searches over a small click log, and the mistakes that a space file can have."""

import csv
import json
import re
import shutil
import subprocess
import sys
import time

import optuna
import psutil
import pytest
import yaml

from dhen.config.arguments import parse_arguments
from tests import ROOT
from tests.recipes.launch import TINY, prepared_click_log, run_script
from tests.tools.forked_python import call
from tools.tune import Search, validation

GOOD = {"learning_rate": "0.01", "num_train_epochs": "3", "table_learning_rate": 0.1}
DIVERGES = {"learning_rate": "1e+17", "num_train_epochs": "3", "table_learning_rate": 0.1}
LEARNS_NOTHING = {"learning_rate": "1e-09", "num_train_epochs": "300", "table_learning_rate": 1e-9}
SEARCH = {
    "learning_rate": [1e-9, 1e-2, 1e17],
    "num_train_epochs": [3, 300],
    "table_learning_rate": {"low": 1e-9, "high": 0.1, "log": True},
}


@pytest.fixture
def space(tmp_path):
    """A space file beside its recipe."""
    tiny = dict(flag.removeprefix("--").split("=") for flag in TINY)
    recipe = {name: yaml.safe_load(value) for name, value in tiny.items()} | {"per_device_train_batch_size": 64}
    recipe |= {"dataset_name": str(tmp_path / "data"), "output_dir": str(tmp_path / "runs" / "tiny")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return write(tmp_path, trials=3, search=SEARCH, arguments={"dropout": 0.0})


def write(folder, **values):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"config": str(folder / "recipe.yaml")} | values, sort_keys=False))
    return path


def study_in(folder):
    return optuna.create_study(storage=f"sqlite:///{folder / 'study.db'}", study_name="tune", load_if_exists=True)


def test_a_search_is_killed_goes_on_prunes_survives_divergence_and_never_scores_the_test_split(
    space, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTEST_TMP", str(tmp_path))
    shutil.copytree(prepared_click_log(tmp_path), tmp_path / "data")
    folder = tmp_path / "search"
    folder.mkdir()
    for params in (DIVERGES, GOOD, LEARNS_NOTHING):  # in this order, so that the last one has something to fall behind
        study_in(folder).enqueue_trial(params)
    command = ["tools/tune.py", str(space), f"--output_dir={folder}"]
    tune = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        while "pid" not in (first := study_in(folder).trials[0]).user_attrs:
            assert tune.poll() is None
            time.sleep(0.1)
    finally:
        tune.kill()
        tune.wait()
    pid = first.user_attrs["pid"]
    orphan = psutil.Process(pid) if psutil.pid_exists(pid) else None  # on a busy machine it may have diverged by now

    done = call(*command)
    assert done.status == 0, done.stdout + done.stderr
    assert orphan is None or not orphan.is_running()
    with (folder / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["trial"], row["state"]) for row in rows] == [("1", "complete"), ("2", "pruned"), ("3", "fail")]
    assert rows[2]["error"].startswith("step ")
    assert "is not finite" in rows[2]["error"]
    for number in (1, 2, 3):
        assert f"{number}/3: trial {number}, " in done.stdout
    summary = json.loads((folder / "trial-001" / "summary.json").read_text())
    assert float(rows[0]["validation ne"]) == pytest.approx(summary["eval"]["ne"], rel=1e-4)

    # The weights of the best trial are there, and no others. A pruned run leaves nothing.
    assert sorted(path.name for path in folder.glob("trial-*")) == ["trial-001", "trial-003"]
    assert (folder / "trial-001" / "model").is_dir()
    assert not [*(folder / "trial-003").glob("checkpoint-*"), *(folder / "trial-003").glob("model")]

    # No trial scored the test split. Training the best recipe does, and repeats the trial.
    assert "test" not in summary
    assert ",test," not in (folder / "trial-001" / "metrics.csv").read_text()
    assert "test" not in (folder / "trial-001" / "unseen.csv").read_text()
    best = parse_arguments(["--config", str(folder / "best.yaml")])
    assert (best.training.num_train_epochs, best.training.learning_rate, best.training.skip_test) == (3, 0.01, False)
    done = run_script("train.py", f"--config={folder / 'best.yaml'}", "--ds_config=ds_configs/zero0.json")
    assert done.status == 0, done.output
    of_best = json.loads((folder / "best" / "summary.json").read_text())
    # A search runs with one thread, which sums in another order.
    assert of_best["eval"]["ne"] == pytest.approx(summary["eval"]["ne"], rel=1e-6)
    flags = ("--resume_from_checkpoint=true", "--skip_test=false", "--ds_config=ds_configs/zero0.json")
    done = run_script("train.py", f"--config={folder / 'trial-001' / 'recipe.yaml'}", *flags)
    assert done.status == 0, done.output
    tested = json.loads((folder / "trial-001" / "summary.json").read_text())["test"]
    assert tested["ne"] == pytest.approx(of_best["test"]["ne"], rel=1e-6)

    # The same command again trains nothing; with another space it is refused, unless that only has more trials.
    done = call(*command)
    assert (done.status, done.stdout.count("trial 1")) == (0, 0)
    assert "the search is finished" in done.stdout
    assert len(study_in(folder).trials) == 4
    unchanged = {"search": SEARCH, "arguments": {"dropout": 0.0}}
    changed = write(tmp_path, trials=3, search=SEARCH | {"learning_rate": [0.1]}, arguments={"dropout": 0.5})
    said = refusal(changed, folder)
    assert "dropout was 0.0, now 0.5; learning_rate was [1e-09, 0.01, 1e+17], now [0.1]. Choose another" in said
    assert "nproc was 1, now 2. " in refusal(write(tmp_path, trials=3, **unchanged), folder, nproc=2)
    assert len(Search(str(write(tmp_path, trials=4, **unchanged)), folder, 1, 1).done()) == 3


def refusal(path, folder, nproc=1):
    try:
        Search(str(path), folder, nproc, 1)
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


def test_runs_of_a_killed_search_are_ended_and_no_other_process(space, tmp_path):
    search = Search(str(space), tmp_path / "search", 1, 1)
    with pytest.raises(BlockingIOError):  # one tune at a time
        Search(str(space), tmp_path / "search", 1, 1)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    left = subprocess.Popen([*sleep, str(tmp_path / "search/trial-000/recipe.yaml")], start_new_session=True)
    with_an_old_pid = subprocess.Popen([*sleep, "recipe.yaml"], start_new_session=True)
    try:
        for process in (left, with_an_old_pid):
            search.study.ask(search.drawn_from).set_user_attr("pid", process.pid)
        before = [trial.params for trial in search.study.trials]
        search.take_up()
        assert psutil.pid_exists(with_an_old_pid.pid)
        assert with_an_old_pid.poll() is None
        assert not psutil.pid_exists(left.pid)
        assert search.done() == []
        assert [search.study.ask(search.drawn_from).params for _ in before] == before
    finally:
        left.kill()
        with_an_old_pid.kill()


def test_the_best_trial_so_far_keeps_its_weights_and_no_other(space, tmp_path):
    search = Search(str(space), tmp_path / "search", 1, 1)
    for ne, best in ((0.9, 0), (0.8, 1), (0.85, 1)):
        trial = search.study.ask(search.drawn_from)
        folder = tmp_path / "search" / f"trial-{trial.number:03}"
        for name in ("checkpoint-5", "model", "tensorboard"):
            (folder / name).mkdir(parents=True)
        search.study.tell(trial, ne)
        search.report(trial.number)
        kept = {path.parent.name for name in ("checkpoint-*", "model") for path in tmp_path.glob(f"search/*/{name}")}
        assert kept == {f"trial-{best:03}"}
        assert (folder / "tensorboard").is_dir()
        assert f"# Trial {best}: " in (tmp_path / "search" / "best.yaml").read_text()


def test_a_search_stops_if_its_first_trials_fail(space, tmp_path):
    folder = f"--output_dir={tmp_path / 'search'}"
    write(tmp_path, trials=1, search=SEARCH)
    done = call("tools/tune.py", space, folder)  # the data is not there
    assert (done.status, "the search is finished" in done.stdout) == (1, False)
    assert "all 1 trials failed, for example: " in done.stderr
    write(tmp_path, trials=9, search=SEARCH)
    done = call("tools/tune.py", space, folder, "--jobs=3")
    assert done.status == 1
    assert re.search("all [456] trials failed, for example: ", done.stderr)
    assert str(tmp_path / "data") in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_metrics_are_read_while_they_grow(tmp_path):
    path = tmp_path / "metrics.csv"
    assert validation(path, "ne") == {}
    whole = "step,samples_seen,split,loss,ne\r\n1,64,train,0.5,0.9\r\n1,64,validation,0.4,0.8\r\n"
    path.write_text(whole + "2,128,validation,0.3,0.")
    assert validation(path, "ne") == {64: 0.8}
    assert validation(path, "logloss") == {64: 0.4}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"serch": {}}, "unknown key 'serch'. Did you mean 'search'?"),
        ({}, "search: "),
        ({"search": {}}, "search is empty. Name the arguments to search."),
        ({"search": {"dropuot": [0]}}, "search: unknown argument 'dropuot'. Did you mean 'dropout'?"),
        ({"search": {"dropout": {"low": 0.1}}}, "search.dropout is {'low': 0.1}. Use a range"),
        ({"search": {"dropout": []}}, "search.dropout is []. Use a range"),
        ({"search": {"dropout": {"low": 0.2, "high": 1.5}}}, "search: dropout is 1.5. Use "),
        ({"search": {"dropout": {"low": 0.4, "high": 0.2}}}, "search.dropout: "),
        ({"search": {"dropout": {"low": 0.0, "high": 0.2, "log": True}}}, "search.dropout: "),
        ({"search": {"dropout": {"low": 0.1, "high": 0.2, "lgo": True}}}, "search.dropout: unknown key 'lgo'"),
        ({"search": {"dropout": {"low": 0.1, "high": 0.2, "log": "no"}}}, "search.dropout: log is 'no'."),
        ({"search": {"num_layers": {"low": 1, "high": 3, "step": 0.5}}}, "search.num_layers: step is 0.5."),
        ({"search": {"norm": {"low": 1, "high": 3}}}, "search: norm is 1."),
        ({"search": {"calibrate": {"low": False, "high": True}}}, "search.calibrate: low is False."),
        ({"search": {"interactions": [["linear"], ["liner"]]}}, "Did you mean 'linear'?"),
        ({"search": {"seed": [1]}, "arguments": {"seed": 2}}, "seed: tune sets it itself, or it stands in "),
        ({"search": {"seed": [1]}, "arguments": {"output_dir": "x"}}, "output_dir: tune sets it itself"),
        ({"search": {"seed": [1]}, "arguments": {"learnin_rate": 1}}, "Did you mean 'learning_rate'?"),
        ({"search": {"seed": [1]}, "metric": "acc"}, "metric is 'acc'."),
        ({"search": {"seed": [1]}, "trials": 0}, "trials is 0. Use 1 or more."),
        ({"search": {"seed": [1]}, "config": "no.yaml"}, "no.yaml: no such file."),
        ({"search": {"seed": [1]}, "ds_config": "no.json"}, "no.json: no such ds_config."),
    ],
)  # fmt: skip
def test_a_mistake_in_the_space_file_is_one_line(space, tmp_path, values, message):
    path = write(tmp_path, **values)
    with pytest.raises(ValueError, match=r".") as caught:
        Search(str(path), tmp_path / "search", 1, 1)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_the_example_can_be_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for path in sorted((ROOT / "recipes/configs/search").glob("*.yaml")):
        assert Search(str(path), tmp_path / path.stem, 1, 1).done() == []


def test_a_mistake_and_a_missing_package_are_said_with_the_remedy(space):
    space.write_text("config: 1\nconfig: 2\n")
    done = call("tools/tune.py", space)
    assert (done.status, done.stdout) == (1, "")
    assert done.stderr.startswith(f"tune: {space}: ")
    assert done.stderr.count(str(space)) == 1
    without = "import runpy, sys; sys.modules['optuna'] = None; runpy.run_path('tools/tune.py')"
    done = subprocess.run([sys.executable, "-c", without], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "tune: Optuna is not installed. Run: pip install 'optuna>=5,<6'\n")
