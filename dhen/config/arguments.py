"""What a user may set for a run: in the YAML of --config, or on the command line, which wins."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError
from transformers import HfArgumentParser

from dhen.config.ds_config import AUTO, Recipe
from dhen.model.configuration_dhen import DhenArchitecture
from dhen.model.interactions import import_interactions
from dhen.model.names import unknown_name
from dhen.paths import find, looked_in

ScheduleKind = Literal["constant", "linear", "cosine", "inverse_sqrt", "reduce_lr_on_plateau"]
ScalingRule = Literal["none", "linear", "sqrt"]
MetricName = Literal["auc", "ne", "logloss"]
Paths = str | list[str] | None
"""One path, or several: a word, or several words after the flag; a text, or a list in YAML."""


def option(default: Any, meaning: str, **more: Any) -> Any:
    """A field with its default and its line of --help."""
    metadata = {"help": meaning, **more}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Where the click log is and how it becomes ids and numbers."""

    dataset_name: Paths = option(
        None,
        "Prepared folder, raw files, glob or Hugging Face data set; 'quickstart' is a click log that is generated.",
    )
    dataset_format: Literal["auto", "criteo", "libsvm", "csv", "parquet", "hub"] = option(
        "auto", "Format of raw files; auto goes by the file's name."
    )
    dataset_schema: str | None = option(
        None, "YAML that says which column is label, dense, sparse (csv, parquet, hub)."
    )
    train_file: Paths = option(None, "Raw files or glob of the training split, in place of dataset_name.")
    validation_file: Paths = option(None, "Raw files or glob of the validation split.")
    test_file: Paths = option(None, "Raw files or glob of the test split.")
    split_fractions: list[float] = option(
        [0.8, 0.1, 0.1], "Shares of train, validation and test where one file holds all."
    )
    split_order: Literal["random", "sequential"] = option(
        "random", "Rows of each split: by a hash of the row's number, or in the order of the file, the last for test."
    )
    id_encoding: Literal["hash", "vocabulary"] = option("hash", "How sparse values become ids.")
    hash_size: int = option(100_000, "Rows of a table under id_encoding hash.")
    min_count: int = option(1, "Under id_encoding vocabulary, keys seen less often in train share id 0.")
    bad_rows: Literal["error", "skip"] = option("error", "Stop at a malformed row, or skip, count and list it.")
    cache_dir: str | None = option(
        None, "Where raw files are kept once prepared; the default is output_dir/../prepared."
    )


