"""The run folder: the files that a run writes besides its checkpoints, and the check for an earlier run."""

import logging
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table

from dhen.config.arguments import ARGUMENTS_FILE, Arguments
from dhen.config.command_line import ArgumentError
from dhen.config.training_arguments import TrainingArguments
from dhen.data.schema import Schema
from dhen.model.configuration_dhen import DhenConfig
from dhen.paths import write_atomically
from dhen.runtime.folder_lock import check_folder_is_free
from dhen.runtime.run_environment import describe_environment
from dhen.training.evaluation.unseen import UNSEEN_FILE
from dhen.training.loop import Evaluation
from dhen.training.parallel_model import ParallelDhen
from dhen.training.parallelize import Layout, weights_of
from dhen.training.reporting.trackers import TRACKERS_FILE
from dhen.training.saved.checkpoint_folder import NEWEST, checkpoints
from dhen.training.saved.deltas import DELTA_FOLDER
from dhen.training.saved.trained_model import MODEL_FOLDER
from dhen.yaml_files import write_yaml

SUMMARY_FILE = "summary.json"
DS_CONFIG_FILE = "ds_config.json"
LOG_FILE = "train.log"
ENVIRONMENT_FILE = "environment.json"
OF_A_RUN = (
    SUMMARY_FILE, ARGUMENTS_FILE, MODEL_FOLDER, "checkpoint-*", "damaged-*", "latest", DS_CONFIG_FILE, "placement.json",
    "metrics.csv", "tensorboard", TRACKERS_FILE, "curves.png", "zero_to_*.py", ENVIRONMENT_FILE,
    UNSEEN_FILE, LOG_FILE, "eval-by-*", "test-by-*", DELTA_FOLDER,
)  # fmt: skip
"""The files and folders that a run writes."""
logger = logging.getLogger(__name__)


def check_run_folder(training: TrainingArguments) -> None:
    """Raise ValueError if a new run in output_dir would overwrite an earlier one, or another run writes there. Rank 0
    calls it. Changes nothing.
    """
    path = Path(training.output_dir)
    place = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place if place.is_dir() else place.parent).close()
    except OSError as error:
        raise ArgumentError(
            f"output_dir {path}: nothing can be written to {place} ({error.strerror}). Choose another --output_dir."
        ) from error
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"output_dir {path} is a file. Choose another --output_dir.")
    check_folder_is_free(path)
    has_run = any((path / name).exists() for name in (SUMMARY_FILE, MODEL_FOLDER)) or bool(checkpoints(path))
    checkpoint = training.resume_from_checkpoint
    resumes_its_own = checkpoint is not None and (
        checkpoint.lower() in NEWEST or Path(checkpoint).resolve().is_relative_to(path.resolve())
    )
    if not has_run or resumes_its_own:
        return
    if not training.overwrite_output_dir:
        raise ArgumentError(
            f"output_dir {path} already holds a run. Choose another --output_dir, continue the run with "
            "--resume_from_checkpoint auto, or replace it with --overwrite_output_dir."
        )
    origin = training.model_name_or_path
    if origin and Path(origin).resolve().is_relative_to(path.resolve()):
        raise ArgumentError(
            f"model_name_or_path {origin} is in output_dir, which overwrite_output_dir would delete. Choose another "
            "--output_dir."
        )


def clear_run_folder(path: Path) -> None:
    """Create the folder, or delete an earlier run's files in it; other files stay. Rank 0 calls it after all checks."""
    path.mkdir(parents=True, exist_ok=True)
    for pattern in OF_A_RUN:
        for found in path.glob(pattern):
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()


def write_setup(path: Path, arguments: Arguments, model: ParallelDhen) -> None:
    """Write arguments.yaml, ds_config.json and placement.json with all values resolved, so the run can be repeated."""
    write_yaml(_resolved(arguments, model.config), path / ARGUMENTS_FILE)
    write_json(path / DS_CONFIG_FILE, model.ds_config.as_dict())
    write_json(path / "placement.json", model.placement.as_dict())
    write_json(path / ENVIRONMENT_FILE, describe_environment(model.topology))


