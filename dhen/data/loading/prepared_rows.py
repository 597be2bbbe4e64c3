"""Decodes the rows of a prepared split into arrays, after checking its files against the schema.

Shapes: R rows, N dense features, S single-valued sparse features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dhen.data.schema import LABEL, Schema, SparseColumn, weights_column

_PREPARE_AGAIN = "Prepare the data again."


@dataclass(frozen=True)
class RowGroup:
    """A row group in a Parquet file. first_row: number of its first row within the split."""

    path: Path
    index: int
    first_row: int
    num_rows: int


@dataclass(frozen=True)
class Bags:
    """A multi-valued feature. Row r has ids[offsets[r]:offsets[r + 1]] and as many weights; None: all weights are 1."""

    offsets: np.ndarray
    ids: np.ndarray
    weights: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Number of ids in each row, int64."""
        return np.diff(self.offsets)

    def take(self, index: np.ndarray) -> "Bags":
        """The rows `index`, copied."""
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts
        offsets = _offsets(lengths)
        at = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Bags(offsets, self.ids[at], None if self.weights is None else self.weights[at])


@dataclass(frozen=True, eq=False)
class Rows:
    """Decoded rows. rows_R: their numbers within the split. bags: one per multi-valued feature, in schema order.

    Single-valued ids are stored row by row, so that gathering a row touches few cache lines.
    """

    rows_R: np.ndarray
    labels_R: np.ndarray
    dense_RN: np.ndarray
    single_RS: np.ndarray
    bags: tuple[Bags, ...]

    def take(self, index: np.ndarray) -> "Rows":
        """The rows `index`, copied."""
        return Rows(
            self.rows_R[index],
            self.labels_R[index],
            self.dense_RN[index],
            self.single_RS[index],
            tuple(bags.take(index) for bags in self.bags),
        )


def empty_rows(schema: Schema, count: int = 0) -> Rows:
    """Return `count` uninitialized rows with empty bags."""
    num_single = sum(not column.is_multi_valued for column in schema.sparse)
    # Chosen by table size, not file type: it is the same for all files, and only huge tables need int64.
    is_small = all(column.num_embeddings <= 2**31 for column in schema.sparse)
    bags = [
        Bags(np.zeros(count + 1, np.int64), np.empty(0, np.int64), np.empty(0, np.float32) if c.is_weighted else None)
        for c in schema.sparse
        if c.is_multi_valued
    ]
    return Rows(
        np.empty(count, np.int64),
        np.empty(count, np.float32),
        np.empty((count, len(schema.dense)), np.float32),
        np.empty((count, num_single), np.int32 if is_small else np.int64),
        tuple(bags),
    )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Concatenate one or more parts."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        np.concatenate([part.rows_R for part in parts]),
        np.concatenate([part.labels_R for part in parts]),
        np.concatenate([part.dense_RN for part in parts]),
        np.concatenate([part.single_RS for part in parts]),
        tuple(_joined(bags) for bags in zip(*(part.bags for part in parts), strict=True)),
    )


def find_row_groups(folder: Path, split: str, schema: Schema) -> list[RowGroup]:
    """Return the row groups of a split in the order of its rows, without empty ones.

    Raises FileNotFoundError, or ValueError naming the file and column, if the folder does not match the schema.
    """
    if split not in schema.splits:
        raise FileNotFoundError(f"{folder}: there is no split {split!r}. The splits are {', '.join(schema.splits)}.")
    groups, first_row = [], 0
    for path in sorted((folder / split).glob("*.parquet")):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                columns, metadata = file.schema_arrow, file.metadata
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path}: cannot be read as Parquet: {error}. {_PREPARE_AGAIN}") from error
        _check_columns(path, columns, schema)
        for index in range(metadata.num_row_groups):
            num_rows = metadata.row_group(index).num_rows
            if num_rows:
                groups.append(RowGroup(path, index, first_row, num_rows))
            first_row += num_rows
    if first_row != schema.splits[split].rows:
        raise ValueError(
            f"{folder / split}: the Parquet files have {first_row:,} rows, but schema.json says "
            f"{schema.splits[split].rows:,}. The folder is damaged. {_PREPARE_AGAIN}"
        )
    return groups


def mean_bag_sizes(folder: Path, schema: Schema) -> dict[str, float]:
    """Return the mean bag size of each multi-valued feature in train, from file metadata. An empty bag counts as 1."""
    names = [column.name for column in schema.sparse if column.is_multi_valued]
    if not names:
        return {}
    values, rows = dict.fromkeys(names, 0), 0
    for path in sorted((folder / "train").glob("*.parquet")):
        metadata = pyarrow.parquet.read_metadata(path)
        rows += metadata.num_rows
        for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
            for column in (group.column(index) for index in range(group.num_columns)):
                name = column.path_in_schema.split(".list.")[0]
                if name in values:
                    values[name] += column.num_values
    return {name: count / max(rows, 1) for name, count in values.items()}