@dataclass
class TrainingArguments:
    """How the model is trained. Names follow Hugging Face's TrainingArguments where they mean the same."""

    output_dir: str | None = option(None, "Run folder; the default is runs/<name of the data>.")
    per_device_train_batch_size: int = option(2048, "Examples of one rank in one micro step.")
    per_device_eval_batch_size: int = option(4096, "Examples of one rank in one evaluation step.")
    gradient_accumulation_steps: int = option(1, "Micro steps for one update of the dense part.")
    num_train_epochs: int = option(1, "Passes over the training split.")
    max_steps: int = option(-1, "Stop after this many updates; -1 leaves it to num_train_epochs.")
    learning_rate: float = option(1e-3, "Peak learning rate of the dense part.")
    table_learning_rate: float = option(0.02, "Peak learning rate of the embedding tables.")
    table_epsilon: float = option(
        1e-8, "Adagrad's epsilon of the tables; 1e-4 and more hold rows back that are rarely seen, against overfitting."
    )
    learning_rate_scaling: ScalingRule = option(
        "none", "Scale both learning rates by global batch / base_batch_size, or by its square root."
    )
    base_batch_size: int = option(
        2048, "Global batch for which the learning rates are given, for learning_rate_scaling."
    )
    warmup_steps: int = option(0, "Updates over which the learning rates rise from 0.")
    lr_scheduler_type: ScheduleKind = option("constant", "Shape of the learning rates after warm-up.")
    min_lr_ratio: float = option(0.0, "Lowest learning rate, as a share of the peak.")
    plateau_factor: float = option(0.1, "reduce_lr_on_plateau: factor at each drop.")
    plateau_patience: int = option(0, "reduce_lr_on_plateau: evaluations without improvement that are let pass.")
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay of the dense part.")
    adam_beta1: float = option(0.9, "Adam's beta1.")
    adam_beta2: float = option(0.999, "Adam's beta2.")
    adam_epsilon: float = option(1e-8, "Adam's epsilon.")
    max_grad_norm: float = option(0.0, "Clip the dense part's gradient norm (not the tables'); 0 is off.")
    whole_table_l2: float = option(
        0.0, "Decay every row of every table by table learning rate times this, each update. For small tables."
    )
    looked_up_l2: float = option(
        0.0, "Add this / 2 times the mean over examples of the squared looked-up embeddings to the loss."
    )
    freeze: Literal["none", "tables", "dense"] = option("none", "Part of the model that keeps its weights.")
    dataloader_drop_last: bool = option(False, "Leave out the last, smaller update of each epoch.")
    overwrite_output_dir: bool = option(False, "Delete the run that output_dir holds, and start anew.")
    model_name_or_path: str | None = option(None, "Start from this trained model: a run folder or an exported model.")
    resume_from_checkpoint: str | None = option(
        None, "Go on from a checkpoint folder, or with 'true' from the newest one of output_dir."
    )
    logging_steps: int = option(20, "Updates between two lines of progress.")
    eval_steps: int = option(0, "Updates between two evaluations on the validation split; 0: after every epoch.")
    save_steps: int = option(0, "Updates between two checkpoints; 0: after every evaluation.")
    save_total_limit: int = option(2, "Checkpoints that are kept, the best one aside.")
    metric_for_best_model: MetricName = option("ne", "Validation metric that says which is best.")
    load_best_model_at_end: bool = option(True, "Test and export the best checkpoint rather than the last weights.")
    early_stopping_patience: int = option(0, "Stop after this many evaluations without a better metric; 0 is off.")
    seed: int = option(0, "Seed of weights, tables, shuffling and dropout.")
    interaction_files: list[str] = option([], "Python files that register interactions of your own.")

    def without_effect(self) -> list[str]:
        """A sentence about each value, other than the default, that nothing reads because of another."""
        is_unread = {
            "plateau_factor": ("lr_scheduler_type", self.lr_scheduler_type != "reduce_lr_on_plateau"),
            "plateau_patience": ("lr_scheduler_type", self.lr_scheduler_type != "reduce_lr_on_plateau"),
            "base_batch_size": ("learning_rate_scaling", self.learning_rate_scaling == "none"),
        }
        default = TrainingArguments.__dataclass_fields__
        return [
            f"{name} has no effect: {other} is {getattr(self, other)}"
            for name, (other, unread) in is_unread.items()
            if unread and getattr(self, name) != default[name].default
        ]


@dataclass(frozen=True)
class Arguments:
    """All arguments of a run."""

    ds_config: str
    data: DataArguments
    architecture: DhenArchitecture
    training: TrainingArguments

    def as_dict(self) -> dict[str, Any]:
        """One flat dictionary: a YAML of it, given to --config, repeats the run."""
        parts = (self.data, self.architecture, self.training)
        return {name: value for part in parts for name, value in dataclasses.asdict(part).items()}

    def recipe(self, world_size: int) -> Recipe:
        """What a ds_config may leave "auto"."""
        training = self.training
        names = [f.name for f in dataclasses.fields(Recipe) if f.name != "world_size"]
        return Recipe(world_size=world_size, **{name: getattr(training, name) for name in names})


_PARTS = (DataArguments, DhenArchitecture, TrainingArguments)


class ArgumentError(ValueError):
    """A wrong argument; the message names the file or flag, the value, and what is allowed."""


