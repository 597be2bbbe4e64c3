"""The head of raw data: its first rows, prepared like the whole, and what they say about the size of the whole."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from dhen.data.preparation.encoding.encoder import MOST_KEYS, hash_rows
from dhen.data.preparation.encoding.vocabulary import load_vocabulary
from dhen.data.schema import ESTIMATED_KEYS, SHARES, Schema, SparseColumn


def is_partial(schema: Schema) -> bool:
    """Whether the folder of this schema has only a part of the rows."""
    return min(schema.source.get(SHARES, {}).values(), default=1) < 1


def whole_schema(folder: Path) -> Schema:
    """The schema of all rows. If `folder` has only the head, numbers of rows and keys are estimates.

    The tables of fine-tuning are left as they are.
    """
    head = Schema.load(folder)
    if not is_partial(head):
        return head
    shares, splits, sparse = head.source[SHARES], {}, head.sparse
    for split, counts in head.splits.items():
        rows, clicks = (round(count / shares[split]) for count in (counts.rows, counts.clicks))
        tasks = {name: tuple(round(count / shares[split]) for count in each) for name, each in counts.tasks.items()}
        splits[split] = replace(counts, rows=rows, clicks=clicks, tasks=tasks)
    if not head.source["settings"]["like"]:
        sparse = tuple(_grown(column, head, folder) for column in sparse)
    return replace(head, splits=splits, sparse=sparse)


def _grown(column: SparseColumn, head: Schema, folder: Path) -> SparseColumn:
    """The column with the keys of all rows.

    The number of keys that occur m times or more grows like a power of the rows. The exponent is m times the share of
    these keys that occur just m times. It falls as rows are added, so this is an upper estimate. With hash_size auto,
    the number of keys is all that is known, and keys = rows^exponent (Heaps' law) gives the exponent.
    """
    settings, keys_of = head.source["settings"], head.source.get(ESTIMATED_KEYS, {})
    if column.table_name not in keys_of and column.encoding != "vocabulary":
        return column
    share = head.source[SHARES]["train"]
    if column.table_name in keys_of:
        keys, rows = max(keys_of[column.table_name], 1), max(head.splits["train"].rows, 2)
        keys = round(keys / share ** min(1.0, math.log(keys, rows)))
        return replace(column, num_embeddings=hash_rows(keys, settings["max_hash_size"]))
    counts = load_vocabulary(folder, column.table_name).counts
    exponent = min(1.0, column.min_count * float(np.mean(counts == column.min_count))) if len(counts) else 0.0
    keys = round(len(counts) / share**exponent)
    if keys > MOST_KEYS and settings["id_encoding"] == "auto" and settings["hash_size"] != "auto":
        return replace(column, encoding="hash", num_embeddings=settings["hash_size"] or MOST_KEYS)
    return replace(column, num_embeddings=keys + 1)
