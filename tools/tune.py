"""Searches a recipe's best arguments with Optuna: one training run per trial, compared by the validation split.

    python tools/tune.py recipes/configs/search/frappe.yaml
    python tools/tune.py space.yaml --nproc 2 --output_dir runs/my_search

space.yaml has `config`, a recipe, and `search`: for each argument {low, high}, with `log: true` or a `step`, or a list
of choices. It may have ds_config, trials, metric (ne, auc or logloss), seed, and `arguments` that all trials share.

A trial whose validation metric falls behind the median of the others is stopped. The test split is never scored. The
same command continues an interrupted study; with more trials in space.yaml, also a finished one. The folder then holds
trials.csv, best.yaml (the recipe to train and test), and the run of the best trial.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that `python tools/tune.py` finds tools.bench
try:
    import optuna
except ModuleNotFoundError:
    sys.exit("tune: Optuna is not installed. Run: pip install 'optuna>=5,<6'")

import argparse
import contextlib
import csv
import fcntl
import json
import os
import re
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field, fields
from typing import Any

import psutil
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState

from dhen.config.arguments import parse_arguments as parse_recipe
from dhen.config.command_line import HelpFormatter, check_types
from dhen.config.ds_config import AUTO, read_json
from dhen.config.training_arguments import MetricName
from dhen.model.configuration_dhen import DhenConfig
from dhen.model.names import check_names, check_type, quoted
from dhen.model.ranges import Count, Seed, Size
from dhen.paths import find
from dhen.training.dataset import cache_of
from dhen.yaml_files import read_yaml, write_yaml
from tools.bench.report import print_table

TRAIN = Path(__file__).resolve().parents[1] / "recipes" / "train.py"
SET_HERE = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint", "metric_for_best_model", "skip_test"}
SECONDS_BETWEEN_LOOKS, FIRST_FAILURES = 0.5, 3
COMPLETE, FAIL, PRUNED, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED, TrialState.RUNNING


@dataclass
class Space:
    """A space file."""

    config: str
    search: dict[str, Any]
    ds_config: str = "ds_configs/zero0.json"
    trials: Count = 30
    metric: MetricName | None = None
    seed: Seed = 0
    arguments: dict[str, Any] = field(default_factory=dict)


def checked(where: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a recipe, as their types. Raises ValueError that begins with `where`."""
    with tempfile.NamedTemporaryFile(suffix=".yaml") as draft:
        write_yaml(recipe, Path(draft.name))
        try:
            arguments = parse_recipe(["--config", draft.name])
            DhenConfig(**vars(arguments.architecture))
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix(f'{draft.name}: ')}") from error
    return arguments.as_dict()


def distribution(recipe: dict[str, Any], name: str, given: Any) -> BaseDistribution:
    """What Optuna draws an argument from. Choices become JSON. Raises ValueError."""
    is_range = isinstance(given, dict) and {"low", "high"} <= given.keys()
    if not given or not (is_range or isinstance(given, list)):
        raise ValueError(f"search.{name} is {quoted(given)}. Use a range, {{low: 1, high: 4}}, or a list of choices.")
    values = [given["low"], given["high"]] if is_range else given
    values = [checked("search", recipe | {name: value})[name] for value in values]
    if not is_range:
        return CategoricalDistribution([json.dumps(value) for value in values])
    try:
        check_names("key", map(str, given), ("low", "high", "log", "step"))
        check_type("low", values[0], float)
        check_type("log", given.get("log", False), bool)
        check_type("step", given.get("step", 1), type(values[0]))
        kind = IntDistribution if type(values[0]) is int else FloatDistribution
        return kind(**given | {"low": values[0], "high": values[1]})
    except ValueError as error:
        raise ValueError(f"search.{name}: {error}") from error


def arguments_of(trial: Trial | FrozenTrial) -> dict[str, Any]:
    """What a trial has drawn."""
    return {name: json.loads(value) if isinstance(value, str) else value for name, value in trial.params.items()}


def validation(path: Path, metric: str) -> dict[int, float]:
    """Samples seen -> the validation metric, from the whole lines of metrics.csv, which may be growing."""
    rows = csv.DictReader(path.read_text().split("\n")[:-1] if path.is_file() else [])
    name = "loss" if metric == "logloss" else metric
    return {int(row["samples_seen"]): float(row[name]) for row in rows if row["split"] == "validation"}