def announce(arguments: Arguments, layout: Layout, schema: Schema, fine_tuning: str | None) -> None:
    """Log what will be trained, on which data, and how it is distributed."""
    config = layout.config
    table_weights = sum(table.num_embeddings for table in config.tables) * config.embedding_dim
    rows = ", ".join(
        f"{split} {counts.rows:,} ({counts.clicks / counts.rows:.1%} clicks)" for split, counts in schema.splits.items()
    )
    values = _resolved(arguments, config)
    logger.info("arguments: %s", yaml.safe_dump(values, default_flow_style=True, width=10**6).strip())
    logger.info("data: %d dense and %d sparse features; %s", len(schema.dense), len(schema.sparse), rows)
    for name, (labels, clicks) in schema.splits["train"].tasks.items():
        share = clicks / max(labels, 1)
        logger.info("task %s: %s training rows have its label (%.1f%% are 1)", name, f"{labels:,}", 100 * share)
    skipped = sum(counts.bad_rows for counts in schema.splits.values())
    if skipped:
        logger.info("data: %s bad rows were skipped; see bad_rows.csv in the prepared folder", f"{skipped:,}")
    topology, dense_weights = layout.topology, sum(weights_of(config, layout.placement.replicated).values())
    groups = "" if layout.shard_size == topology.world_size else f" in shard groups of {layout.shard_size}"
    logger.info(
        f"model: {len(config.layer_specs)} layers, {dense_weights:,} dense weights, {table_weights:,} table weights; "
        f"{topology.world_size} ranks on {topology.device.type}, ZeRO stage {layout.ds_config.zero_stage}{groups} "
        f"({arguments.ds_config})"
    )
    if layout.ds_config.rung:
        logger.info("ds_config: %s", layout.ds_config.rung)
    logger.info("tables:\n%s", layout.placement.as_table())
    if fine_tuning:
        logger.info(fine_tuning)


def _resolved(arguments: Arguments, config: DhenConfig) -> dict[str, Any]:
    """The arguments with the architecture that was built: when fine-tuning, that of the trained model."""
    asked_once = ("overwrite_output_dir", "resume_from_checkpoint")  # these apply to this call only
    values = {name: value for name, value in arguments.as_dict().items() if name not in asked_once}
    return values | vars(config.architecture)


def metrics_of(evaluation: Evaluation, best_possible_ne: float | None = None) -> dict[str, Any]:
    """The metrics for summary.json, with the best possible NE if it is known, and unseen: share by feature. Also tasks:
    metrics by further task, and gates: mean openness by layer, if there are any.
    """
    best = {} if best_possible_ne is None else {"best_possible_ne": best_possible_ne}
    unseen = {name: of_feature.share for name, of_feature in evaluation.unseen.items()}
    tasks = {name: asdict(metrics) for name, metrics in evaluation.tasks.items()}
    gates = {f"layer {layer}": openness for layer, openness in evaluation.gates.items()}
    more = {"tasks": tasks, "gates": gates}
    return asdict(evaluation.metrics) | best | {"unseen": unseen} | {key: value for key, value in more.items() if value}


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write strict JSON (NaN as null). The file is renamed into place when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, TypeAdapter(dict[str, Any]).dump_json(values, indent=2).decode() + "\n")


def print_metrics(by_split: dict[str, dict[str, Any]], console: Console | None = None, of: str = "split") -> None:
    """Print a table with a row per split, or per group of another kind; nothing without rows."""
    if not by_split:
        return
    has_best = any("best_possible_ne" in values for values in by_split.values())
    columns = ["auc", "ne", *(["best_possible_ne"] if has_best else []), "logloss", "calibration", "examples"]
    table = Table(box=None, pad_edge=False)
    table.add_column(of)
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for split, values in by_split.items():
        table.add_row(split, *(_shown(values.get(column)) for column in columns))
        for task, of_task in values.get("tasks", {}).items():
            table.add_row(f"{split} {task}", *(_shown(of_task.get(column)) for column in columns))
    (console or Console()).print(table)
    for split, values in by_split.items():
        if gates := values.get("gates"):
            means = ", ".join(f"{layer} {openness:.3f}" for layer, openness in gates.items())
            print(f"{split}: mean openness of the gates: {means}")


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
