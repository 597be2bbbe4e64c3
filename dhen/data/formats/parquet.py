"""Parquet files. A YAML schema names the columns (dhen/data/formats/roles.py). Multi-valued features are list columns.

Holds one batch of rows in memory, plus what Parquet needs to read it: at most one row group of the file.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from dhen.data.formats.columns import is_list
from dhen.data.formats.delimited import typed_table, with_kept
from dhen.data.formats.first_bytes import PARQUET, complaint, first_bytes
from dhen.data.formats.raw_files import can_seek, is_url, open_file
from dhen.data.formats.raw_rows import WHOLE, DataError, RawChunk, RowChecks, Stretch
from dhen.data.formats.roles import ColumnRoles

BATCH_ROWS = 65_536
_INSTEAD_OF_TIME = {
    "label": "Make a column of 0 and 1.",
    "a number": "List it under sparse, with the parts that matter: {{name: {}, parts: [hour, weekday, day]}}; or "
    "convert it to a number, such as days before the click.",
    "weights": "Convert it to a number.",
}
"""What to do with a column of dates or times, by its role."""


@dataclass(frozen=True)
class ParquetReader:
    """Reads Parquet files."""

    roles: ColumnRoles
    is_label_required: bool = True

    def stretches(self, file: str, num_bytes: float) -> list[Stretch]:
        """Cut a file at its row groups (`Reader.stretches`), by the size of their decompressed columns."""
        with open_parquet(file) as parquet:
            sizes = [parquet.metadata.row_group(i).total_byte_size for i in range(parquet.num_row_groups)]
        found, start, size, left = [], 0, 0, sum(sizes)
        for end, more in enumerate(sizes, start=1):
            size, left = size + more, left - more
            if end == len(sizes) or min(size, left) >= num_bytes:
                found.append(Stretch(start, end, size))
                start, size = end, 0
        return found or [WHOLE]

    def chunks(self, file: str, stretch: Stretch = WHOLE) -> Iterator[RawChunk]:
        """Yield the rows of `file` in order. Raises FileNotFoundError, DataError, or ValueError for wrong columns."""
        with open_parquet(file) as parquet:
            present = parquet.schema_arrow.names
            self.roles.check_columns(present, file, is_label_required=self.is_label_required)
            check_types(parquet.schema_arrow, self.roles, file)
            used = used_columns(self.roles, present, self.roles.kept)
            groups = range(parquet.num_row_groups)[stretch.start : stretch.end]
            num_rows = max(sum(parquet.metadata.row_group(i).num_rows for i in groups), 1)
            row = first = stretch.rows_before
            try:
                for batch in parquet.iter_batches(BATCH_ROWS, list(groups), columns=used, use_threads=False):
                    raw = {name: batch.column(name) for name in used}
                    share = (row - first + len(batch)) / num_rows
                    bytes_read = stretch.start + int(stretch.num_bytes * share)
                    yield typed_chunk(raw, self.roles, file, row, self.is_label_required, bytes_read)
                    row += len(batch)
            except (pa.ArrowInvalid, OSError) as error:
                raise DataError(
                    f"{file}: damaged after row {row} ({' '.join(str(error).split())}). Download or copy it again."
                ) from error

    def column_names(self, file: str) -> list[str]:
        """Return the names of all columns in `file`."""
        with open_parquet(file) as parquet:
            return parquet.schema_arrow.names

    def row_counts(self, file: str, stretch: Stretch = WHOLE) -> Iterator[tuple[int, int]]:
        """Yield the number of rows, from the metadata."""
        with open_parquet(file) as parquet:
            groups = range(parquet.num_row_groups)[stretch.start : stretch.end]
            rows = sum(parquet.metadata.row_group(i).num_rows for i in groups)
            yield rows, stretch.start + stretch.num_bytes


def typed_chunk(
    raw: dict[str, pa.Array], roles: ColumnRoles, file: str, row: int, is_label_required: bool, bytes_read: int = 0
) -> RawChunk:
    """Return a chunk made of raw columns. Its first row is row `row` + 1 of the file."""
    num_rows = len(next(iter(raw.values())))
    numbers = np.arange(row + 1, row + num_rows + 1)
    checks = RowChecks(file, numbers, lambda i: str({name: column[i].as_py() for name, column in raw.items()}))
    table = typed_table(raw, roles, checks, is_label_required=is_label_required)
    return checks.finish(with_kept(table, raw, roles), end_row=row + num_rows, bytes_read=bytes_read)


def used_columns(roles: ColumnRoles, present: list[str], kept: Collection[str] = ()) -> list[str]:
    """Return the columns that have a role, or are kept, in the order of the file."""
    wanted = {column for feature in (*roles.dense, *roles.sparse) for column in feature.columns}
    wanted |= {*roles.label_columns, roles.time_column, roles.row_weight, *kept}
    return [name for name in present if name in wanted]


def check_types(schema: pa.Schema, roles: ColumnRoles, file: str) -> None:
    """Raise DataError if a column's type does not fit its role. The message says what to do instead."""
    for name, kind in roles.kept.items():
        if kind not in (None, schema.field(name).type):
            raise DataError(
                f"{file}: column {name!r} has the type {schema.field(name).type}, but {kind} in the first file. "
                "Convert it, or remove it from --keep."
            )
    lists = {c for feature in roles.sparse if feature.is_multi_valued for c in feature.columns}
    singles = {*roles.label_columns, *(feature.source for feature in (*roles.dense, *roles.sparse))} - lists
    transformed = [feature.source for feature in roles.sparse if feature.transform is not None]
    numbers = dict.fromkeys(roles.label_columns, "label") | dict.fromkeys([*roles.numbers, *transformed], "a number")
    numbers |= {roles.row_weight: "a number"}
    numbers |= {feature.weights: "weights" for feature in roles.sparse if feature.weights is not None}
    dates = {feature.source for feature in roles.sparse if feature.part is not None}
    singles |= {roles.time_column, roles.row_weight}
    dates.add(roles.time_column)
    for name in used_columns(roles, schema.names):
        kind = schema.field(name).type
        if name in singles and is_list(kind):
            raise DataError(
                f"{file}: column {name!r} has lists ({kind}). If it is a sparse feature, write "
                f"{{name: {name}, multi_valued: true}} in the schema."
            )
        inner = kind.value_type if is_list(kind) else kind
        inner = inner.value_type if pa.types.is_dictionary(inner) else inner
        if pa.types.is_nested(inner):
            raise DataError(f"{file}: column {name!r} has the type {kind}. Use numbers, strings, or lists of them.")
        if pa.types.is_duration(inner) or pa.types.is_interval(inner):
            raise DataError(f"{file}: column {name!r} has the type {kind}. Convert it to a number of seconds.")
        if name in numbers and pa.types.is_temporal(inner):
            raise DataError(
                f"{file}: column {name!r} is {numbers[name]}, but has the type {kind}. As a number, a time would "
                f"depend on the file's unit. {_INSTEAD_OF_TIME[numbers[name]].format(name)}"
            )
        if name in dates and pa.types.is_time(inner):
            raise DataError(f"{file}: column {name!r} has the type {kind}, which has no date. Use the date too.")


def open_parquet(file: str) -> pyarrow.parquet.ParquetFile:
    """Open a Parquet file. Raises FileNotFoundError, or DataError for another or a damaged file."""
    wrong = complaint(first_bytes(file))
    if wrong not in (None, PARQUET):
        raise DataError(f"{file}: {wrong}")
    if not can_seek(file):
        raise DataError(f"{file}: the server sends only whole files, but Parquet is read in parts. Download it first.")
    try:
        return pyarrow.parquet.ParquetFile(open_file(file) if is_url(file) else file)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{file}: not a complete Parquet file ({' '.join(str(error).split())}). Download or copy it again; if it "
            f"is text, use --dataset_format csv."
        ) from error
