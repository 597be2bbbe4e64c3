"""Scoring with a trained model: the parts that evaluate.py and predict.py share."""

import argparse
import hashlib
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, ClassVar, Literal, TypeVar

from dhen.config.arguments import ARGUMENTS_FILE, import_interaction_files
from dhen.config.command_line import ArgumentError, Parser, Paths, find_paths
from dhen.config.data_arguments import DataArguments, DatasetFormat
from dhen.data.loading.batches import BatchLoader
from dhen.data.preparation.reading.sources import format_of
from dhen.data.preparation.settings import as_tuple
from dhen.data.preparation.writing import BAD_ROWS_FILE
from dhen.model.configuration_dhen import option
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.topology import Topology
from dhen.tables.placement.agreed import replicated_in_scoring
from dhen.training.dataset import check_prepared_for, is_prepared, prepare_dataset, settings_of
from dhen.training.parallel_model import ScoringDhen
from dhen.training.parallelize import parallelize_for_scoring
from dhen.training.saved.trained_model import TrainedModel
from dhen.yaml_files import read_yaml

logger = logging.getLogger(__name__)


def _as_in_training(name: str) -> Any:
    given = DataArguments.__dataclass_fields__[name]
    return field(default=given.default, metadata=given.metadata)


@dataclass
class ScoringArguments:
    """Which rows to score, with which model. default_split: the split without --split. keep: columns of the files."""

    default_split: ClassVar[str] = "test"
    keep: ClassVar[Sequence[str]] = ()
    model_name_or_path: str | None = option(None, "Trained model: a run folder or an exported model. Required.")
    dataset_name: Paths = option(
        None,
        "Data to score: raw files, globs, a prepared folder, a Hugging Face data set (owner/name), or - for standard "
        "input. Default: the data that the run was trained on.",
    )
    dataset_format: DatasetFormat = _as_in_training("dataset_format")
    dataset_schema: str | None = _as_in_training("dataset_schema")
    split: Literal["train", "validation", "test"] | None = option(
        None,
        "Split to score. Default: test. Not allowed with raw files, because all their rows are scored.",
    )
    bad_rows: Literal["error", "skip"] = _as_in_training("bad_rows")
    per_device_eval_batch_size: int = option(4096, "Examples per rank in one step. Lower it if memory runs out.")
    cache_dir: str | None = option(
        None,
        "Folder for prepared data, which later calls reuse. Default: the folder that training used, or 'prepared' "
        "beside the exported model.",
    )
    output: str | None = option(
        None,
        "File to write. evaluate.py writes the metrics as JSON, by default to no file. predict.py writes "
        "Parquet, CSV or JSON lines, as the name ends (.parquet, .csv, .jsonl), by default predictions.parquet; a name "
        "without an ending is a folder, in which each rank writes a Parquet file; - is standard output, as CSV "
        "(--output=-.jsonl: as JSON lines).",
    )
    interaction_files: list[str] = option([], "Python files that register your own interactions, as in training.")
    local_rank: int = option(0, argparse.SUPPRESS)  # DeepSpeed's launcher passes it


STANDARD_INPUT = "-"
Scoring = TypeVar("Scoring", bound=ScoringArguments)


def parse_scoring_arguments(
    command_line: Sequence[str] | None, description: str, part: type[Scoring] = ScoringArguments
) -> Scoring:
    """Read the arguments, a `part`, from the command line. description: the text above --help. Raises ArgumentError."""
    usage = "%(prog)s --model_name_or_path FOLDER [--argument VALUE ...]"
    (arguments,) = Parser({"scoring": part}, usage=usage, description=description).parse(command_line)
    if arguments.model_name_or_path is None:
        raise ArgumentError("--model_name_or_path is missing. Set it to a run folder or an exported model.")
    find_paths(arguments, "model_name_or_path", "dataset_name", "dataset_schema", "interaction_files")
    import_interaction_files(arguments.interaction_files)
    names = [*as_tuple(arguments.dataset_name), *as_tuple(arguments.dataset_schema)]
    inputs = {Path(path).resolve() for name in names if name != STANDARD_INPUT for path in (name, *glob(name))}
    if arguments.output and Path(arguments.output).resolve() in inputs:
        raise ArgumentError(f"--output {arguments.output} is an input, which it would overwrite. Choose another name.")
    return arguments


