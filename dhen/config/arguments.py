"""The arguments of a training run: set in the YAML of --config or on the command line, which overrides the YAML."""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dhen.config.command_line import (
    ArgumentError,
    Parser,
    Paths,
    Text,
    check_types,
    copy_for_parser,
    find_paths,
    flags_of,
    option,
    say_what_repeats,
    unknown_argument,
)
from dhen.config.ds_config import AUTO, Recipe
from dhen.model import ranges
from dhen.model.configuration_dhen import DhenArchitecture
from dhen.model.interactions import import_interactions
from dhen.model.names import unknown_name
from dhen.paths import find
from dhen.yaml_files import read_yaml

ARGUMENTS_FILE = "arguments.yaml"
"""Name of the file in a run folder with all arguments of the run."""
DatasetFormat = Literal["auto", "criteo", "libsvm", "csv", "parquet", "hub"]
ScheduleKind = Literal["constant", "linear", "cosine", "inverse_sqrt", "reduce_lr_on_plateau"]
ScalingRule = Literal["none", "linear", "sqrt"]
MetricName = Literal["auc", "ne", "logloss"]


LEARNING_RATES = {"learning_rate": 1e-3, "table_learning_rate": 0.05}
"""The defaults, without a trained model to start from."""


@dataclass
class DataArguments:
    """Where the click log is, and how its values become ids and numbers."""

    dataset_name: Paths = option(
        None,
        "Data to train on: raw files, globs, a prepared folder, or a Hugging Face data set (owner/name). 'quickstart' "
        "generates a click log.",
    )
    dataset_format: DatasetFormat = option(
        "auto",
        "Format of the raw files. auto decides by the file's name and its first bytes and, for .txt and .tsv, by its "
        "first line.",
    )
    dataset_schema: Text | None = option(
        None,
        "YAML file that says which columns are the label, dense features and sparse features. csv, parquet and hub "
        "require it. recipes/configs/schemas has examples.",
    )
    train_file: Paths = option(
        None,
        "Raw files or globs of the training split. Use instead of --dataset_name if each split has its own files.",
    )
    validation_file: Paths = option(None, "Raw files or globs of the validation split. Requires --train_file.")
    test_file: Paths = option(None, "Raw files or globs of the test split. Requires --train_file.")
    split_fractions: list[ranges.Share] = option(
        [0.8, 0.1, 0.1],
        "Fractions of rows for train, validation and test. They must sum to 1. Ignored if the data has its own splits.",
    )
    split_order: Literal["random", "sequential"] = option(
        "random",
        "How to assign rows to splits. random: by a hash of the row number. sequential: in file order, the first rows "
        "to train and the last to test; use it for logs in time order.",
    )
    id_encoding: Literal["auto", "hash", "vocabulary"] = option(
        "auto",
        "How sparse values become table rows. hash: one pass over the data; different values may share a row. "
        "vocabulary: one more pass; each value gets its own row. auto: a vocabulary for features with up to a million "
        "values, and the hash for others, or for all if hash_size is given; with --model_name_or_path, as in the "
        "trained model.",
    )
    hash_size: ranges.HashRows | None = option(
        None,
        "Rows per table of a hashed feature. More rows mean fewer collisions and more memory. Default: 100,000, or a "
        "million where --id_encoding auto chose the hash. With --model_name_or_path, as in the trained model.",
    )
    min_count: ranges.Count | None = option(
        None,
        "With a vocabulary, values seen fewer times than this in the training split share row 0. Default: 1, or with "
        "--model_name_or_path as in the trained model.",
    )
    vocabulary_keys: Literal["union", "new"] = option(
        "union",
        "With --model_name_or_path, the keys of a vocabulary. union: those of the trained model and of the new data. "
        "new: only those of the new data.",
    )
    bad_rows: Literal["error", "skip"] = option(
        "error", "What to do with malformed rows. error: stop at the first. skip: list them in bad_rows.csv."
    )
    cache_dir: Text | None = option(
        None, "Folder for prepared data, which later runs reuse. Default: the folder 'prepared' beside output_dir."
    )


