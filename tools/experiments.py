"""Experiments: the files that say what is run, and the lines of their results."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from dhen.model.names import first_mistake, unknown_name
from dhen.model.ranges import Count
from dhen.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[1]
_SET_BY_THE_TOOL = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
_DECIDE_NOTHING = {*_SET_BY_THE_TOOL, "cache_dir", "logging_steps", "save_total_limit"}
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_Name = Annotated[str, StringConstraints(pattern=r"^\w+$")]
_Text = Annotated[str, StringConstraints(pattern=r"^[^\n|]+$")]
"""On one line, and no end of a table's cell."""
MEASURED_FILE = "measured.json"
ROWS_VERSION = 1
"""Of the rows that tools/later_rows.py writes."""
_Figure = Annotated[float, Field(strict=True)] | None


@checked_dataclass(frozen=True, config=_STRICT)
class Quoted:
    """Figures of the test split that others measured: as published, or with another library on the same rows."""

    name: _Text
    source: _Text
    auc: _Figure = None
    ne: _Figure = None
    logloss: _Figure = None
    calibration: _Figure = None


@checked_dataclass(frozen=True, config=_STRICT)
class Entry:
    """A set-up that is run once per seed.

    seeds, ds_config: None for the experiment's. ds_config_changes: to keys of the ds_config, or to keys of its
    sections. arguments: of the run. paper: the paper's NE differences in percent, at the experiment's paper_points.
    family: of a scaling curve. starts_from: the entry whose model of the same seed is fine-tuned. against: entries that
    this one is compared with. task: one of the further tasks of the entry runs_of; this entry is not run, but shows the
    task's figures in those runs.
    """

    name: _Name
    title: _Text
    seeds: Count | None = None
    ds_config: str | None = None
    ds_config_changes: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    paper: list[float] = field(default_factory=list)
    family: _Text | None = None
    starts_from: str | None = None
    against: list[str] = field(default_factory=list)
    runs_of: str | None = None
    task: _Name | None = None


_KINDS = {"published": Quoted, "peers": Quoted, "entries": Entry}


@checked_dataclass(frozen=True, config=_STRICT)
class Experiment:
    """A file in recipes/experiments.

    title, data, goals, reading: for the report; reading says what the figures show. config: the recipe's YAML. seeds:
    runs per entry. arguments: override the recipe in all entries. published, peers: rows that are quoted and never run.
    The first entry is the one that others are compared with. paper_points: the points of training that the paper's
    table reports; the report then has its layout. rows: a data set of tools/later_rows.py, whose folder the arguments
    name as {rows}. nodes: how many of tools/cluster.py, of two ranks each; the runs are measured by
    tools/measured_train.py.
    """

    title: _Text
    data: _Text
    config: str
    ds_config: str
    seeds: Count
    entries: Annotated[list[Entry], Field(min_length=1)]
    arguments: dict[str, Any] = field(default_factory=dict)
    published: list[Quoted] = field(default_factory=list)
    peers: list[Quoted] = field(default_factory=list)
    goals: _Text | None = None
    reading: _Text | None = None
    paper_points: list[_Text] = field(default_factory=list)
    rows: str | None = None
    nodes: Count | None = None

    def __post_init__(self) -> None:
        """Raises ValueError, which names the key."""
        names = [entry.name for entry in self.entries]
        if len(set(names)) < len(names):
            raise ValueError(f"entries: two of {', '.join(names)} have the same name. Rename one.")
        for entry in self.entries:
            if bool(entry.runs_of) != bool(entry.task) or (entry.task and entry.arguments):
                raise ValueError(f"entry {entry.name}: runs_of and task go together, and without arguments.")
            if entry.paper and len(entry.paper) != len(self.paper_points):
                counts = f"{len(entry.paper)} figures for {len(self.paper_points)} paper_points"
                raise ValueError(f"entry {entry.name}: paper has {counts}. Use one for each.")
        for number, entry in enumerate(self.entries):
            trained = [each.name for each in self.entries[:number] if each.starts_from is None]
            others = [("entry in against", name, names) for name in entry.against]
            others += [("entry in starts_from", name, trained) for name in [entry.starts_from] if name]
            others += [("entry in runs_of", name, trained) for name in [entry.runs_of] if name]
            for what, name, allowed in others:
                if name not in allowed:
                    raise ValueError(f"entry {entry.name}: {unknown_name(what, name, allowed)}")
        for values in (self.arguments, *(entry.arguments for entry in self.entries)):
            if wrong := values.keys() & set(_SET_BY_THE_TOOL):
                raise ValueError(f"arguments: {sorted(wrong)[0]} is set by the tool. Remove it.")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The arguments in the recipe's YAML."""
        return read_yaml(ROOT / self.config)

    def changes(self, entry: Entry) -> dict[str, Any]:
        """The entry's arguments that differ from the recipe."""
        values = self.arguments | entry.arguments
        return {key: value for key, value in values.items() if key not in self.recipe or self.recipe[key] != value}

    def progress(self, entry: Entry, done: int) -> str:
        """How many of its seeds are done."""
        needed = entry.seeds or self.seeds
        return "not run" if not done else str(done) if done >= needed else f"{done} of {needed}"

    def base_of(self, entry: Entry) -> Entry | None:
        """The entry whose model this one starts from."""
        return next((each for each in self.entries if each.name == entry.starts_from), None)

    def ds_config_of(self, entry: Entry) -> dict[str, Any]:
        """The content of the entry's ds_config. Raises FileNotFoundError."""
        path = ROOT / (entry.ds_config or self.ds_config)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. Use a file of ds_configs as ds_config.")
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, value in entry.ds_config_changes.items():
            content[key] = content.get(key, {}) | value if isinstance(value, dict) else value
        return content

    def digest(self, entry: Entry) -> str:
        """A digest of all that decides the entry's results: arguments, and the contents of ds_config and schema; also
        those of the entry that it starts from.
        """
        values = {
            key: value for key, value in (self.recipe | self.changes(entry)).items() if key not in _DECIDE_NOTHING
        }
        files: list[Any] = [self.ds_config_of(entry)]
        if "dataset_schema" in values:
            files.append(read_yaml(ROOT / values["dataset_schema"]))
        if self.rows:
            files.append([self.rows, ROWS_VERSION])
        if self.nodes:
            files.append(["nodes", self.nodes])
        if base := self.base_of(entry):
            files.append(self.digest(base))
        return hashlib.sha256(json.dumps([values, files], sort_keys=True, default=str).encode()).hexdigest()[:16]


