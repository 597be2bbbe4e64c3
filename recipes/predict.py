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

<output>.unseen.csv says how many values of each feature training never saw. The script runs on any number of ranks.
"""

import math
from pathlib import Path

import pyarrow as pa
import torch

from dhen.data.loading.batches import BatchLoader
from dhen.data.loading.lanes import share
from dhen.data.loading.prepared_rows import Origins
from dhen.runtime import topology as job
from dhen.runtime.messages import log_to_stderr, user_errors
from dhen.training.evaluation.unseen import UNSEEN_FILE, report_unseen, unseen_values, write_unseen
from dhen.training.loop import with_ids_ahead
from dhen.training.parallel_model import ScoringDhen
from dhen.training.saved.predictions import columns_of, join_parts, part_writer, parts_folder, prediction_file
from dhen.training.saved.scoring import load_for_scoring, parse_scoring_arguments


def main() -> None:
    """Read the arguments, join the job, score."""
    log_to_stderr()
    with user_errors():
        arguments = parse_scoring_arguments(None, __doc__)
        path = prediction_file(arguments.output)
        topology = job.start()
        model, loader = load_for_scoring(arguments, topology)
        rows = write_predictions(model, loader, path)
    if topology.is_main:
        print(f"{rows:,} rows scored and written to {path}")
    job.stop()


def write_predictions(model: ScoringDhen, loader: BatchLoader, path: Path) -> int:
    """Score all rows. Each rank writes a stretch of them: a part of a folder, or of a file, whose parts are joined.

    Communicates; all ranks call it. Returns the number of rows.
    """
    topology, parts, tasks = model.topology, parts_folder(path), model.config.tasks
    columns = columns_of(tasks)
    origins = Origins(loader.folder, loader.split, share(loader.num_rows, topology.rank, topology.world_size).start)
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