def decode(groups: Sequence[RowGroup], schema: Schema) -> Rows:
    """Decode row groups one after another. Besides the result, memory holds one group as an Arrow table.

    Raises ValueError naming the file and column for unreadable data, null values, ids outside their table,
    labels other than 0 and 1, and numbers that are not finite.
    """
    rows = empty_rows(schema, sum(group.num_rows for group in groups))
    bags: list[tuple[Bags, ...]] = []
    first = 0
    for group in groups:
        here = slice(first, first + group.num_rows)
        columns = _Columns(group, schema)
        rows.rows_R[here] = np.arange(group.first_row, group.first_row + group.num_rows)
        rows.labels_R[here] = labels = columns.values(LABEL)
        may_be_nan = schema.splits[group.path.parent.name].unlabelled > 0
        columns.check(LABEL, (labels == 0) | (labels == 1) | (np.isnan(labels) & may_be_nan), "0 or 1")
        for at, column in enumerate(schema.dense):
            rows.dense_RN[here, at] = values = columns.values(column.name)
            columns.check(column.name, np.isfinite(values), "finite")
        for at, column in enumerate(column for column in schema.sparse if not column.is_multi_valued):
            rows.single_RS[here, at] = columns.ids(column)
        bags.append(tuple(columns.bags(column) for column in schema.sparse if column.is_multi_valued))
        first = here.stop
    return replace(rows, bags=tuple(_joined(parts) for parts in zip(*bags, strict=True)))


class _Columns:
    """One row group in memory, column by column."""

    def __init__(self, group: RowGroup, schema: Schema) -> None:
        self._path, self._first_row = group.path, group.first_row
        try:
            with pyarrow.parquet.ParquetFile(group.path, page_checksum_verification=True) as file:
                self._table = file.read_row_group(group.index, columns=list(_wanted(schema)))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{group.path}: row group {group.index} cannot be read: {error}. {_PREPARE_AGAIN}"
            ) from error

    def values(self, name: str) -> np.ndarray:
        return self._without_nulls(name, self._table[name]).to_numpy()

    def check(self, name: str, is_good: np.ndarray, allowed: str) -> None:
        if not is_good.all():
            row = int(np.argmin(is_good))
            raise ValueError(
                f"{self._path}: column {name!r} is {self._table[name][row]} in row {self._first_row + row:,} of the "
                f"split. It must be {allowed}. {_PREPARE_AGAIN}"
            )

    def ids(self, column: SparseColumn) -> np.ndarray:
        return self._inside_table(column, self.values(column.name))

    def bags(self, column: SparseColumn) -> Bags:
        offsets, ids = self._lists(column.name)
        ids = self._inside_table(column, ids)
        if not column.is_weighted:
            return Bags(offsets, ids)
        weight_offsets, weights = self._lists(weights_column(column.name))
        if not np.array_equal(weight_offsets, offsets) or not np.isfinite(weights).all():
            raise ValueError(
                f"{self._path}: column {column.name!r}: some rows do not have one finite weight per id. "
                f"{_PREPARE_AGAIN}"
            )
        return Bags(offsets, ids, weights)

    def _lists(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        column = self._without_nulls(name, self._table[name])
        lists = column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)
        offsets = lists.offsets.to_numpy().astype(np.int64)
        return offsets - offsets[0], self._without_nulls(name, lists.flatten()).to_numpy()

    def _without_nulls(self, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        if values.null_count:
            raise ValueError(f"{self._path}: column {name!r} has {values.null_count} null values. {_PREPARE_AGAIN}")
        return values

    def _inside_table(self, column: SparseColumn, ids: np.ndarray) -> np.ndarray:
        """Return `ids` after checking them. FBGEMM silently reads row 0 for an id outside its table."""
        if len(ids) and (ids.min() < 0 or ids.max() >= column.num_embeddings):
            wrong = ids[(ids < 0) | (ids >= column.num_embeddings)][0]
            raise ValueError(
                f"{self._path}: column {column.name!r} has the id {wrong}, but its table has rows 0 to "
                f"{column.num_embeddings - 1}. {_PREPARE_AGAIN}"
            )
        return ids


def _wanted(schema: Schema) -> dict[str, tuple[str, Callable[[pa.DataType], bool]]]:
    """Return the columns to read, with the type that each must have: as text and as a check."""

    def is_id(found: pa.DataType) -> bool:
        return pa.types.is_int32(found) or pa.types.is_int64(found)

    def is_list(kind: Callable[[pa.DataType], bool]) -> Callable[[pa.DataType], bool]:
        return lambda found: (pa.types.is_list(found) or pa.types.is_large_list(found)) and kind(found.value_type)

    wanted = {LABEL: ("float32", pa.types.is_float32)}
    wanted |= {column.name: ("float32", pa.types.is_float32) for column in schema.dense}
    for column in schema.sparse:
        if column.is_multi_valued:
            wanted[column.name] = ("a list of int32 or int64", is_list(is_id))
        else:
            wanted[column.name] = ("int32 or int64", is_id)
        if column.is_weighted:
            wanted[weights_column(column.name)] = ("a list of float32", is_list(pa.types.is_float32))
    return wanted


def _check_columns(path: Path, columns: pa.Schema, schema: Schema) -> None:
    for name, (kind, fits) in _wanted(schema).items():
        if name not in columns.names or not fits(columns.field(name).type):
            found = columns.field(name).type if name in columns.names else "missing"
            raise ValueError(f"{path}: column {name!r} must be {kind}, but is {found}. {_PREPARE_AGAIN}")


def _joined(parts: Sequence[Bags]) -> Bags:
    weights = [part.weights for part in parts if part.weights is not None]
    return Bags(
        _offsets(np.concatenate([part.lengths for part in parts])),
        np.concatenate([part.ids for part in parts]),
        np.concatenate(weights) if weights else None,
    )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), lengths.cumsum()])
