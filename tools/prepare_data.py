"""Prepares click logs for training: reads raw files, and writes a folder with Parquet files and schema.json.

    python tools/prepare_data.py --dataset_name 'logs/day_*.gz' --format criteo --output data/criteo
    python tools/prepare_data.py --train_file train.csv --test_file test.csv --dataset_schema schema.yaml \\
        --id_encoding vocabulary --min_count 2 --output data/mine
    python tools/prepare_data.py --dataset_name logs --format criteo --output data/criteo --shard 3/16  # on 16 machines
    python tools/prepare_data.py --dataset_name logs --format criteo --output data/criteo --merge       # then on one
    python tools/prepare_data.py --seal data/by_spark  # check a folder that another program wrote
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dhen.data.loading.sealing import seal
from dhen.data.preparation.encoding.encoder import MAX_HASH_SIZE
from dhen.data.preparation.preprocessing import prepare, settings_without_effect
from dhen.data.preparation.running.progress import PreparationProgress
from dhen.data.preparation.running.runners import DaskCluster, LocalProcesses, Runner, nobody, num_cores
from dhen.data.preparation.running.unfinished import Shard
from dhen.data.preparation.settings import FORMATS, PreparationSettings
from dhen.data.preparation.writing import BAD_ROWS_FILE
from dhen.data.schema import ESTIMATED_KEYS, Schema


def main() -> int:
    """Exit status: 0, or 1 with a message on stderr."""
    arguments = parse_arguments()
    names = {field.name for field in fields(PreparationSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    start = time.monotonic()
    try:
        if arguments.seal:
            print(report(seal(arguments.seal), arguments.seal, start, as_json=arguments.json))
            return 0
        settings = PreparationSettings(**given, is_label_required=not arguments.without_labels)
        shard = Shard.parse(arguments.shard) if arguments.shard else None
        runner = choose_runner(arguments)
        if arguments.overwrite and arguments.output.exists():
            remove_prepared(arguments.output)
        with RichProgress() as progress:
            schema = prepare(settings, arguments.output, progress=progress, runner=runner, shard=shard)
    except (ValueError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 1
    if schema is None:
        print(f"shard {arguments.shard} is done; when all are, run the same command with --merge in place of --shard")
        return 0
    for sentence in [] if settings.schema_from else settings_without_effect(settings, schema):
        print(f"prepare_data: {sentence}", file=sys.stderr)
    print(report(schema, arguments.output, start, as_json=arguments.json))
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line, with the names and defaults of `PreparationSettings`."""
    default = PreparationSettings(dataset_name="-")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, metavar="FOLDER", help="folder to write")
    add("--seal", type=Path, metavar="FOLDER", help="check one that another program wrote; complete its schema.json")
    add("--overwrite", action="store_true", help="first remove a prepared folder of that name")
    add("--dataset_name", nargs="+", metavar="PATH", help="files, globs, a folder, URLs, or a Hugging Face data set")
    for split in ("train", "validation", "test"):
        add(f"--{split}_file", nargs="+", metavar="PATH", help=f"files or globs for the {split} split")
    add(
        "--dataset_format",
        "--format",
        choices=FORMATS,
        help="default: auto, which looks at names and first lines",
    )
    add("--dataset_schema", metavar="YAML", help="roles of the columns; see recipes/DATA.md")
    add("--split_fractions", nargs=3, type=float, help=f"train, validation, test; default: {default.split_fractions}")
    add("--split_order", choices=("random", "sequential"), help=f"default: {default.split_order}")
    add("--time_column", metavar="COLUMN", help="numbers or dates that put the rows of each split in order")
    add("--split_seed", type=int, help=f"seed of the random split; default: {default.split_seed}")
    add("--id_encoding", choices=("auto", "hash", "vocabulary"), help=f"default: {default.id_encoding}")
    add(
        "--hash_size",
        type=lambda text: int(text) if text.isdecimal() else text,
        help="rows per table of a hashed feature, or auto for twice its keys; default: 100,000, or a million",
    )
    add("--max_hash_size", type=int, help=f"with --hash_size auto, the most rows; default: {MAX_HASH_SIZE:,}")
    add("--min_count", type=int, help="rarer keys get no row of their own; default: 1")
    add(
        "--bad_rows",
        choices=("error", "skip"),
        help=f"skip lists bad rows in {BAD_ROWS_FILE}; default: {default.bad_rows}",
    )
    add("--without_labels", action="store_true", help="labels may be absent or blank: the rows are for prediction")
    add("--schema_from", metavar="FOLDER", help="use the features, ids and transforms of this prepared folder")
    add("--like", metavar="FOLDER", help="take encodings and keys from this exported model, to fine-tune it")
    add("--vocabulary_keys", choices=("union", "new"), help="with --like: its keys and the new ones, or only the new")
    add("--json", action="store_true", help="print the summary as JSON")
    who = parser.add_argument_group("who does the work", "the result is the same; see recipes/DATA.md")
    who = who.add_mutually_exclusive_group()
    who.add_argument("--workers", type=int, metavar="N", help="processes on this machine; default: one per core")
    who.add_argument("--dask", metavar="ADDRESS", help="the workers of this Dask scheduler, such as tcp://host:8786")
    add("--shard", metavar="I/N", help="prepare the share I, from 0, of N machines that share the output's folder")
    add("--merge", action="store_true", help="only join what all shards have prepared")
    arguments = parser.parse_args()
    others = [name for name, value in vars(arguments).items() if value and name not in ("seal", "json")]
    if arguments.seal and others:
        parser.error(f"--seal reads no raw rows, so --{others[0]} has no effect. Leave it out.")
    if not (arguments.seal or arguments.output):
        parser.error("give --output FOLDER.")
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers is {arguments.workers}. Use 1 or more.")
    if arguments.shard and (arguments.merge or arguments.overwrite):
        parser.error("--shard goes with neither --merge nor --overwrite. Merge when all shards are done.")
    if arguments.merge and (arguments.workers or arguments.dask):
        parser.error("--merge reads no raw rows, so --workers and --dask have no effect. Leave them out.")
    return arguments


