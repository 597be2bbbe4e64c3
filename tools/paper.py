"""Runs the experiments of recipes/experiments, and writes the report of their results, recipes/RESULTS.md.

    python tools/paper.py run recipes/experiments/frappe.yaml
    python tools/paper.py run recipes/experiments/frappe.yaml --entries dhen --seeds 5 --jobs 2
    python tools/paper.py table1 --data flights
    python tools/paper.py figure6 --nodes 2 --ranks_per_node 2 --depths 2 4 8
    python tools/paper.py report

`run` trains each entry once per seed and appends a line per run to recipes/results. A run that has its line already is
skipped, so an interrupted call goes on where it was. A failed run is tried again. `report` needs these lines only.
`table1`, `table2`, `table3`, `scaling`, `fine_tuning` and `common_optimizations` run the experiments whose names begin
so. `figure6` passes its arguments to tools/bench/sharding.py.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that a call by path finds tools.experiments

import argparse
import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dhen.data.synthetic import RECIPES
from dhen.model.names import check_names, quoted
from dhen.yaml_files import write_yaml
from tools.cluster import ClusterError, check_machine
from tools.experiments import (
    MEASURED_FILE,
    ROOT,
    Entry,
    Experiment,
    Result,
    add_result,
    code,
    read_experiment,
    read_results,
    sort_results,
)
from tools.later_rows import write_later_rows
from tools.paper_report import is_drawn, outcomes_of, report_of
from tools.paper_tables import as_csv, draw

EXPERIMENTS, RESULTS, REPORT = ROOT / "recipes/experiments", ROOT / "recipes/results", ROOT / "recipes/RESULTS.md"
GROUPS = {
    "table1": "the paper's table 1", "table2": "the paper's table 2", "table3": "the paper's table 3",
    "scaling": "the scaling curve", "fine_tuning": "fine-tuning",
    "common_optimizations": "the paper's common optimizations, on two nodes of this machine",
}  # fmt: skip
"""Commands that run the experiments whose files begin with their name."""
FIGURE6 = "tools/bench/sharding.py"
RANKS_PER_NODE = 2
TINY = {"max_steps": 3, "eval_steps": 1}
LOG, PACKAGES = "log.txt", ("torch", "deepspeed", "fbgemm")


def main() -> int:
    """Exit status: 0; 1 after a failed run or a mistake; 130 if interrupted."""
    if sys.argv[1:2] == ["figure6"]:
        return subprocess.run([sys.executable, ROOT / FIGURE6, *sys.argv[2:]]).returncode
    arguments = parse_arguments()
    try:
        return arguments.command(arguments)
    except (ValueError, OSError, ClusterError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("paper: interrupted. Only the runs in progress are lost; the same command goes on.", file=sys.stderr)
        return 130


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="|".join(["run", *GROUPS, "figure6", "report"]))
    run = commands.add_parser("run", help="train what has no result yet")
    run.add_argument("experiment", type=_path, help="a file of recipes/experiments")
    run.set_defaults(command=run_experiment)
    _add_options_of_runs(run)
    for name, what in GROUPS.items():
        group = commands.add_parser(name, help=f"run the experiments of {what}")
        group.add_argument("--data", help="the last word of an experiment's name; default: all")
        group.set_defaults(command=run_group, group=name)
        _add_options_of_runs(group)
    commands.add_parser("figure6", help=f"run {FIGURE6}")
    report = commands.add_parser("report", help="write recipes/RESULTS.md")
    report.add_argument("--output", type=_path, default=REPORT, metavar="FILE", help="default: recipes/RESULTS.md")
    report.add_argument("--results", type=_path, metavar="FOLDER", help="default: recipes/results")
    report.set_defaults(command=write_report)
    return parser.parse_args()


def _add_options_of_runs(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--entries", type=lambda text: text.split(","), metavar="A,B", help="default: all")
    add("--seeds", type=_count, help="runs per entry; default: as the experiment says")
    add("--first_seed", type=lambda text: _count(text, 0), default=0, metavar="SEED", help="default: %(default)s")
    add("--jobs", type=_count, default=1, help="runs at the same time; default: %(default)s")
    add("--nproc", type=_count, default=1, help="ranks per run, with the same global batch; default: %(default)s")
    add("--budget", choices=["full", "tiny"], default="full", help="tiny: one seed, 3 steps, a new folder of results")
    add("--keep", action="store_true", help="keep the run folders; those of failed runs are kept anyway")
    add("--runs", type=_path, default=ROOT / "runs/experiments", metavar="FOLDER", help="default: runs/experiments")
    add("--results", type=_path, metavar="FOLDER", help="default: recipes/results")


def _path(text: str) -> Path:
    return Path(text).absolute()


def _count(text: str, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number of {least} or more")
    return int(text)


def run_group(call: argparse.Namespace) -> int:
    """Run the experiments of a group. Exit status: 0, or 1 if a run failed."""
    files = sorted(EXPERIMENTS.glob(f"{call.group}_*.yaml"))
    check_names("data", [] if call.data is None else [call.data], sorted({_data_of(file) for file in files}))
    chosen = [file for file in files if call.data in (None, _data_of(file))]
    return max(run_experiment(argparse.Namespace(**vars(call), experiment=file)) for file in chosen)


def _data_of(file: Path) -> str:
    return file.stem.rpartition("_")[2]


@dataclass(frozen=True)
class _Run:
    """A run to do. result: its line, without figures. base: folder of the run whose model it starts from."""

    result: Result
    command: list[str]
    folder: Path
    base: Path | None

    @classmethod
    def of(cls, call: argparse.Namespace, experiment: Experiment, entry: Entry, seed: int, words: list[str]) -> "_Run":
        """The run of an entry with a seed. words: of `_arguments`."""
        ranks = _ranks(call, experiment)
        result = Result(entry.name, seed, experiment.digest(entry), experiment.changes(entry), ranks=ranks)
        folder = _run_folders(call) / f"{entry.name}-{seed}"
        base = _run_folders(call) / f"{entry.starts_from}-{seed}" if entry.starts_from else None
        start = ["recipes/train.py"]
        if experiment.nodes:
            cluster = ["tools/cluster.py", f"--nodes={experiment.nodes}", f"--ranks_per_node={RANKS_PER_NODE}"]
            start = [*cluster, "--link_mbit=0", "--local_mbit=0", "tools/measured_train.py"]
        elif ranks > 1:
            start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *start]
        command = [sys.executable, *start, *words]
        command += [f"--seed={seed}", "--overwrite_output_dir", f"--output_dir={folder}"]
        return cls(result, command + ([f"--model_name_or_path={base}"] if base else []), folder, base)


def run_experiment(call: argparse.Namespace) -> int:
    """Do the runs that have no line yet. Exit status: 0, or 1 if one failed."""
    os.chdir(ROOT)  # relative paths in a recipe begin here
    name, experiment = call.experiment.stem, read_experiment(call.experiment)
    check_names("entry", call.entries or [], [entry.name for entry in experiment.entries])
    if experiment.nodes and call.nproc > 1:
        raise ValueError(f"{call.experiment} runs on {experiment.nodes} nodes of two ranks. Leave out --nproc.")
    if experiment.nodes:
        check_machine()
    results = call.results or RESULTS
    if call.budget == "tiny":
        tiny = TINY | _small_log({**experiment.recipe, **experiment.arguments}.get("dataset_name"))
        entries = [
            replace(entry, seeds=1, arguments={} if entry.runs_of else entry.arguments | tiny)
            for entry in experiment.entries
        ]
        experiment, results = replace(experiment, entries=entries), call.results or Path(tempfile.mkdtemp())
    file = results / f"{name}.jsonl"
    if experiment.rows:
        write_later_rows(experiment.rows, _rows_folder(call))
    outcome = sort_results(experiment, read_results(file))
    for result in outcome.stale:
        print(f"{name}: stale: {result.entry}, seed {result.seed}, ran with other arguments")
    runs = []
    for entry in (each for each in experiment.entries if not each.runs_of):
        words = _arguments(call, experiment, entry)  # all entries are checked before any is run
        for seed in range(call.first_seed, call.first_seed + (call.seeds or entry.seeds or experiment.seeds)):
            if seed in outcome.by_entry[entry.name]:
                print(f"{name}: skipped: {entry.name}, seed {seed}, has its line")
            elif entry.name in (call.entries or [entry.name]):
                if base := experiment.base_of(entry):
                    _add_base(runs, call, experiment, base, seed)
                runs.append(_Run.of(call, experiment, entry, seed, words))
    runs.sort(key=lambda run: run.result.seed)  # the entries take turns
    print(f"{name}: {len(runs)} runs to do; results go to {file}", flush=True)
    num_failed = 0
    for number, result in enumerate(_finished(call, runs), 1):
        if result.seed not in outcome.by_entry[result.entry]:  # else its model was needed again
            add_result(file, result)
        num_failed += bool(result.error)
        what = ", ".join(f"{key} {result.metric(key) or math.nan:.5f}" for key in ("auc", "ne"))
        what = f"failed: {result.error}" if result.error else f"test {what}; {result.cpu_seconds / 60:.1f} CPU minutes"
        print(f"{name}: {number}/{len(runs)}: {result.entry}, seed {result.seed}: {what}", flush=True)
    return int(num_failed > 0)


def _add_base(runs: list[_Run], call: argparse.Namespace, experiment: Experiment, base: Entry, seed: int) -> None:
    """Train the model that another entry starts from, unless this call trains it anyway."""
    if not any((run.result.entry, run.result.seed) == (base.name, seed) for run in runs):
        runs.append(_Run.of(call, experiment, base, seed, _arguments(call, experiment, base)))


def _ranks(call: argparse.Namespace, experiment: Experiment) -> int:
    """Ranks per run."""
    return experiment.nodes * RANKS_PER_NODE if experiment.nodes else call.nproc


def _rows_folder(call: argparse.Namespace) -> Path:
    return _run_folders(call) / "rows"


def _small_log(name: Any) -> dict[str, str]:
    """The arguments that put a small log in the place of a generated one."""
    kind = next((kind for kind in RECIPES if str(name).partition("-")[0] == kind), None)
    return {"dataset_name": f"{kind}-10k"} if kind else {}


def _run_folders(call: argparse.Namespace) -> Path:
    """Where the experiment's run folders are. Relative, because the errors of failed runs name it in the report."""
    return Path(os.path.relpath(call.runs / call.experiment.stem))