def end(process: psutil.Process) -> None:
    """End a run. torchrun passes the signal on to its ranks."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait()


class Search:
    """The trials of a space file, in a folder. Raises ValueError if the file is wrong, or not that of the folder."""

    def __init__(self, path: str, folder: Path, nproc: int, jobs: int) -> None:
        values = read_yaml(path, "Give a file such as recipes/configs/search/frappe.yaml.")
        check_names("key", map(str, values), [item.name for item in fields(Space)])
        self.space = space = check_types(Space, values, "space")
        if not space.search:
            raise ValueError("search is empty. Name the arguments to search.")
        base = parse_recipe(["--config", space.config])
        for name in {*space.arguments, *space.search} & SET_HERE | space.arguments.keys() & space.search.keys():
            raise ValueError(f"{name}: tune sets it itself, or it stands in arguments and in search. Remove it.")
        self.metric = space.metric or base.training.metric_for_best_model
        self.recipe = {"cache_dir": str(cache_of(base))} | read_yaml(find(space.config)) | space.arguments
        self.recipe["metric_for_best_model"] = self.metric
        checked("arguments", self.recipe)
        self.drawn_from = {name: distribution(self.recipe, name, given) for name, given in space.search.items()}
        ds_config = AUTO if space.ds_config == AUTO else read_json(Path(space.ds_config))
        self.folder, self.nproc, self.jobs = folder, nproc, jobs
        self._open(self.recipe | space.search | {"ds_config": ds_config, "nproc": nproc, "seed of tune": space.seed})

    def _open(self, fixed: dict[str, Any]) -> None:
        """Open or make the study. fixed: what may not change in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        direction, start = "maximize" if self.metric == "auc" else "minimize", min(5, max(1, self.space.trials // 6))
        storage, pruner = f"sqlite:///{self.folder / 'study.db'}", optuna.pruners.MedianPruner(n_startup_trials=start)
        self.study = study = optuna.create_study(
            storage=storage, study_name="tune", direction=direction, pruner=pruner, load_if_exists=True
        )
        # The seed moves on, so that a continued study does not draw its first trials again.
        study.sampler = optuna.samplers.TPESampler(seed=self.space.seed + len(study.trials))
        new = json.loads(json.dumps(fixed, default=str))
        old = study.user_attrs.get("fixed", new)
        changed = [name for name in sorted(old | new) if old.get(name) != new.get(name)]
        if changed:
            self._lock.close()  # whoever catches the error may open the study with another space
            were = "; ".join(f"{name} was {quoted(old.get(name))}, now {quoted(new.get(name))}" for name in changed)
            raise ValueError(f"{self.folder} has a study of another space: {were}. Choose another --output_dir.")
        study.set_user_attr("fixed", new)

    def run(self) -> None:
        """Run the trials that are left, and print all."""
        self.take_up()
        before, running = len(self.done()), {}
        try:
            while running or len(self.done()) < self.space.trials:
                while len(running) < self.jobs and len(self.done()) + len(running) < self.space.trials:
                    trial = self.study.ask(self.drawn_from)
                    running[trial] = self._start(trial)
                time.sleep(SECONDS_BETWEEN_LOOKS)
                for trial, process in list(running.items()):
                    if self._is_over(trial, process):
                        del running[trial]
                        self.report(trial.number)
                if len(done := self.done()) >= before + FIRST_FAILURES and done[0].state == FAIL:
                    break
        finally:
            for process in running.values():
                end(process)
        if (done := self.done())[0].state == FAIL:
            raise ValueError(f"all {len(done)} trials failed, for example: {done[-1].user_attrs['error']}")
        rows = [{name: str(value) for name, value in row.items() if name != "error"} for row in self._rows()]
        print_table(list(rows[0]), [list(row.values()) for row in rows])
        print(f"the search is finished: trials.csv, best.yaml and the best trial's run are in {self.folder}")

    def take_up(self) -> None:
        """End the runs that a killed tune left, and queue their trials again."""
        for trial in self.study.get_trials(states=[RUNNING]):
            recipe = self._folder_of(trial) / "recipe.yaml"
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(trial.user_attrs.get("pid", 0))
                if str(recipe) in process.cmdline():
                    end(process)
            shutil.rmtree(recipe.parent, ignore_errors=True)
            self.study.tell(trial.number, state=FAIL)
            self.study.enqueue_trial(trial.params)

    def done(self) -> list[FrozenTrial]:
        """The trials that are over, the best first. Those that were interrupted failed without an error."""
        over = self.study.get_trials(deepcopy=False, states=[COMPLETE, PRUNED, FAIL])
        over = [trial for trial in over if trial.state != FAIL or "error" in trial.user_attrs]
        sign = -1 if self.metric == "auc" else 1
        return sorted(over, key=lambda trial: (trial.state, sign * (trial.value or 0), trial.number))

    def _folder_of(self, trial: Trial | FrozenTrial) -> Path:
        return self.folder / f"trial-{trial.number:03}"

    def _start(self, trial: Trial) -> psutil.Popen:
        folder = self._folder_of(trial)
        folder.mkdir()
        recipe = self.recipe | arguments_of(trial) | {"output_dir": str(folder), "skip_test": True}
        write_yaml(recipe, folder / "recipe.yaml")
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.nproc}"]
        command = [sys.executable, *(launcher if self.nproc > 1 else ()), str(TRAIN)]
        command += ["--config", str(folder / "recipe.yaml"), "--ds_config", self.space.ds_config]
        threads = {"OMP_NUM_THREADS": "1"} if self.jobs > 1 else {}
        with (folder / "log.txt").open("w") as log:
            process = psutil.Popen(command, stdout=log, stderr=log, env=threads | os.environ, start_new_session=True)
        trial.set_user_attr("pid", process.pid)
        return process

    def _is_over(self, trial: Trial, process: psutil.Popen) -> bool:
        """Tell Optuna what a run has reached, and end one that is not worth going on."""
        status, folder, is_behind = process.poll(), self._folder_of(trial), False
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        for samples, value in validation(folder / "metrics.csv", self.metric).items():
            if samples not in known:
                trial.report(value, samples)
                is_behind |= trial.should_prune()  # which compares this evaluation only
        if status is None and not is_behind:
            return False
        if status is None:
            end(process)
            shutil.rmtree(folder)
            self.study.tell(trial, state=PRUNED)
            return True
        summary = json.loads((folder / "summary.json").read_text()) if status == 0 else {}
        value = summary.get("eval", {}).get(self.metric)
        if value is None:
            log = (folder / "log.txt").read_text(errors="replace")
            said = (re.findall(r"\berror: (.*)", log) or log.strip().splitlines() or ["it printed nothing"])[-1]
            trial.set_user_attr("error", said if status else f"the validation split gives no {self.metric}")
        self.study.tell(trial, value, state=FAIL if value is None else COMPLETE)
        return True

    def _rows(self) -> list[dict[str, Any]]:
        """The table of all trials, the best first."""
        rows = []
        for trial in self.done():
            row = {"trial": trial.number} | arguments_of(trial) | {f"validation {self.metric}": trial.value}
            row |= {"seconds": round(trial.duration.total_seconds()), "state": trial.state.name.lower()}
            row |= {"error": trial.user_attrs.get("error")}
            rows.append({name: float(f"{it:.5g}") if isinstance(it, float) else it for name, it in row.items()})
        return rows

    def report(self, number: int) -> None:
        """Print a trial, write trials.csv and best.yaml, and delete the weights of all trials but the best."""
        rows, (best, *others) = self._rows(), self.done()
        with (self.folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
        (row,) = (row for row in rows if row["trial"] == number)
        words = ", ".join(f"{name} {value}" for name, value in row.items() if value is not None)
        print(f"{len(rows)}/{self.space.trials}: {words}", flush=True)
        for folder in map(self._folder_of, others):
            for path in [*folder.glob("checkpoint-*"), *folder.glob("model")]:
                shutil.rmtree(path)
        if best.state == COMPLETE:
            start = "python" if self.nproc == 1 else f"torchrun --nproc_per_node {self.nproc}"
            command = f"{start} recipes/train.py --ds_config {self.space.ds_config} --config {self.folder}/best.yaml"
            recipe = self.recipe | arguments_of(best) | {"output_dir": str(self.folder / "best")}
            write_yaml(recipe, path := self.folder / "best.yaml")
            head = (
                f"# Trial {best.number}: validation {self.metric} {best.value:.5f}. Train and test it:\n# {command}\n"
            )
            path.write_text(head + path.read_text())


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("space", help="YAML file: what to search")
    parser.add_argument("--output_dir", type=Path, help="folder of the study; default: runs/<name of the file>_search")
    parser.add_argument("--nproc", type=int, default=1, help="ranks per trial")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time; if several, with OMP_NUM_THREADS=1")
    return parser.parse_args()


def main() -> int:
    """Exit status: 0, 130 if it was interrupted, or 1 with a message."""
    arguments = parse_arguments()
    folder = (arguments.output_dir or Path("runs") / f"{Path(arguments.space).stem}_search").resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for name in ("nproc", "jobs"):
            check_type(f"--{name}", getattr(arguments, name), Size)
        Search(find(arguments.space), folder, arguments.nproc, arguments.jobs).run()
    except KeyboardInterrupt:
        print("tune: interrupted. The same command continues the search.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        why = "another tune.py is at work there" if isinstance(error, BlockingIOError) else str(error)
        print(f"tune: {arguments.space}: {why.removeprefix(f'{arguments.space}: ')}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