def parse_arguments(command_line: Sequence[str] | None = None, *, quickstart: Path | None = None) -> Arguments:
    """Arguments from the command line, else from --config's YAML, else the defaults. Raises ArgumentError.

    quickstart: the YAML that applies where the user names neither --config nor data.
    """
    command_line = sys.argv[1:] if command_line is None else command_line
    known, rest = _launcher_parser(add_help=False).parse_known_args(command_line)
    flags = {flag.split("=")[0].replace("-", "_") for flag in rest}
    # --help is about a run on the user's data, so it shows the defaults of such a run, not the quickstart's.
    if (
        known.config is None
        and quickstart is not None
        and not flags & {"__dataset_name", "__train_file", "__help", "_h"}
    ):
        known.config = str(quickstart)
    parser = Parser(
        [copy_for_parser(part) for part in _PARTS],
        parents=[_launcher_parser(add_help=False)],
        allow_abbrev=False,
        description="Train DHEN. The YAML of --config says what is trained, the ds_config how it fits the machine; a "
        "flag wins over both. Without --config and without data, recipes/configs/quickstart.yaml applies. "
        "Example: deepspeed recipes/train.py --ds_config ds_configs/zero2.json --dataset_name log.csv "
        "--dataset_schema schema.yaml",
    )
    if known.config:
        parser.set_defaults(**_read_yaml(Path(find(known.config))))
    *parts, _launch, unknown = parser.parse_args_into_dataclasses(
        command_line, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise unknown_argument(unknown[0], _PARTS)
    checked = [check_types(part, vars(given), "command line") for part, given in zip(_PARTS, parts, strict=True)]
    data, _, training = checked
    find_paths(data, "dataset_name", "dataset_schema", "train_file", "validation_file", "test_file")
    find_paths(training, "interaction_files", "model_name_or_path", "resume_from_checkpoint")
    training.output_dir = training.output_dir or f"runs/{_name_of(data)}"
    arguments = Arguments(known.ds_config if known.ds_config == AUTO else find(known.ds_config), *checked)
    _check_values(arguments)
    import_interaction_files(arguments.training.interaction_files)
    return arguments


def find_paths(part: Any, *names: str) -> None:
    """Replace each relative path in these fields by the repository's where only the repository has it."""
    for name in names:
        value = getattr(part, name)
        if value is not None:
            setattr(part, name, [find(path) for path in value] if isinstance(value, list) else find(value))


def _name_of(data: DataArguments) -> str:
    """The data's name for its run folder: of a file or glob its first word, of a training file its folder's name."""
    named = data.dataset_name or data.train_file or "quickstart"
    path = Path(named if isinstance(named, str) else named[0])
    word = re.match(r"[\w-]*", path.name).group().strip("_-")
    return word if word and (data.dataset_name or word != "train") else path.resolve().parent.name or "data"


class Parser(HfArgumentParser):
    """HfArgumentParser whose errors are one sentence, not a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise ArgumentError."""
        raise ArgumentError(f"command line: {message}. --help lists all arguments.")


def unknown_argument(flag: str, parts: Sequence[type]) -> ArgumentError:
    """The error about a word of the command line that is no flag of `parts`, with the nearest flag that is."""
    if not flag.startswith("-"):
        return ArgumentError(
            f"command line: {flag!r} belongs to no flag. Write several interactions as one word, for example "
            "linear,self_attention, or as JSON."
        )
    flags = {f"--{f.name}" for part in parts for f in dataclasses.fields(part)} | {"--config", "--ds_config"}
    return ArgumentError(unknown_name("argument", flag.split("=")[0], flags))


def import_interaction_files(paths: Sequence[str]) -> None:
    """Make the user's own interactions known. Raises ArgumentError naming the file."""
    for path in paths:
        try:
            import_interactions(path)
        except ValueError as error:
            raise ArgumentError(f"interaction_files: {error}") from error


def _launcher_parser(**kwargs: Any) -> argparse.ArgumentParser:
    parser = Parser([], allow_abbrev=False, **kwargs)
    parser.add_argument("--config", help="YAML of a recipe, for example recipes/configs/frappe.yaml.")
    parser.add_argument(
        "--ds_config",
        "--deepspeed_config",
        default="ds_configs/zero2.json",
        help="JSON: how the run fits the machine; auto: the planner chooses.",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file. --config takes the YAML of a recipe.{looked_in(path)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path}: not YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ArgumentError(f"{path}: a recipe is a mapping of arguments to values, this is a {type(values).__name__}.")
    allowed = {f.name for part in _PARTS for f in dataclasses.fields(part)}
    for key in values:
        if key not in allowed:
            raise ArgumentError(f"{path}: {unknown_name('argument', str(key), allowed)}")
    if values.get("resume_from_checkpoint") is True:  # a flag takes the word, YAML has a value for it
        values["resume_from_checkpoint"] = "true"
    # Here and not only at the end, where nobody knows what came from the file.
    for part in _PARTS:
        own = {f.name for f in dataclasses.fields(part)} & values.keys()
        checked = check_types(part, {name: values[name] for name in own}, str(path))
        values |= {name: getattr(checked, name) for name in own}
    return values


def copy_for_parser(part: type) -> type:
    """The same dataclass for HfArgumentParser, which overwrites the fields' types with those of their flags."""
    hints = {name: list[str] | None if hint == Paths else hint for name, hint in get_type_hints(part).items()}
    return dataclasses.make_dataclass(
        part.__name__, [(f.name, hints[f.name], _fresh(f)) for f in dataclasses.fields(part)]
    )


def _fresh(given: dataclasses.Field) -> Any:
    return field(default=given.default, default_factory=given.default_factory, metadata=given.metadata)


def check_types(part: type, values: dict[str, Any], where: str) -> Any:
    """The dataclass with every value of its declared type: argparse checks flags, this checks YAML."""
    for name, hint in get_type_hints(part).items():
        if hint in (int, float) and isinstance(values.get(name), bool):
            raise ArgumentError(f"{where}: {name} is {values[name]}. Input should be a number.")
    try:
        checked = TypeAdapter(part).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(step) for step in first["loc"] if not str(step).startswith(("list", "str")))
        raise ArgumentError(f"{where}: {key} is {first['input']!r}. {first['msg']}.") from error
    for name, hint in get_type_hints(part).items():
        value = getattr(checked, name)
        if hint == Paths and isinstance(value, list) and len(value) == 1:  # a flag gives a list of any number
            setattr(checked, name, value[0])
    return checked


def _check_values(arguments: Arguments) -> None:
    training, data = arguments.training, arguments.data
    at_least_one = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
                    "num_train_epochs", "logging_steps", "base_batch_size")  # fmt: skip
    for name in at_least_one:
        if getattr(training, name) < 1:
            raise ArgumentError(f"{name} is {getattr(training, name)}. Use 1 or more.")
    not_negative = ("learning_rate", "table_learning_rate", "warmup_steps", "weight_decay", "max_grad_norm",
                    "whole_table_l2", "looked_up_l2", "table_epsilon", "adam_epsilon", "eval_steps", "save_steps",
                    "early_stopping_patience", "plateau_patience", "min_lr_ratio")  # fmt: skip
    for name in not_negative:
        if getattr(training, name) < 0:
            raise ArgumentError(f"{name} is {getattr(training, name)}. Use 0 or more.")
    if training.max_steps != -1 and training.max_steps < 1:
        raise ArgumentError(f"max_steps is {training.max_steps}. Use 1 or more, or -1 for num_train_epochs.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(training, name) < 1:
            raise ArgumentError(f"{name} is {getattr(training, name)}. Use 0 up to, but not including, 1.")
    if training.resume_from_checkpoint and training.overwrite_output_dir:
        raise ArgumentError(
            "resume_from_checkpoint and overwrite_output_dir are both given: one goes on with the run in output_dir, "
            "the other deletes it."
        )
    if training.freeze == "tables" and (training.looked_up_l2 or training.whole_table_l2):
        raise ArgumentError(
            "looked_up_l2 and whole_table_l2 have no effect on tables that freeze keeps. Set them to 0."
        )
    if training.freeze != "none" and not (training.model_name_or_path or training.resume_from_checkpoint):
        raise ArgumentError(
            f"freeze is {training.freeze!r}, but nothing is trained yet: that part would stay as it is drawn at "
            "random. Give --model_name_or_path or --resume_from_checkpoint, or leave it out."
        )
    if training.save_total_limit < 1:
        raise ArgumentError(f"save_total_limit is {training.save_total_limit}. Use 1 or more.")
    if data.train_file and data.dataset_name:
        raise ArgumentError("dataset_name and train_file are both given. dataset_name holds all splits, or give files.")
    if (data.validation_file or data.test_file) and not data.train_file:
        raise ArgumentError("validation_file or test_file is given without train_file.")


def write_yaml(values: dict[str, Any], path: Path) -> None:
    """Write resolved arguments as a YAML that --config accepts."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