def choose_runner(arguments: argparse.Namespace) -> Runner:
    """Who prepares the pieces of the data. Raises ValueError."""
    if arguments.merge:
        return nobody
    return DaskCluster(arguments.dask) if arguments.dask else LocalProcesses(arguments.workers or num_cores())


def remove_prepared(folder: Path) -> None:
    """Remove a prepared folder. Raises ValueError for any other folder, which stays as it is."""
    Schema.load(folder)
    shutil.rmtree(folder)


def report(schema: Schema, folder: Path, start: float, *, as_json: bool) -> str:
    """The prepared data, as text or as JSON. start: when the work began."""
    return summary_json(schema, folder, time.monotonic() - start) if as_json else summary(schema, folder)


def summary(schema: Schema, folder: Path) -> str:
    """The prepared data in a few lines of text."""
    lines = [f"{folder}: {len(schema.dense)} dense and {len(schema.sparse)} sparse features"]
    for split, counts in schema.splits.items():
        line = f"  {split:<11}{counts.rows:>14,} rows"
        labelled = counts.rows - counts.unlabelled
        if labelled:
            line += f", {counts.clicks / labelled:.2%} clicks"
        for name, (labels, clicks) in counts.tasks.items():
            line += f", {name}: {labels:,} labels, {clicks / max(labels, 1):.2%} are 1"
        if counts.unlabelled:
            line += f", {counts.unlabelled:,} without a label"
        if counts.bad_rows:
            line += f", {counts.bad_rows:,} bad rows skipped ({folder / BAD_ROWS_FILE})"
        lines.append(line)
    rows = {column.name: column.num_embeddings for column in schema.sparse}
    for name, keys in schema.source.get(ESTIMATED_KEYS, {}).items():
        lines.append(f"  {name}: {rows[name]:,} rows for about {keys:,} distinct keys")
    return "\n".join(lines)


def summary_json(schema: Schema, folder: Path, seconds: float) -> str:
    """The prepared data as JSON."""
    rows = sum(counts.rows for counts in schema.splits.values())
    splits = {split: asdict(counts) for split, counts in schema.splits.items()}
    tables = {column.name: column.num_embeddings for column in schema.sparse}
    content = {"folder": str(folder), "rows": rows, "seconds": seconds, "splits": splits, "num_embeddings": tables}
    return json.dumps(content, indent=2)


class RichProgress(Progress):
    """One progress bar per pass, on stderr."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}% {task.fields[rows]:,} rows"),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=Console(stderr=True))
        self._tasks_by_stage: dict[str, TaskID] = {}

    def __call__(self, state: PreparationProgress) -> None:
        """Update the bar of a pass."""
        if state.stage not in self._tasks_by_stage:
            self._tasks_by_stage[state.stage] = self.add_task(state.stage, total=None, rows=0)
        total = max(state.bytes_total, 1) if state.bytes_total or state.is_done else None
        done = total if state.is_done else state.bytes_read
        self.update(self._tasks_by_stage[state.stage], total=total, completed=done, rows=state.rows)


if __name__ == "__main__":
    sys.exit(main())
