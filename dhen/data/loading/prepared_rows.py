"""Reads the rows of a prepared split, after checking its files against the schema."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet

from dhen.data.schema import FILE, LABEL, ROW, WEIGHT, Schema, kept_column, task_column, weights_column

NUMBER = ":number"
"""Column with the number of each row within the split, from 0. Feature names cannot start with a colon."""
_ORIGINS = pa.schema([(FILE, pa.string()), (ROW, pa.int64())])
_PREPARE_AGAIN = "Prepare the data again."
_TYPES = {"float32": (pa.float32(),), "int32 or int64": (pa.int32(), pa.int64())}


@dataclass(frozen=True)
class RowGroup:
    """A row group in a Parquet file. first_row: number of its first row within the split."""

    path: Path
    index: int
    first_row: int
    num_rows: int


def check_has(folder: Path, split: str, schema: Schema) -> None:
    """Raise FileNotFoundError if the schema has no such split."""
    if not schema.splits:
        raise FileNotFoundError(
            f"{folder}: schema.json has no splits. Run `python tools/prepare_data.py --seal {folder}`."
        )
    if split not in schema.splits:
        raise FileNotFoundError(f"{folder}: there is no split {split!r}. The splits are {', '.join(schema.splits)}.")


def find_row_groups(folder: Path, split: str, schema: Schema) -> list[RowGroup]:
    """Return the row groups of a split in the order of its rows, without empty ones.

    Raises FileNotFoundError, or ValueError naming the file and column, if the folder does not match the schema.
    """
    check_has(folder, split, schema)
    groups = list_row_groups(folder, split, schema)
    num_rows = sum(group.num_rows for group in groups)
    if num_rows != schema.splits[split].rows:
        raise ValueError(
            f"{folder / split}: the Parquet files have {num_rows:,} rows, but schema.json says "
            f"{schema.splits[split].rows:,}. The folder is damaged. {_PREPARE_AGAIN}"
        )
    return groups


def list_row_groups(folder: Path, split: str, schema: Schema) -> list[RowGroup]:
    """Like `find_row_groups`, whatever the number of rows in schema.json."""
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
    return groups


def mean_bag_sizes(folder: Path, schema: Schema) -> dict[str, float]:
    """Return the mean bag size of each multi-valued feature in train, from file metadata. An empty bag counts as 1.

    Of a feature with a max_length, the mean number of ids in a position.
    """
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
    most = {column.name: column.max_length for column in schema.sparse if column.max_length}
    means = {name: count / max(rows, 1) for name, count in values.items()}
    return means | {name: min(means[name] / longest, 1.0) for name, longest in most.items()}


def read_row_group(group: RowGroup, schema: Schema) -> pa.Table:
    """Return the columns that the schema names, and the `NUMBER` of each row.

    Raises ValueError naming the file and column for unreadable data, null values, ids outside their table,
    labels other than 0 and 1, and numbers that are not finite.
    """
    try:
        with pyarrow.parquet.ParquetFile(group.path, page_checksum_verification=True) as file:
            table = file.read_row_group(group.index, columns=list(wanted_columns(schema)))
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{group.path}: row group {group.index} cannot be read: {error}. {_PREPARE_AGAIN}") from error

    def values(name: str) -> np.ndarray:
        column, flat = table[name], flat_values(table[name])
        if nulls := column.null_count or flat.null_count:
            at = pc.index(pc.is_null(column if column.null_count else flat), True).as_py()
            row = group.first_row + at if column.null_count else row_of(name, at)
            raise ValueError(
                f"{group.path}: column {name!r} has {nulls} null values, the first in row {row:,} of the split. "
                f"{_PREPARE_AGAIN}"
            )
        return flat.to_numpy()

    def row_of(name: str, at: int) -> int:
        """The row of the split that has the value `at` of a column's values."""
        is_list = not pa.types.is_primitive(table[name].type)
        return group.first_row + (pc.list_parent_indices(table[name])[at].as_py() if is_list else at)

    def check(name: str, is_good: np.ndarray, allowed: str) -> None:
        if not is_good.all():
            at = int(np.argmin(is_good))
            raise ValueError(
                f"{group.path}: column {name!r} is {flat_values(table[name])[at]} in row {row_of(name, at):,} of the "
                f"split. It must be {allowed}. {_PREPARE_AGAIN}"
            )

    labels = values(LABEL)
    may_be_nan = schema.splits[group.path.parent.name].unlabelled > 0
    check(LABEL, (labels == 0) | (labels == 1) | (np.isnan(labels) & may_be_nan), "0 or 1")
    for name in map(task_column, schema.task_names):
        check(name, np.isin(values(name), (0, 1)) | np.isnan(values(name)), "0, 1 or NaN")
    if schema.has_weights:
        weights = values(WEIGHT)
        may_be_nan = schema.splits[group.path.parent.name].weight is None
        check(WEIGHT, (weights >= 0) & np.isfinite(weights) | (np.isnan(weights) & may_be_nan), "a number from 0 on")
    for column in schema.dense:
        check(column.name, np.isfinite(values(column.name)), "finite")
    for column in schema.sparse:
        ids, last = values(column.name), column.num_embeddings - 1
        # FBGEMM silently reads row 0 for an id outside its table.
        check(column.name, (ids >= 0) & (ids <= last), f"a row of its table, 0 to {last}")
        if column.is_weighted:
            name = weights_column(column.name)
            check(name, np.isfinite(values(name)), "finite")
            num_weights, num_ids = (pc.list_value_length(table[lists]).to_numpy() for lists in (name, column.name))
            if (differ := num_weights != num_ids).any():
                row = int(np.argmax(differ))
                raise ValueError(
                    f"{group.path}: column {name!r} has {num_weights[row]} weights for {num_ids[row]} ids in row "
                    f"{group.first_row + row:,} of the split. There must be one weight per id. {_PREPARE_AGAIN}"
                )
    return table.append_column(NUMBER, pa.array(np.arange(group.first_row, group.first_row + group.num_rows)))


