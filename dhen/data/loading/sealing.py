"""Accepts a prepared folder that another program wrote (recipes/DATA.md): checks, counts and digests its values."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash

from dhen.data.loading.prepared_rows import list_row_groups, read_row_group, wanted_columns
from dhen.data.preparation.encoding.vocabulary import VOCABULARY_FOLDER, check_vocabulary
from dhen.data.preparation.writing import add_counts, task_counts
from dhen.data.schema import LABEL, SCHEMA_FILE, SPLITS, WEIGHT, Schema, SplitCounts, task_column, weights_column
from dhen.model.sparse_feature import ORDERED


def seal(folder: Path) -> Schema:
    """Check all values, and write into schema.json how many rows and clicks each split has, and a digest of them.

    Raises FileNotFoundError, or ValueError that names the file and, where there is one, the column, row and value.
    """
    unsealed = Schema.load(folder)
    _check_schema(folder / SCHEMA_FILE, unsealed)
    _check_all_are_read(folder)
    splits = [split for split in SPLITS if any((folder / split).glob("*.parquet"))]
    if not splits:
        raise FileNotFoundError(f"{folder}: there are no Parquet files in train/, validation/ and test/. Write them.")
    for column in unsealed.sparse:
        if column.encoding == "vocabulary":
            check_vocabulary(folder, column)
    schema = replace(unsealed, splits={split: _counts(folder, split, unsealed) for split in splits})
    schema.save(folder)
    return schema


def _check_schema(path: Path, schema: Schema) -> None:
    """Raise ValueError if the features' names are not different, or if what it says of one does not go together."""

    def refuse(feature: str, what: str) -> None:
        raise ValueError(f"{path}: feature {feature!r} {what}")

    weights = [weights_column(column.name) for column in schema.sparse if column.is_weighted]
    names = [LABEL, *map(task_column, schema.task_names), *weights]
    names += [column.name for column in (*schema.dense, *schema.sparse)]
    for name in (name for name in names if names.count(name) > 1):
        refuse(name, f"has the name of another column. Rename one: names must differ, also from {LABEL!r}.")
    numbers = [column.name for column in schema.dense if column.missing_of is None]
    for column in schema.dense:
        if (column.mean is None) != (column.std is None):
            refuse(column.name, f"has mean {column.mean} and std {column.std}. Give both, or neither.")
        if column.missing_of not in (None, *numbers):
            refuse(column.name, f"has missing_of {column.missing_of!r}. Use a dense feature: {', '.join(numbers)}.")
    tables = {column.table_name: column for column in schema.sparse}
    for column in schema.sparse:
        first = tables[column.table_name]
        if (column.encoding, column.num_embeddings) != (first.encoding, first.num_embeddings):
            refuse(column.name, f"has another encoding or num_embeddings than {first.name!r}, but shares its table.")
        if column.is_weighted and not column.is_multi_valued:
            refuse(column.name, "is weighted, but not multi-valued. Set is_multi_valued to true, and write lists.")
        needs = (column.target is not None, column.max_length is not None)
        is_ordered = column.pooling in ORDERED
        if {*needs} != {is_ordered} or (is_ordered and (not column.is_multi_valued or column.is_weighted)):
            refuse(
                column.name, "needs target, max_length and lists without weights for an ordered pooling, and only then."
            )
        edges, has_bins = column.edges, column.encoding == "bins"
        if {has_bins, column.bins is not None, edges is not None} != {has_bins}:
            refuse(column.name, f"has encoding {column.encoding!r}. Give bins and edges with 'bins', and only then.")
        if edges is not None and any(low >= high for low, high in pairwise(edges)):
            refuse(column.name, f"has edges {list(edges)}. They must ascend. Sort them, and remove duplicates.")


def _counts(folder: Path, split: str, unsealed: Schema) -> SplitCounts:
    """Read and check a split. Equal values in equal row groups have an equal digest."""
    schema = replace(unsealed, splits={split: SplitCounts(rows=0, clicks=0, weight=0.0)})
    rows, clicks, digest, weights, tasks = 0, 0, xxhash.xxh3_128(), [], {}
    for group in list_row_groups(folder, split, schema):
        table = read_row_group(group, schema).select(list(wanted_columns(schema)))
        rows += table.num_rows
        clicks += int(np.count_nonzero(table[LABEL].to_numpy() == 1))
        tasks = add_counts(tasks, task_counts(table))
        if schema.has_weights:
            weights.append(table[WEIGHT].to_numpy().sum(dtype=np.float64))
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    if rows == 0:
        raise ValueError(f"{folder / split}: the Parquet files have no rows. Remove the folder, or write rows.")
    weight = float(f"{sum(weights):.8g}") if schema.has_weights else None
    if weight == 0:
        raise ValueError(f"{folder / split}: the weights of all rows are 0. Correct the column {WEIGHT!r}.")
    return SplitCounts(rows, clicks, digest=digest.hexdigest(), weight=weight, tasks=tasks)


def _check_all_are_read(folder: Path) -> None:
    """Raise ValueError if there are Parquet files that belong to no split, such as Spark's of partitionBy."""
    read = [folder / name for name in (*SPLITS, VOCABULARY_FOLDER)]
    others = [path for path in sorted(folder.rglob("*.parquet")) if path.parent not in read]
    if others:
        more = f" and {len(others) - 1:,} more Parquet files are" if len(others) > 1 else " is"
        raise ValueError(
            f"{others[0]}{more} not directly in train/, validation/ or test/, so training would not read the rows. "
            f"Move the file into one of them (with partitionBy, Spark writes folders: leave it out), or remove it."
        )
