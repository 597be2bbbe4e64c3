"""Accepts a prepared folder that another program wrote (recipes/DATA.md): checks, counts and digests its values."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet
import xxhash

from dhen.data.loading.prepared_rows import list_row_groups, read_row_group, wanted_columns
from dhen.data.preparation.vocabulary import VOCABULARY_FOLDER, check_vocabulary, vocabulary_path
from dhen.data.schema import LABEL, SCHEMA_FILE, SPLITS, Schema, SplitCounts


def seal(folder: Path) -> Schema:
    """Check all values, and write into schema.json how many rows and clicks each split has, and a digest of them.

    Raises FileNotFoundError, or ValueError that names the file and, where there is one, the column, row and value.
    """
    unsealed = Schema.load(folder)
    _check_all_are_read(folder)
    splits = [split for split in SPLITS if any((folder / split).glob("*.parquet"))]
    if not splits:
        raise FileNotFoundError(f"{folder}: there are no Parquet files in train/, validation/ and test/. Write them.")
    for name in unsealed.looked_up:
        _check_vocabulary(folder, name, unsealed)
    schema = replace(unsealed, splits={split: _counts(folder, split, unsealed) for split in splits})
    schema.save(folder)
    return schema


def _counts(folder: Path, split: str, unsealed: Schema) -> SplitCounts:
    """Read and check a split. Equal values in equal row groups have an equal digest."""
    schema = replace(unsealed, splits={split: SplitCounts(rows=0, clicks=0)})
    rows, clicks, digest = 0, 0, xxhash.xxh3_128()
    for group in list_row_groups(folder, split, schema):
        table = read_row_group(group, schema).select(list(wanted_columns(schema)))
        rows += table.num_rows
        clicks += int(np.count_nonzero(table[LABEL].to_numpy() == 1))
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    if rows == 0:
        raise ValueError(f"{folder / split}: the Parquet files have no rows. Remove the folder, or write rows.")
    return SplitCounts(rows, clicks, digest=digest.hexdigest())


def _check_all_are_read(folder: Path) -> None:
    """Raise ValueError if there are Parquet files that belong to no split, such as Spark's of partitionBy."""
    read = [folder / split for split in SPLITS]
    others = [path for path in sorted(folder.rglob("*.parquet")) if path.parent not in read]
    others = [path for path in others if path.relative_to(folder).parts[0] != VOCABULARY_FOLDER]
    if others:
        more = f" and {len(others) - 1:,} more Parquet files are" if len(others) > 1 else " is"
        raise ValueError(
            f"{others[0]}{more} not directly in train/, validation/ or test/, so training would not read the rows. "
            f"Move the file into one of them (with partitionBy, Spark writes folders: leave it out), or remove it."
        )


def _check_vocabulary(folder: Path, name: str, schema: Schema) -> None:
    check_vocabulary(folder, name)
    path = vocabulary_path(folder, name)
    num_keys = pyarrow.parquet.read_metadata(path).num_rows
    (rows,) = (column.num_embeddings for column in schema.sparse if column.name == name)
    if rows != num_keys + 1:
        raise ValueError(
            f"{path}: there are {num_keys:,} keys, but {SCHEMA_FILE} says that {name!r} has num_embeddings {rows:,}. "
            f"Use {num_keys + 1:,}: one per key, and row 0."
        )