@checked_dataclass(frozen=True, config=ConfigDict(extra="ignore", allow_inf_nan=False))
class Result:
    """One line of recipes/results: a run that ended. error: why it failed; it then has no figures.

    arguments: that differ from the recipe. is_dirty: the code differed from the commit. cpu_seconds: of all ranks.
    eval, test: metrics as in summary.json; tasks: those of further tasks, by split and task. evaluations: [samples
    seen, NE, AUC] on the validation split. measured: what tools/measured_train.py measured, for runs on nodes. Keys of
    other versions are ignored.
    """

    entry: str
    seed: int
    digest: str
    arguments: dict[str, Any]
    ranks: int
    commit: str | None = None
    is_dirty: bool = False
    error: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    cpu: str = ""
    cpu_seconds: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    tested_step: int = 0
    dense_weights: int = 0
    training_flops_per_sample: int | None = None
    eval: dict[str, _Figure] = field(default_factory=dict)
    test: dict[str, _Figure] = field(default_factory=dict)
    tasks: dict[str, dict[str, dict[str, _Figure]]] = field(default_factory=dict)
    evaluations: list[list[_Figure]] = field(default_factory=list)
    measured: dict[str, float] = field(default_factory=dict)

    def metric(self, name: str, split: str = "test") -> _Figure:
        """A metric of a split, None if it does not exist. ne_over_best: NE divided by the best possible NE."""
        values = getattr(self, split)
        if name == "ne_over_best":
            ne, best = values.get("ne"), values.get("best_possible_ne")
            return ne / best if ne and best else None
        return values.get(name)

    def of_task(self, name: str) -> "Result":
        """The same run with the metrics of a further task in place of the label's."""
        of = {split: self.tasks.get(split, {}).get(name, {}) for split in ("eval", "test")}
        return replace(self, **of, evaluations=[])


def read_experiment(path: Path) -> Experiment:
    """Read an experiment. Raises FileNotFoundError or ValueError, which names the file and the key."""
    return _checked(Experiment, read_yaml(path, "Name a file of recipes/experiments."), str(path))


def read_results(path: Path) -> list[Result]:
    """The lines of a file of results, which may not exist yet. Raises ValueError, which names the line."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    results = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}: line {number} is not JSON. Delete it, and repeat the run.") from error
        results.append(_checked(Result, values, f"{path}: line {number}"))
    return results


def add_result(path: Path, result: Result) -> None:
    """Append a line, as one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result), allow_nan=False) + "\n")


def _checked(kind: Any, values: Any, where: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        place = error.errors()[0]["loc"]
        kind = _KINDS.get(place[0], kind) if place[1:] else kind
        raise ValueError(f"{where}: {first_mistake(error, known=kind.__dataclass_fields__)}") from error


class Outcome(NamedTuple):
    """An experiment's results, sorted. by_entry: entry -> seed -> its first finished run with today's arguments."""

    by_entry: dict[str, dict[int, Result]]
    failed: list[Result]
    stale: list[Result]


def sort_results(experiment: Experiment, results: Sequence[Result]) -> Outcome:
    """Sort results into those of the experiment as it is, failures without a later success, and stale lines."""
    # Without results, the recipe need not be read.
    digests = {entry.name: experiment.digest(entry) for entry in experiment.entries} if results else {}
    by_entry, failed, stale = {entry.name: {} for entry in experiment.entries}, [], []
    for result in results:
        if digests.get(result.entry) != result.digest:
            stale.append(result)
        elif result.error:
            failed.append(result)
        else:
            by_entry[result.entry].setdefault(result.seed, result)
    for entry in experiment.entries:
        if entry.runs_of and entry.task:
            by_entry[entry.name] = {seed: run.of_task(entry.task) for seed, run in by_entry[entry.runs_of].items()}
    return Outcome(by_entry, [each for each in failed if each.seed not in by_entry[each.entry]], stale)


def code(folder: Path = ROOT) -> dict[str, Any]:
    """The commit of a folder, None outside a git repository, and whether the code that trains differs from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, cwd=folder).stdout.strip()

    is_dirty = bool(git("status", "--porcelain", "--", "dhen", "recipes/*.py"))
    return {"commit": git("rev-parse", "HEAD") or None, "is_dirty": is_dirty}
