"""Score rows with a trained model: write their click probabilities to a file: Parquet, CSV (.csv) or JSON (.jsonl).

If --output has no such ending, it is a folder of Parquet files, one from each rank, whose names sort in input order.

    deepspeed recipes/predict.py --model_name_or_path runs/frappe --dataset_name rows.csv \\
        --dataset_schema recipes/configs/schemas/frappe.yaml --output scores.parquet

The output has one entry per row, in input order, with these columns:

    row         number of the row, from 0; skipped bad rows are not counted
    prediction  probability of a click
    label       null if the rows have no labels; labels are optional
    prediction_TASK, label_TASK
                the same for each further task of the model
    file, line  raw file and line number (row number in Parquet) from 1, as in bad_rows.csv; null without raw files
    COLUMN      raw values of each column that --keep names

The name - means standard input and output, the latter as CSV; for JSON lines, use --output=-.jsonl:

    cat rows.csv | python recipes/predict.py --model_name_or_path runs/frappe --dataset_name - --keep user --output -

<output>.unseen.csv says how many values of each feature training never saw. The script runs on any number of ranks.
"""

import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import pyarrow as pa
import torch

from dhen.data.loading.batches import BatchLoader
from dhen.data.loading.lanes import share
from dhen.data.loading.prepared_rows import Origins
from dhen.model.configuration_dhen import option
from dhen.runtime import topology as job
from dhen.runtime.collectives import rank_zeros
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.training.evaluation.unseen import UNSEEN_FILE, report_unseen, unseen_values, write_unseen
from dhen.training.loop import with_ids_ahead
from dhen.training.parallel_model import ScoringDhen
from dhen.training.saved.predictions import (
    columns_of,
    join_parts,
    own_stdout,
    part_writer,
    parts_folder,
    prediction_file,
)
from dhen.training.saved.scoring import ScoringArguments, load_for_scoring, parse_scoring_arguments


@dataclass
class PredictionArguments(ScoringArguments):
    """Which rows to score, with which model, and what to write."""

    keep: list[str] = option(
        [], "Columns of the raw files, such as user and item, whose values to write beside the predictions."
    )


def main() -> None:
    """Read the arguments, join the job, score."""
    log_to_stderr()
    with user_errors():
        arguments = parse_scoring_arguments(None, __doc__, PredictionArguments)
        arguments.keep = list(dict.fromkeys(arguments.keep))
        path = prediction_file(arguments.output)
        stdout = own_stdout() if str(path.with_suffix("")) == "-" else None
        topology = job.start()
        model, loader = load_for_scoring(arguments, topology)
        file = Path(rank_zeros(topology, mkdtemp)) / path.name if stdout else path
        try:
            rows = write_predictions(model, loader, file, arguments.keep)
            if stdout and topology.is_main:
                with suppress(BrokenPipeError), file.open("rb") as written, stdout:  # such as | head
                    shutil.copyfileobj(written, stdout)
        finally:
            if stdout and topology.is_main:
                shutil.rmtree(file.parent)
    if topology.is_main:
        print(f"{rows:,} rows scored and written to {path}")
    job.stop()


def write_predictions(model: ScoringDhen, loader: BatchLoader, path: Path, keep: Sequence[str] = ()) -> int:
    """Score all rows. Each rank writes a stretch of them: a part of a folder, or of a file, whose parts are joined.

    Communicates; all ranks call it. Returns the number of rows.
    """
    topology, parts, tasks = model.topology, parts_folder(path), model.config.tasks
    first_row = share(loader.num_rows, topology.rank, topology.world_size).start
    origins = Origins(loader.folder, loader.split, first_row, keep)
    columns = columns_of(tasks, origins.kept, path.suffix.lower())
    with model.evaluating(), part_writer(parts, topology.rank, columns) as writer:
        for batch, ids in with_ids_ahead(model, loader.epoch(0)):
            output = model.forward(model.look_up(ids), batch.dense_BN, batch.sparse)
            values = [batch.rows_B, output.logits.sigmoid(), batch.labels_B]
            unknown_B = torch.full_like(batch.labels_B, math.nan)
            known = {name: batch.tasks_BT[:, column] for column, name in enumerate(loader.schema.task_names)}
            for place, name in enumerate(tasks):
                values += [output.task_logits[:, place].sigmoid(), known.get(name, unknown_B)]
            arrays = [pa.array(each.cpu().numpy(), from_pandas=True) for each in values]
            writer.write_table(pa.table([*arrays, *origins.take(len(batch.rows_B))], schema=columns))
    unseen = unseen_values(model, loader)  # by now all ranks are done
    if topology.is_main:
        if parts != path:
            join_parts(parts, topology.world_size, path)
        report_unseen(loader.split, unseen, loader.schema)
        write_unseen(path.with_name(f"{path.stem}.{UNSEEN_FILE}"), {loader.split: unseen})
    return loader.num_rows


if __name__ == "__main__":
    main()