def load_for_scoring(arguments: ScoringArguments, topology: Topology) -> tuple[ScoringDhen, BatchLoader]:
    """Build the model over all ranks, and a loader for this rank's stretch of rows. Communicates; all ranks call it."""
    trained = TrainedModel.open(arguments.model_name_or_path)
    folder, split = _prepared(arguments, trained, topology)
    schema = rank_zeros(topology, lambda: check_prepared_for(folder, trained.folder))  # which reads all vocabularies
    skipped = schema.splits[split].bad_rows if split in schema.splits else 0
    if topology.is_main and skipped:
        logger.warning(f"{skipped:,} bad rows were skipped and are not numbered; {folder / BAD_ROWS_FILE} lists them")
    loader = BatchLoader(
        folder,
        split,
        batch_size=arguments.per_device_eval_batch_size,
        rank=topology.rank,
        world_size=topology.world_size,
        schema=schema,
        lanes=topology.world_size,
    )
    replicated = {f"tables.{name}.weight": trained.table(name) for name in replicated_in_scoring(trained.config)}
    model = parallelize_for_scoring(trained.config, topology, trained.dense_weights() | replicated)
    if model.tables is not None:
        trained.load_tables(model.tables)
    model.replicated.load_uses({table.name: trained.uses(table.name) for table in model.replicated.tables})
    return model, loader


def _prepared(arguments: ScoringArguments, trained: TrainedModel, topology: Topology) -> tuple[Path, str]:
    """The prepared folder, and the split in it to score."""
    name, (of_run, was_fine_tuned) = arguments.dataset_name, _data_of_run(trained)
    split = arguments.split or arguments.default_split
    if name is None or is_prepared(name):
        _refuse(arguments, ("dataset_format", "dataset_schema", "bad_rows"), "the data is already prepared")
        if arguments.keep:
            raise ArgumentError(
                "--keep needs raw files, because prepared data lacks their columns. Name them in --dataset_name."
            )
    if is_prepared(name):
        return Path(name), split
    cache = _cache_folder(arguments, trained, of_run)
    if name is None:
        if of_run is None:
            raise ArgumentError(f"{trained.folder} is not in a run folder, so its data is unknown. Add --dataset_name.")
        # The vocabulary of a fine-tuned model also has keys of the model that it started from.
        schema_from = trained.folder if was_fine_tuned and not is_prepared(of_run.dataset_name) else None
        return prepare_dataset(of_run, cache, topology, schema_from, is_label_required=True), split
    data = DataArguments(
        dataset_name=name,
        dataset_format=arguments.dataset_format,
        dataset_schema=arguments.dataset_schema,
        bad_rows=arguments.bad_rows,
        split_fractions=[0.0, 0.0, 1.0],
        prepare_here=True,
    )
    if name == STANDARD_INPUT:
        data.dataset_name = rank_zeros(topology, lambda: _saved_input(cache))
    is_on_hub = format_of(settings_of(data, schema_from=trained.folder)) == "hub"
    if not is_on_hub:
        _refuse(arguments, ("split",), "all rows of raw files are scored")
    only_split = split if is_on_hub else None
    return prepare_dataset(data, cache, topology, trained.folder, only_split, keep=arguments.keep), only_split or "test"


def _saved_input(cache: Path) -> str:
    """Save standard input, since rows are read twice, in the cache, named by its content. Returns the path."""
    cache.mkdir(parents=True, exist_ok=True)
    logger.info("reading rows from standard input")
    with NamedTemporaryFile(dir=cache, prefix=".stdin-", delete=False) as draft:
        shutil.copyfileobj(sys.stdin.buffer, draft)
        draft.seek(0)
        digest = hashlib.file_digest(draft, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return str(Path(draft.name).replace(cache / f"stdin-{digest}"))


def _refuse(arguments: ScoringArguments, names: tuple[str, ...], reason: str) -> None:
    """Raise ArgumentError if one of these arguments is given: none has an effect on this kind of data."""
    for name in names:
        if getattr(arguments, name) != ScoringArguments.__dataclass_fields__[name].default:
            raise ArgumentError(f"--{name} has no effect here: {reason}. Remove it.")


def _data_of_run(trained: TrainedModel) -> tuple[DataArguments | None, bool]:
    """The data that the run was trained on, and whether it was fine-tuned. None if the model is not in a run folder."""
    path = trained.folder.parent / ARGUMENTS_FILE
    if not path.is_file():
        return None, False
    values = read_yaml(path)
    names = DataArguments.__dataclass_fields__
    data = DataArguments(**{key: value for key, value in values.items() if key in names})
    data.prepare_here = True
    find_paths(data, "dataset_name")  # the other paths are found when the files are opened
    return data, values.get("model_name_or_path") is not None


def _cache_folder(arguments: ScoringArguments, trained: TrainedModel, of_run: DataArguments | None) -> Path:
    if given := arguments.cache_dir or (of_run and of_run.cache_dir):
        return Path(given)
    beside = trained.folder if of_run is None else trained.folder.parent
    return beside.resolve().parent / "prepared"