def _arguments(call: argparse.Namespace, experiment: Experiment, entry: Entry) -> list[str]:
    """Write the entry's YAML beside its run folders and return the words of the command that name it.

    Raises ValueError, which names the file and the entry, if recipes/train.py would refuse it.
    """
    from dhen.config.arguments import parse_arguments as parse_training  # imports torch, which a report does without

    values = experiment.recipe | experiment.changes(entry)
    folder = str(_rows_folder(call))
    values = {
        key: value.replace("{rows}", folder) if isinstance(value, str) else value for key, value in values.items()
    }
    batch, ranks = values.get("per_device_train_batch_size"), _ranks(call, experiment)
    if batch is not None:
        if batch % ranks:
            raise ValueError(f"{ranks} ranks do not divide {entry.name}'s batch of {batch}. Use another --nproc.")
        values["per_device_train_batch_size"] = batch // ranks
    file = _run_folders(call) / f"{entry.name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_yaml(values, file)
    ds_config = entry.ds_config or experiment.ds_config
    if entry.ds_config_changes:
        ds_config = file.with_suffix(".json")
        ds_config.write_text(json.dumps(experiment.ds_config_of(entry)), encoding="utf-8")
    words = [f"--ds_config={ds_config}", f"--config={file}"]
    try:
        parse_training(words)
    except ValueError as error:
        raise ValueError(f"{call.experiment}: entry {entry.name}: {error}") from error
    return words