def flat_values(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the values of a column; those of lists one after another."""
    return column if pa.types.is_primitive(column.type) else pc.list_flatten(column)


def wanted_columns(schema: Schema) -> dict[str, tuple[str, bool]]:
    """Return the columns to read, with the type that their values must have, and whether these are in lists."""
    of_rows = (LABEL, *map(task_column, schema.task_names), *([WEIGHT] if schema.has_weights else []))
    wanted = dict.fromkeys((*of_rows, *(column.name for column in schema.dense)), ("float32", False))
    for column in schema.sparse:
        wanted[column.name] = ("int32 or int64", column.is_multi_valued)
        if column.is_weighted:
            wanted[weights_column(column.name)] = ("float32", True)
    return wanted


def _check_columns(path: Path, columns: pa.Schema, schema: Schema) -> None:
    for name, (kind, is_list) in wanted_columns(schema).items():
        found = columns.field(name).type if name in columns.names else "missing"
        has_lists = isinstance(found, pa.ListType | pa.LargeListType)
        if has_lists != is_list or (found.value_type if has_lists else found) not in _TYPES[kind]:
            must_be = f"a list of {kind}" if is_list else kind
            raise ValueError(f"{path}: column {name!r} must be {must_be}, but is {found}. {_PREPARE_AGAIN}")


class Origins:
    """Reads the files and row numbers of a prepared split in order; null if the folder does not have them.

    first_row: where to begin. keep: columns whose raw values to read too; `kept` has their names and types.
    """

    def __init__(self, folder: Path, split: str, first_row: int = 0, keep: Sequence[str] = ()) -> None:
        parts = sorted((folder / split).glob("*.parquet"))
        present = pyarrow.parquet.read_schema(parts[0])
        kept = [present.field(kept_column(name)) for name in keep]
        self.kept = [pa.field(name, item.type) for name, item in zip(keep, kept, strict=True)]
        columns = pa.schema([*_ORIGINS, *kept])
        while len(parts) > 1 and (rows := pyarrow.parquet.read_metadata(parts[0]).num_rows) <= first_row:
            parts, first_row = parts[1:], first_row - rows
        self._batches = pyarrow.dataset.dataset(parts, schema=columns, format="parquet").to_batches()
        self._waiting = columns.empty_table()
        self.take(first_row)

    def take(self, count: int) -> list[pa.ChunkedArray]:
        """Return the files, row numbers and kept columns of the next `count` rows."""
        while self._waiting.num_rows < count:
            self._waiting = pa.concat_tables([self._waiting, pa.Table.from_batches([next(self._batches)])])
        taken, self._waiting = self._waiting.slice(0, count), self._waiting.slice(count)
        return taken.columns
