"""Scoring with a trained model: what evaluate.py and predict.py share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import yaml
from transformers import HfArgumentParser

from dhen.data.batches import BatchLoader
from dhen.data.schema import SCHEMA_FILE
from dhen.parallel.parallelize import ScoringDhen, parallelize_for_scoring
from dhen.parallel.topology import Topology
from dhen.training.arguments import ArgumentError, DataArguments, check_types, copy_for_parser, option, unknown_argument
from dhen.training.dataset import check_prepared_for, prepare_dataset
from dhen.training.run_folder import ARGUMENTS_FILE
from dhen.training.trained_model import TrainedModel


@dataclass
class ScoringArguments:
    """What to score, and with which model."""

    model_name_or_path: str | None = option(None, "Trained model: a run folder or an exported model.")
    dataset_name: str | None = option(
        None, "Raw file, glob, prepared folder or hub data set; default: the run's own data."
    )
    dataset_format: Literal["auto", "criteo", "libsvm", "csv", "parquet", "hub"] = option(
        "auto", "Format of raw files."
    )
    dataset_schema: str | None = option(None, "YAML of the columns (csv, parquet, hub).")
    split: Literal["train", "validation", "test"] = option(
        "test", "Split of the run's own data or of a prepared folder; all rows of raw files are scored."
    )
    bad_rows: Literal["error", "skip"] = option("error", "Stop at a malformed row, or skip, count and list it.")
    per_device_eval_batch_size: int = option(4096, "Examples of one rank in one step.")
    cache_dir: str | None = option(None, "Where raw files are kept once prepared; default: beside the model.")
    output: str | None = option(None, "File to write: JSON from evaluate.py, Parquet from predict.py.")
    local_rank: int = option(0, "Set by DeepSpeed's launcher; not used.")


def parse_scoring_arguments(command_line: Sequence[str] | None, description: str) -> ScoringArguments:
    """Arguments from the command line. Raises ArgumentError."""
    parser = HfArgumentParser([copy_for_parser(ScoringArguments)], description=description, allow_abbrev=False)
    given, unknown = parser.parse_args_into_dataclasses(
        command_line, return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise unknown_argument(unknown[0], [ScoringArguments])
    arguments = check_types(ScoringArguments, vars(given), "command line")
    if arguments.model_name_or_path is None:
        raise ArgumentError("--model_name_or_path is missing. Give a run folder or an exported model.")
    return arguments


def load_for_scoring(arguments: ScoringArguments, topology: Topology) -> tuple[ScoringDhen, BatchLoader]:
    """The model over all ranks, and a loader of this rank's share of the rows. Communicates; all ranks call it."""
    trained = TrainedModel.open(arguments.model_name_or_path)
    folder, split = _prepared(arguments, trained, topology)
    schema = check_prepared_for(folder, trained.folder)
    loader = BatchLoader(
        folder,
        split,
        batch_size=arguments.per_device_eval_batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
        schema=schema,
    )
    model = parallelize_for_scoring(trained.config, topology, trained.dense_weights())
    if model.tables is not None:
        trained.load_tables(model.tables)
    return model, loader


def _prepared(arguments: ScoringArguments, trained: TrainedModel, topology: Topology) -> tuple[Path, str]:
    """The prepared folder and the split of it to score."""
    name = arguments.dataset_name
    if name is not None and (Path(name) / SCHEMA_FILE).is_file():
        return Path(name), arguments.split
    run = trained.folder.parent
    cache = Path(arguments.cache_dir) if arguments.cache_dir else run.parent / "prepared"
    if name is None:
        return prepare_dataset(_data_of_run(run), cache, topology), arguments.split
    data = DataArguments(
        dataset_name=name,
        dataset_format=arguments.dataset_format,
        dataset_schema=arguments.dataset_schema,
        bad_rows=arguments.bad_rows,
        split_fractions=[0.0, 0.0, 1.0],
    )
    return prepare_dataset(data, cache, topology, schema_from=trained.folder), "test"


def _data_of_run(run: Path) -> DataArguments:
    """What the run was trained on. Raises ArgumentError where the model doesn't lie in its run folder."""
    path = run / ARGUMENTS_FILE
    if not path.is_file():
        raise ArgumentError(f"{path}: no such file, so the model's own data isn't known. Give --dataset_name.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = DataArguments.__dataclass_fields__
    return replace(DataArguments(), **{key: value for key, value in values.items() if key in names})
