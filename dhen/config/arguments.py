"""The arguments of a training run: set in the YAML of --config or on the command line, which overrides the YAML."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dhen.config.command_line import (
    ArgumentError,
    Parser,
    check_types,
    find_paths,
    flags_of,
    say_what_repeats,
)
from dhen.config.data_arguments import DataArguments
from dhen.config.ds_config import AUTO, Recipe
from dhen.config.training_arguments import ADAM_TABLE_LEARNING_RATE, LEARNING_RATES, TrainingArguments
from dhen.model.configuration_dhen import DhenArchitecture
from dhen.model.interactions import import_interactions
from dhen.model.names import quoted, unknown_name
from dhen.paths import find
from dhen.yaml_files import read_yaml

ARGUMENTS_FILE = "arguments.yaml"
"""Name of the file in a run folder with all arguments of the run."""


@dataclass(frozen=True)
class Arguments:
    """All arguments of a run. check: only check that it can start."""

    ds_config: str
    data: DataArguments
    architecture: DhenArchitecture
    training: TrainingArguments
    check: bool = False

    def as_dict(self) -> dict[str, Any]:
        """All arguments in one flat dictionary. Written as YAML and given to --config, it repeats the run."""
        parts = (self.data, self.architecture, self.training)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def recipe(self, world_size: int) -> Recipe:
        return Recipe(self.training, world_size)


_TRACKERS = {"tensorboard": None, "wandb": "wandb", "mlflow": "mlflow-skinny", "none": None}
"""By tracker, the package that training does not need."""
_PARTS = {"data": DataArguments, "model": DhenArchitecture, "training": TrainingArguments}


def parse_arguments(
    command_line: Sequence[str] | None = None, *, quickstart: Path | None = None, description: str | None = None
) -> Arguments:
    """Read the arguments. The command line overrides the YAML of --config, which overrides the defaults.

    quickstart: the YAML to use if the user names neither --config nor data. description: the text above --help.
    Raises ArgumentError.
    """
    command_line = sys.argv[1:] if command_line is None else command_line
    launch, rest = _launch_parser().parse_known_args(command_line)
    if launch.config is None and quickstart is not None and not _names_data_or_help(rest):
        launch.config = str(quickstart)
    parser = Parser(
        _PARTS,
        parents=[_launch_parser()],
        usage="%(prog)s [--ds_config FILE] [--config FILE] [--argument VALUE ...]",
        description=description,
    )
    if launch.config:
        parser.set_defaults(**_read_recipe(find(launch.config)))
    parts = parser.parse(command_line)
    say_what_repeats(command_line)
    ds_config = launch.ds_config if launch.ds_config == AUTO else find(launch.ds_config)
    arguments = Arguments(ds_config, *parts, launch.check)
    _resolve_paths(arguments)
    _choose_learning_rates(arguments.training)
    _check_combinations(arguments.training, arguments.data)
    import_interaction_files(arguments.training.interaction_files)
    return arguments


def _launch_parser() -> argparse.ArgumentParser:
    parser = Parser({}, add_help=False)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file that says what to train: any of the arguments below. Example: recipes/configs/frappe.yaml.",
    )
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        metavar="FILE",
        default="ds_configs/zero2.json",
        help="DeepSpeed JSON file that says how the run fits the machine. ds_configs/README.md helps to choose. With "
        "auto, the planner chooses the memory techniques.",
    )
    parser.add_argument("--check", action="store_true", help="Train nothing: check the set-up and estimate the time.")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def _names_data_or_help(words: Sequence[str]) -> bool:
    """Whether the user names data of their own. --help counts too: it shows the defaults for the user's own data."""
    return "-h" in words or not {"--dataset_name", "--train_file", "--help"}.isdisjoint(flags_of(words))


def _resolve_paths(arguments: Arguments) -> None:
    data, training = arguments.data, arguments.training
    find_paths(data, "dataset_name", "dataset_schema", "train_file", "validation_file", "test_file")
    find_paths(training, "interaction_files", "model_name_or_path")
    training.output_dir = training.output_dir or f"runs/{_name_of(data)}"


def _choose_learning_rates(training: TrainingArguments) -> None:
    of_adam = {"table_learning_rate": ADAM_TABLE_LEARNING_RATE} if training.table_optimizer == "adam" else {}
    for name, rate in (LEARNING_RATES | of_adam).items():
        if getattr(training, name) is None:
            setattr(training, name, rate / 3 if training.model_name_or_path else rate)


