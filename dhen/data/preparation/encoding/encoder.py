"""Converts raw values to model inputs: ids by hash, vocabulary or bins, and transformed dense values."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa

from dhen.data.formats.canonical import canonical_keys
from dhen.data.formats.column_role import SparseRole
from dhen.data.formats.columns import list_lengths, lists_of
from dhen.data.formats.raw_rows import DataError
from dhen.data.formats.roles import ColumnRoles
from dhen.data.hashing import hashed_ids
from dhen.data.preparation.encoding.numbers import bin_ids, dense_values
from dhen.data.preparation.encoding.vocabulary import KeyIds, Vocabulary
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.schema import (
    LABEL,
    MISSING_ID,
    WEIGHT,
    DenseColumn,
    Schema,
    SparseColumn,
    is_task_column,
    weights_column,
)

MOST_KEYS = 1_000_000
"""The largest vocabulary that `auto` makes."""
HASH_SIZE, _AUTO_HASH_SIZE = 100_000, MOST_KEYS
MAX_HASH_SIZE = 40_000_000
"""The largest table that the hash_size `auto` makes. It is that of the MLPerf benchmark for recommendation."""
_ROWS_PER_KEY, _LEAST_ROWS = 2, 4096


@dataclass(frozen=True)
class Encoder:
    """Encodes raw tables (`RawChunk.table`) as prepared tables (dhen/data/schema.py)."""

    dense: tuple[DenseColumn, ...]
    sparse: tuple[SparseColumn, ...]
    vocabularies: Mapping[str, Vocabulary | KeyIds]
    """By table."""

    def encode(self, raw: pa.Table) -> pa.Table:
        """Return the same rows with ids and transformed values."""
        return self.encode_and_count(raw)[0]

    def encode_and_count(self, raw: pa.Table) -> tuple[pa.Table, dict[str, np.ndarray]]:
        """Like `encode`; also returns, by feature with a vocabulary, how many values of each row are not a key."""
        unknown: dict[str, np.ndarray] = {}
        of_rows = [name for name in raw.column_names if name in (LABEL, WEIGHT) or is_task_column(name)]
        encoded: dict[str, pa.Array] = {name: raw[name].combine_chunks() for name in of_rows}
        for dense in self.dense:
            numbers = raw[dense.missing_of or dense.name].to_numpy()
            encoded[dense.name] = pa.array(dense_values(numbers, dense), from_pandas=False)
        for sparse in self.sparse:
            if sparse.encoding == "bins":
                encoded[sparse.name] = pa.array(bin_ids(raw[sparse.name].to_numpy(), sparse))
                continue
            column = raw[sparse.name].combine_chunks()
            keys = canonical_keys(column.flatten() if sparse.is_multi_valued else column)
            ids, is_key = self._ids(keys, sparse), keys.is_valid()
            row = np.arange(len(column))
            if sparse.is_multi_valued:
                row = np.repeat(row, list_lengths(column))
            if sparse.encoding == "vocabulary":
                is_unknown = is_key.to_numpy(zero_copy_only=False) & (ids.to_numpy() == MISSING_ID)
                unknown[sparse.name] = np.bincount(row[is_unknown], minlength=len(column))
            if not sparse.is_multi_valued:
                encoded[sparse.name] = ids
                continue
            # A blank in a list is no id.
            lengths = np.bincount(row[is_key.to_numpy(zero_copy_only=False)], minlength=len(column))
            encoded[sparse.name] = lists_of(lengths, ids.filter(is_key))
            if sparse.is_weighted:
                name = weights_column(sparse.name)
                encoded[name] = lists_of(lengths, raw[name].combine_chunks().flatten().filter(is_key))
        return pa.table(encoded), unknown

    def _ids(self, keys: pa.Array, sparse: SparseColumn) -> pa.Array:
        if sparse.encoding == "hash":
            ids = hashed_ids(keys, sparse.table_name, sparse.num_embeddings)
        else:
            ids = self.vocabularies[sparse.table_name].ids(keys)
        return pa.array(ids.astype(np.int32 if sparse.num_embeddings <= 2**31 else np.int64))


@dataclass(frozen=True)
class AskedEncoding:
    """How the features of a table are to be encoded. auto: by a vocabulary of up to MOST_KEYS keys, else by the hash.

    hash_size: auto for `hash_rows`, which only the encoding `hash` has.
    """

    encoding: Literal["auto", "hash", "vocabulary"]
    hash_size: int | Literal["auto"]
    min_count: int


def hash_rows(num_keys: int, most: int | None) -> int:
    """Rows of a hashed table for about so many distinct keys, at most `most` (by default MAX_HASH_SIZE).

    They are twice the keys, rounded up to 1, 1.25, 1.5 or 1.75 times a power of two, so that a few more keys seldom
    change the size. A small table costs nothing, so it has enough rows that even two of ten keys hardly ever meet.
    """
    wanted = max(_ROWS_PER_KEY * num_keys, _LEAST_ROWS)
    step = 1 << (wanted.bit_length() - 3)
    return min(math.ceil(wanted / step) * step, most or MAX_HASH_SIZE)


def asked_encodings(roles: ColumnRoles, settings: PreparationSettings) -> dict[str, AskedEncoding]:
    """By table without bins: what the dataset_schema says, else the settings, else the model named as `like`."""
    like = {column.table_name: column for column in Schema.load(Path(settings.like)).sparse} if settings.like else {}
    like = {name: column for name, column in like.items() if column.encoding != "bins"}
    asked = {}
    for name, role in roles.tables.items():
        if role.bins is not None:
            continue
        told = role.encoding or (settings.id_encoding if settings.id_encoding != "auto" else None)
        told = "vocabulary" if role.pretrained else told
        old = like.get(name)
        size = role.hash_size or settings.hash_size
        encoding = told or (old.encoding if old else "hash" if size else "auto")
        if size in (None, "auto") and old is not None and old.encoding == "hash":
            size = old.num_embeddings
        default = _AUTO_HASH_SIZE if encoding == "auto" else HASH_SIZE
        count = role.min_count or settings.min_count or (old.min_count if old else 1)
        asked[name] = AskedEncoding(encoding, size or default, count)
    return asked


def new_columns(
    roles: ColumnRoles,
    asked: Mapping[str, AskedEncoding],
    table_rows: Mapping[str, int],
    fitted: Mapping[str, tuple[float, ...]],
) -> tuple[tuple[DenseColumn, ...], tuple[SparseColumn, ...]]:
    """Return the schema's dense and sparse columns.

    asked: by table. table_rows: of each one that has a vocabulary. fitted: the edges of each feature with bins, and
    (mean, standard deviation) of each with a scale.
    """
    dense: list[DenseColumn] = []
    for role in roles.dense:
        dense.append(DenseColumn(role.name, role.transform, *fitted.get(role.name, ())))
        dense += [DenseColumn(name, "identity", missing_of=role.name) for name in role.features[1:]]
    sparse = tuple(
        SparseColumn(role.name, len(fitted[role.name]) + 2, "bins", bins=role.bins, edges=fitted[role.name])
        if role.bins is not None
        else SparseColumn(
            name=role.name,
            num_embeddings=table_rows.get(role.table_name, asked[role.table_name].hash_size),
            encoding="vocabulary" if role.table_name in table_rows else "hash",
            min_count=asked[role.table_name].min_count,
            is_multi_valued=role.is_multi_valued,
            is_weighted=role.is_weighted,
            pooling=role.pooling,
            table=None if role.table == role.name else role.table,
            target=role.target,
            max_length=role.max_length,
        )
        for role in roles.sparse
    )
    return tuple(dense), sparse


def check_same_features(roles: ColumnRoles, schema: Schema, folder: Path) -> None:
    """Raise DataError unless raw data with these roles has the features in the schema of `folder`."""
    present = {role.name: "dense" for role in roles.dense} | {role.name: _kind(role) for role in roles.sparse}
    wanted = {column.missing_of or column.name: "dense" for column in schema.dense}
    wanted |= {column.name: _kind(column) for column in schema.sparse}
    for name, kind in wanted.items():
        if present.get(name) != kind:
            has = f"has it as {present[name]}" if name in present else "does not have it"
            raise DataError(
                f"{folder}: the feature {name!r} is {kind}, but the raw data {has}. Use data with the same features, "
                f"or prepare the data without schema_from."
            )


def check_same_meaning(roles: ColumnRoles, trained: ColumnRoles, folder: Path) -> None:
    """Raise DataError if these roles make other categories or labels of the same values. Columns may have other names,
    and text may be laid out in another way.
    """
    pairs = [(old, new, ("transform", "part", "bins")) for old in trained.sparse for new in roles.sparse]
    pairs = [(old.name, old, new, keys) for old, new, keys in pairs if old.name == new.name]
    tasks = trained.tasks.keys() & roles.tasks.keys()
    pairs += [(name, trained.tasks[name], roles.tasks[name], ("given_click",)) for name in tasks]
    if None not in (trained.label.greater_than, roles.label.greater_than):  # a label may be written in another way
        pairs.append(("label", trained.label, roles.label, ("greater_than",)))
    for name, old, new, keys in pairs:
        for key in keys:
            was, given = getattr(old, key), getattr(new, key)
            if was != given:
                raise DataError(
                    f"{folder}: {key} of {name!r} was {was!r} in training, but the schema of these rows says "
                    f"{given!r}. Use the same, or leave out dataset_schema if the columns are those of training."
                )


def _kind(sparse: SparseRole | SparseColumn) -> str:
    kind = "multi-valued sparse" if sparse.is_multi_valued else "sparse" if sparse.bins is None else "sparse with bins"
    return f"weighted {kind}" if sparse.is_weighted else kind