def _finished(call: argparse.Namespace, runs: Sequence[_Run]) -> Iterator[Result]:
    """Do the runs, --jobs at a time, and yield the result of each as it ends. If interrupted, end those in progress."""
    waiting, done = list(runs), set()
    running: dict[int, tuple[subprocess.Popen, _Run, float]] = {}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            to_come = {run.folder for run in (*waiting, *(run for _, run, _ in running.values()))}
            ready = [run for run in waiting if run.base not in to_come]
            for run in ready[: call.jobs - len(running)]:
                waiting.remove(run)
                shutil.rmtree(run.folder, ignore_errors=True)  # the model of an earlier call is not this run's
                run.folder.mkdir(parents=True)
                run = replace(run, result=replace(run.result, **code()))
                with _uninterrupted(), (run.folder / LOG).open("w") as log:
                    files = {"stdout": log, "stderr": log}
                    # In a session of its own: Ctrl-C reaches this process alone.
                    process = subprocess.Popen(run.command, **files, env=environment, start_new_session=True)
                    running[process.pid] = process, run, time.monotonic()
            pid, status, usage = os.wait4(-1, 0)  # the only call that says what one child used
            if pid not in running:  # an orphan that this process adopted
                continue
            process, run, start = running.pop(pid)
            process.returncode = os.waitstatus_to_exitcode(status)
            used = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "seconds": time.monotonic() - start}
            yield replace(run.result, **used, **_found(run.folder, process.returncode))
            if process.returncode:
                failed = [each for each in waiting if each.base == run.folder]
                waiting = [each for each in waiting if each not in failed]
                yield from (replace(each.result, error=f"{run.folder} failed, whose model it needs") for each in failed)
            else:
                done.add(run.folder)
            needed = {each.base for each in (*waiting, *(each for _, each, _ in running.values()))}
            for folder in () if call.keep else done - needed:
                shutil.rmtree(folder)
                done.remove(folder)
    finally:
        for pid, (process, *_) in running.items():
            os.killpg(pid, signal.SIGTERM)
            process.wait()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let SIGINT and SIGTERM wait for the end of this block, so that no run is started and then forgotten."""
    arrived: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: arrived.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
        if arrived:
            raise KeyboardInterrupt


def _found(folder: Path, status: int) -> dict[str, Any]:
    """What a run that ended left in its folder: figures, or its error."""
    log = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    if status:
        lines = [line for line in log.splitlines() if line.strip()] or ["it printed nothing"]
        said = next((line for line in lines if line.startswith("error: ")), lines[-1])
        return {"error": f"status {status}, {folder / LOG}: {said[:300]}"}
    summary, environment = (json.loads((folder / name).read_text()) for name in ("summary.json", "environment.json"))
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "validation"]
    metrics = {split: summary.get(split, {}) for split in ("eval", "test")}
    measured = folder / MEASURED_FILE
    return {
        "measured": json.loads(measured.read_text()) if measured.is_file() else {},
        "versions": {name: version for name, version in environment["versions"].items() if name.startswith(PACKAGES)},
        "cpu": environment["cpu"] or "",
        "dense_weights": int(re.search(r"([\d,]+) dense weights", log)[1].replace(",", "")),
        "evaluations": [[_number(row[key]) for key in ("samples_seen", "ne", "auc")] for row in rows],
        **{key: summary[key] for key in ("steps", "tested_step", "training_flops_per_sample")},
        **{split: _figures_of(of) for split, of in metrics.items()},
        "tasks": {split: of["tasks"] for split, of in metrics.items() if "tasks" in of},
    }


def _figures_of(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """The metrics of a split that are numbers, and the grouped AUC by each feature."""
    figures = {key: value for key, value in metrics.items() if not isinstance(value, dict)}
    return figures | {f"gauc_{name}": values["gauc"] for name, values in metrics.get("by", {}).items()}


def _number(text: str) -> float | None:
    return float(text) if text and math.isfinite(float(text)) else None


def write_report(call: argparse.Namespace) -> int:
    """Write the report, and the CSV file and the plot of each of the paper's tables. Exit status: 0."""
    results = call.results or RESULTS
    outcomes = outcomes_of(EXPERIMENTS, results)
    call.output.write_text(report_of(outcomes), encoding="utf-8")
    for name, (experiment, outcome) in outcomes.items():
        if is_drawn(experiment) and any(outcome.by_entry.values()):
            (results / f"{name}.csv").write_text(as_csv(experiment, outcome), encoding="utf-8")
            draw(experiment, outcome, results / f"{name}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