def _name_of(data: DataArguments) -> str:
    """Name for the run folder: the first word of the data's file or folder; for train* and globs, of its folder.

    Never "prepared", where prepared data is kept beside the run folders.
    """
    named = data.dataset_name or data.train_file or "quickstart"
    path = Path(os.path.abspath(named if isinstance(named, str) else named[0]))
    words = [re.match(r"[\w-]*", name).group().strip("_-") for name in (path.name, path.parent.name)]
    is_generic = re.compile(r"(train([-_\d].*)?|prepared)?", re.IGNORECASE)
    return next((word for word in words if not is_generic.fullmatch(word)), "data")


def import_interaction_files(paths: Sequence[str]) -> None:
    """Import the Python files that register the user's interactions. Raises ArgumentError naming the file."""
    for path in paths:
        try:
            import_interactions(path)
        except ValueError as error:
            raise ArgumentError(f"interaction_files: {error}") from error


def _read_recipe(path: str) -> dict[str, Any]:
    """Read and check a recipe. Types are checked here, where an error can still name the file."""
    try:
        values = read_yaml(path, "--config takes a YAML file of arguments.")
    except (OSError, ValueError) as error:
        raise ArgumentError(str(error)) from error
    allowed = {f.name for part in _PARTS.values() for f in dataclasses.fields(part)}
    for key in values:
        if key not in allowed:
            raise ArgumentError(f"{path}: {unknown_name('argument', str(key), allowed)}")
    if values.get("resume_from_checkpoint") is True:  # the argument is a string, but YAML reads true as a bool
        values["resume_from_checkpoint"] = "true"
    for part in _PARTS.values():
        own = {f.name for f in dataclasses.fields(part)} & values.keys()
        checked = check_types(part, {name: values[name] for name in own}, path)
        values |= {name: getattr(checked, name) for name in own}
    return values


def trackers_of(training: TrainingArguments) -> tuple[str, ...]:
    """The names of --report_to, without "none". Raises ArgumentError about one that is unknown, or not installed."""
    given = training.report_to or []
    names = (given,) if isinstance(given, str) else tuple(given)
    for name in names:
        if name not in _TRACKERS:
            raise ArgumentError(f"report_to: {unknown_name('tracker', name, _TRACKERS)}")
        if name == "none" and len(names) > 1:
            raise ArgumentError(f"report_to is {', '.join(names)}. Use none alone, or leave it out.")
        if _TRACKERS[name] and find_spec(name) is None:
            raise ArgumentError(f"report_to: {name} is not installed. Run: pip install {_TRACKERS[name]}")
    return () if names == ("none",) else names


def _check_combinations(training: TrainingArguments, data: DataArguments) -> None:
    trackers_of(training)
    if training.max_steps == 0:
        raise ArgumentError("max_steps is 0. Use 1 or more, or -1 for num_train_epochs.")
    if training.resume_from_checkpoint and training.overwrite_output_dir:
        raise ArgumentError(
            "resume_from_checkpoint and overwrite_output_dir are both set. Use the first to continue the run in "
            "output_dir, or the second to delete it."
        )
    for name in ("looked_up_l2", "whole_table_l2", "new_row_learning_rate") if training.freezes("tables") else ():
        if value := getattr(training, name):
            raise ArgumentError(
                f"freeze is {quoted(training.freeze)}, so {name} {value} would have no effect. Remove it, or thaw the "
                "tables; to train new rows only, set table_learning_rate to 0 instead."
            )
    if training.new_head and training.freezes("dense"):
        raise ArgumentError(
            f"freeze is {quoted(training.freeze)}, so the head of new_head would stay random. Freeze the parts below "
            "it instead: features and layers, such as features,layers:0-2."
        )
    of_fine_tuning = {"freeze": "none", "new_row_learning_rate": None, "new_head": False}
    of_fine_tuning |= {"keep_optimizer": False, "write_delta": False}
    for name, unset in of_fine_tuning.items():
        value, is_resumed = getattr(training, name), name == "freeze" and training.resume_from_checkpoint
        if value != unset and not (training.model_name_or_path or is_resumed):
            raise ArgumentError(
                f"{name} is {quoted(value)}, but there is no trained model to start from. Add --model_name_or_path, or "
                f"remove {name}."
            )
    if data.train_file and data.dataset_name:
        raise ArgumentError(
            "dataset_name and train_file are both set. Use dataset_name, or train_file, validation_file and test_file."
        )
    if (data.validation_file or data.test_file) and not data.train_file:
        raise ArgumentError("validation_file or test_file is set without train_file. Add train_file.")