@dataclass
class TrainingArguments:
    """How the model is trained. Names that Hugging Face's TrainingArguments also have mean the same there.

    A step is one update of the dense part: `gradient_accumulation_steps` micro steps.
    """

    output_dir: Text | None = option(
        None, "Run folder for checkpoints, metrics and the trained model. Default: runs/<name of the data>."
    )
    per_device_train_batch_size: ranges.Batch | None = option(
        None,
        "Examples per rank in each micro step (one forward and backward pass). Default: a step has about 1/200 of the "
        "training rows, over all ranks: a power of two, at least 64, and at most 2048 per rank.",
    )
    per_device_eval_batch_size: ranges.Batch = option(
        4096, "Examples per rank in each evaluation step. Lower it if evaluation runs out of memory."
    )
    gradient_accumulation_steps: ranges.Size = option(
        1, "Micro steps per step. The dense part is updated once per step, the tables once per micro step."
    )
    num_train_epochs: ranges.Count | None = option(
        None, "Passes over the training split. Default: as many as it takes to make 500 steps, and 1 for large data."
    )
    max_steps: ranges.MaxSteps = option(-1, "Total number of steps. Overrides --num_train_epochs, unless it is -1.")
    learning_rate: ranges.NotNegative | None = option(
        None,
        "Peak learning rate of the dense part: all weights except the tables. Default: 1e-3, and a third of it with "
        "--model_name_or_path, so that the model keeps what it knows.",
    )
    table_learning_rate: ranges.NotNegative | None = option(
        None, "Peak learning rate of the embedding tables. Default: 0.05, and a third of it with --model_name_or_path."
    )
    table_epsilon: ranges.Epsilon = option(
        1e-3,
        "Epsilon of the tables' Adagrad optimizer. A larger value makes the updates of rarely seen rows smaller, which "
        "helps against overfitting. For large data, try 1e-8.",
    )
    learning_rate_scaling: ScalingRule = option(
        "none",
        "Multiply both learning rates by global batch / base_batch_size (linear), or by its square root (sqrt).",
    )
    base_batch_size: ranges.Count = option(
        2048, "Global batch size, in examples, that the learning rates were tuned for. Used by --learning_rate_scaling."
    )
    warmup_steps: ranges.CountFrom0 = option(0, "Steps over which the learning rates rise linearly to their peak.")
    lr_scheduler_type: ScheduleKind = option(
        "cosine",
        "Learning rates after warm-up. constant: stay at the peak. linear, cosine: fall to min_lr_ratio at the end. "
        "inverse_sqrt: fall as 1 / sqrt(steps). reduce_lr_on_plateau: drop when the validation metric stops improving.",
    )
    min_lr_ratio: ranges.Share = option(0.0, "Lower bound of the learning rates, as a fraction of their peak.")
    plateau_factor: ranges.ShareBetween = option(
        0.1, "With reduce_lr_on_plateau, multiply the learning rates by this at each drop."
    )
    plateau_patience: ranges.CountFrom0 = option(
        0, "With reduce_lr_on_plateau, number of evaluations without improvement to tolerate before a drop."
    )
    weight_decay: ranges.NotNegative = option(0.0, "Decoupled weight decay (AdamW), for the dense part.")
    adam_beta1: ranges.ShareBelowOne = option(0.9, "Adam's beta1, for the dense part.")
    adam_beta2: ranges.ShareBelowOne = option(0.999, "Adam's beta2, for the dense part.")
    adam_epsilon: ranges.Epsilon = option(1e-8, "Adam's epsilon, for the dense part.")
    max_grad_norm: ranges.NotNegative = option(
        0.0, "Clip the gradient norm of the dense part to this value. 0 turns clipping off. Tables are not clipped."
    )
    whole_table_l2: ranges.NotNegative = option(
        0.0,
        "L2 decay of the tables: each step multiplies every row by (1 - table learning rate * this value). Use it for "
        "small tables only, because its cost grows with the number of rows.",
    )
    looked_up_l2: ranges.NotNegative = option(
        0.0,
        "L2 penalty on the looked-up embeddings: adds this value / 2 * their squared norm, averaged over examples, to "
        "the loss.",
    )
    freeze: Literal["none", "tables", "dense"] = option(
        "none",
        "Part of the model whose weights stay fixed. Requires --model_name_or_path or --resume_from_checkpoint.",
    )
    dataloader_drop_last: bool = option(False, "Skip the last step of each epoch if its batch is incomplete.")
    overwrite_output_dir: bool = option(
        False, "Delete the earlier run in output_dir and start a new one. Other files in the folder stay."
    )
    model_name_or_path: Text | None = option(
        None, "Fine-tune this trained model: a run folder or an exported model. The run keeps its architecture."
    )
    resume_from_checkpoint: Text | None = option(
        None, "Checkpoint folder to continue from, or 'true' for the newest checkpoint in output_dir."
    )
    logging_steps: ranges.Count = option(20, "Steps between progress lines.")
    eval_steps: ranges.CountFrom0 = option(
        0, "Steps between evaluations on the validation split. 0: evaluate after each epoch."
    )
    save_steps: ranges.CountFrom0 = option(0, "Steps between checkpoints. 0: save after each evaluation.")
    save_total_limit: ranges.Count = option(2, "Number of newest checkpoints to keep. The best one is kept as well.")
    metric_for_best_model: MetricName = option(
        "ne", "Validation metric that decides which checkpoint is best: the highest auc, or the lowest ne or logloss."
    )
    load_best_model_at_end: bool = option(True, "Test and export the best checkpoint instead of the last weights.")
    calibrate: bool = option(
        False,
        "After training, multiply the logits of the exported model by one number, fitted on the validation split. Use "
        "it with dropout, which makes predictions too extreme and too low on average.",
    )
    early_stopping_patience: ranges.CountFrom0 = option(
        0, "Stop after this many evaluations in a row without improvement. 0 turns early stopping off."
    )
    seed: ranges.Seed = option(0, "Random seed of the initial weights, the order of the rows, and dropout.")
    interaction_files: list[Text] = option([], "Python files that register your own interactions.")

    def without_effect(self) -> list[str]:
        """A sentence for each value that the user changed but that another value leaves without effect."""
        is_unused = {
            "plateau_factor": ("lr_scheduler_type", self.lr_scheduler_type != "reduce_lr_on_plateau"),
            "plateau_patience": ("lr_scheduler_type", self.lr_scheduler_type != "reduce_lr_on_plateau"),
            "base_batch_size": ("learning_rate_scaling", self.learning_rate_scaling == "none"),
        }
        default = TrainingArguments.__dataclass_fields__
        return [
            f"{name} has no effect: {other} is {getattr(self, other)}"
            for name, (other, unused) in is_unused.items()
            if unused and getattr(self, name) != default[name].default
        ]


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
        """The values that a ds_config may leave "auto"."""
        training = self.training
        names = [f.name for f in dataclasses.fields(Recipe) if f.name != "world_size"]
        return Recipe(world_size=world_size, **{name: getattr(training, name) for name in names})


