"""A run folder: what a run leaves behind besides its checkpoints, and the errors about one that is in use."""

import json
import logging
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from dhen.data.schema import Schema
from dhen.parallel.parallelize import ParallelDhen
from dhen.training.arguments import ArgumentError, Arguments, write_yaml
from dhen.training.checkpoint import checkpoints
from dhen.training.metrics import MetricValues

SUMMARY_FILE = "summary.json"
ARGUMENTS_FILE = "arguments.yaml"
logger = logging.getLogger(__name__)


def open_run_folder(path: Path, *, resumes: bool, overwrite: bool) -> None:
    """Make the folder. Raises ArgumentError where an earlier run's work in it would be lost. Rank 0 calls it."""
    has_run = (path / SUMMARY_FILE).is_file() or bool(checkpoints(path))
    if has_run and overwrite and not resumes:
        shutil.rmtree(path)
    elif has_run and not resumes:
        raise ArgumentError(
            f"output_dir {path} holds a run already. Choose another --output_dir, go on from its last checkpoint with "
            "--resume_from_checkpoint true, or replace it with --overwrite_output_dir."
        )
    path.mkdir(parents=True, exist_ok=True)


def write_setup(path: Path, arguments: Arguments, model: ParallelDhen) -> None:
    """arguments.yaml, ds_config.json and placement.json: all as resolved, so that the run can be repeated."""
    write_yaml(arguments.as_dict(), path / ARGUMENTS_FILE)
    write_json(path / "ds_config.json", model.ds_config.as_dict())
    write_json(path / "placement.json", model.placement.as_dict())


def announce(arguments: Arguments, model: ParallelDhen, schema: Schema, fine_tuning: str | None) -> None:
    """Say what is about to be trained, on what, and how it is spread."""
    config = model.config
    table_weights = sum(table.num_embeddings for table in config.tables) * config.embedding_dim
    rows = ", ".join(
        f"{split} {counts.rows:,} ({counts.clicks / counts.rows:.1%} clicks)" for split, counts in schema.splits.items()
    )
    logger.info("arguments: %s", yaml.safe_dump(arguments.as_dict(), default_flow_style=True, width=10**6).strip())
    logger.info("data: %d dense and %d sparse features; %s", len(schema.dense), len(schema.sparse), rows)
    skipped = sum(counts.bad_rows for counts in schema.splits.values())
    if skipped:
        logger.info("data: %s bad rows were skipped; bad_rows.csv beside the prepared data lists them", f"{skipped:,}")
    logger.info(
        "model: %d layers, %s dense weights, %s table weights; %d ranks on %s, ZeRO stage %d (%s)",
        len(config.layer_specs),
        f"{num_dense_weights(model):,}",
        f"{table_weights:,}",
        model.topology.world_size,
        model.topology.device.type,
        model.ds_config.zero_stage,
        arguments.ds_config,
    )
    logger.info("tables:\n%s", model.placement.as_table())
    if fine_tuning:
        logger.info(fine_tuning)


def num_dense_weights(model: ParallelDhen) -> int:
    """Weights of the dense part, whole, however ZeRO shards them."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in model.engine.module.parameters())


def metrics_of(values: MetricValues, best_possible_ne: float | None = None) -> dict[str, Any]:
    """For summary.json; where the data knows the best NE that any model can reach, it stands beside."""
    best = {} if best_possible_ne is None else {"best_possible_ne": best_possible_ne}
    return asdict(values) | best


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Strict JSON (NaN as null), whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(_without_nan(values), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_metrics(by_split: dict[str, dict[str, Any]], console: Console | None = None) -> None:
    """A table of the metrics of each split."""
    has_best = any("best_possible_ne" in values for values in by_split.values())
    columns = ["auc", "ne", *(["best_possible_ne"] if has_best else []), "logloss", "calibration", "examples"]
    table = Table(box=None, pad_edge=False)
    table.add_column("split")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for split, values in by_split.items():
        table.add_row(split, *(_shown(values.get(column)) for column in columns))
    (console or Console()).print(table)


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5f}"
