"""Writes tiny prepared folders with pyarrow alone, and turns batches back into plain Python rows to compare."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dhen.data.schema import DenseColumn, Schema, SparseColumn, SplitCounts

DENSE = (DenseColumn("I1"), DenseColumn("I2"))
SINGLE = (SparseColumn("site", 50), SparseColumn("zone", 9))
MIXED = (
    SparseColumn("tags", 30, is_multi_valued=True),
    SparseColumn("site", 50),
    SparseColumn("words", 2**40, is_multi_valued=True, is_weighted=True, pooling="mean"),
    SparseColumn("zone", 9),
)


@dataclass(frozen=True)
class Prepared:
    """A folder with one split, and its rows as plain Python."""

    folder: Path
    schema: Schema
    rows: list[dict]


def write_prepared(folder, num_rows, sparse=MIXED, dense=DENSE, group_rows=7, groups_per_file=3, seed=0, split="train"):
    """Write random rows. Row r has the label r % 2 and I1 = r."""
    table = random_table(num_rows, sparse, dense, seed)
    write_split(folder / split, table, group_rows, groups_per_file)
    schema = Schema(tuple(dense), tuple(sparse), {split: SplitCounts(num_rows, num_rows // 2)})
    schema.save(folder)
    return Prepared(folder, schema, table.to_pylist())


def write_split(folder, table, group_rows, groups_per_file):
    folder.mkdir(parents=True)
    rows_per_file = group_rows * groups_per_file
    for part, first in enumerate(range(0, max(table.num_rows, 1), rows_per_file)):
        path = folder / f"part-{part:05d}.parquet"
        pa.parquet.write_table(
            table.slice(first, rows_per_file), path, row_group_size=group_rows, compression="zstd", store_schema=True
        )


def random_table(num_rows, sparse, dense, seed=0):
    rng = np.random.default_rng(seed)
    columns = {"label": pa.array((np.arange(num_rows) % 2).astype(np.float32))}
    for index, column in enumerate(dense):
        values = np.arange(num_rows) if index == 0 else rng.normal(size=num_rows)
        columns[column.name] = pa.array(values.astype(np.float32))
    for column in sparse:
        if not column.is_multi_valued:
            columns[column.name] = pa.array(rng.integers(0, column.num_embeddings, num_rows).astype(np.int32))
            continue
        lengths = rng.integers(0, 4, num_rows)
        offsets = pa.array(np.concatenate([[0], lengths.cumsum()]).astype(np.int32))
        total = int(lengths.sum())
        ids = pa.array(rng.integers(0, column.num_embeddings, total))
        columns[column.name] = pa.ListArray.from_arrays(offsets, ids)
        if column.is_weighted:
            weights = pa.array(rng.random(total).astype(np.float32))
            columns[f"{column.name}:weights"] = pa.ListArray.from_arrays(offsets, weights)
    return pa.table(columns)


def rows_of(batch, schema):
    """Return a batch's rows as plain Python, following the documentation of `SparseIds` and `Batch`."""
    count = len(batch.labels_B)
    rows = [{"label": label} for label in batch.labels_B.tolist()]
    for row, values in zip(rows, batch.dense_BN.tolist(), strict=True):
        row |= {column.name: value for column, value in zip(schema.dense, values, strict=True)}
    sparse = batch.sparse
    assert sparse.num_features == len(schema.sparse)
    ids = iter(sparse.ids.tolist())
    weights = None if sparse.weights is None else iter(sparse.weights.tolist())
    for feature, column in enumerate(schema.sparse):
        lengths = [1] * count if sparse.lengths_FB is None else sparse.lengths_FB[feature].tolist()
        for row, length in zip(rows, lengths, strict=True):
            bag = [next(ids) for _ in range(length)]
            bag_weights = [1.0] * length if weights is None else [next(weights) for _ in range(length)]
            row[column.name] = bag if column.is_multi_valued else bag[0]
            if column.is_weighted:
                row[f"{column.name}:weights"] = bag_weights
            else:
                assert bag_weights == [1.0] * length
    assert next(ids, None) is None
    assert weights is None or next(weights, None) is None
    return rows