_GROUPS = {DataArguments: "data", DhenArchitecture: "model", TrainingArguments: "training"}
_PARTS = tuple(_GROUPS)


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
        [copy_for_parser(part, group) for part, group in _GROUPS.items()],
        parents=[_launch_parser()],
        usage="%(prog)s [--ds_config FILE] [--config FILE] [--argument VALUE ...]",
        description=description,
    )
    if launch.config:
        parser.set_defaults(**_read_recipe(find(launch.config)))
    *parts, _, unknown = parser.parse_args_into_dataclasses(
        command_line, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise unknown_argument(unknown[0], _PARTS)
    say_what_repeats(command_line)
    checked = [check_types(part, vars(given), "command line") for part, given in zip(_PARTS, parts, strict=True)]
    ds_config = launch.ds_config if launch.ds_config == AUTO else find(launch.ds_config)
    arguments = Arguments(ds_config, *checked, launch.check)
    _resolve_paths(arguments)
    _choose_learning_rates(arguments.training)
    _check_combinations(arguments.training, arguments.data)
    import_interaction_files(arguments.training.interaction_files)
    return arguments


def _launch_parser() -> argparse.ArgumentParser:
    parser = Parser([], add_help=False)
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
    for name, rate in LEARNING_RATES.items():
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
    allowed = {f.name for part in _PARTS for f in dataclasses.fields(part)}
    for key in values:
        if key not in allowed:
            raise ArgumentError(f"{path}: {unknown_name('argument', str(key), allowed)}")
    if values.get("resume_from_checkpoint") is True:  # the argument is a string, but YAML reads true as a bool
        values["resume_from_checkpoint"] = "true"
    for part in _PARTS:
        own = {f.name for f in dataclasses.fields(part)} & values.keys()
        checked = check_types(part, {name: values[name] for name in own}, path)
        values |= {name: getattr(checked, name) for name in own}
    return values


def _check_combinations(training: TrainingArguments, data: DataArguments) -> None:
    if training.max_steps == 0:
        raise ArgumentError("max_steps is 0. Use 1 or more, or -1 for num_train_epochs.")
    if training.resume_from_checkpoint and training.overwrite_output_dir:
        raise ArgumentError(
            "resume_from_checkpoint and overwrite_output_dir are both set. Use the first to continue the run in "
            "output_dir, or the second to delete it."
        )
    if training.freeze == "tables" and (training.looked_up_l2 or training.whole_table_l2):
        raise ArgumentError(
            "freeze is 'tables', so looked_up_l2 and whole_table_l2 would have no effect. Set both to 0."
        )
    if training.freeze != "none" and not (training.model_name_or_path or training.resume_from_checkpoint):
        raise ArgumentError(
            f"freeze is {training.freeze!r}, but there is no trained model to start from: frozen weights would stay "
            "random. Add --model_name_or_path or --resume_from_checkpoint, or remove freeze."
        )
    if data.train_file and data.dataset_name:
        raise ArgumentError(
            "dataset_name and train_file are both set. Use dataset_name, or train_file, validation_file and test_file."
        )
    if (data.validation_file or data.test_file) and not data.train_file:
        raise ArgumentError("validation_file or test_file is set without train_file. Add train_file.")
