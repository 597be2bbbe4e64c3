"""Delimited text (CSV, TSV and the like). A YAML schema names the columns (dhen/data/formats/roles.py).

Quoted values may contain the delimiter and line breaks.
"""

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from dhen.data.formats import columns, text_blocks
from dhen.data.formats.raw_rows import WHOLE, DataError, RawChunk, RowChecks, Stretch
from dhen.data.formats.roles import ColumnRoles
from dhen.data.schema import LABEL, TIME, WEIGHT, kept_column, task_column, weights_column


@dataclass(frozen=True)
class DelimitedReader:
    """Reads delimited text, plain or compressed."""

    roles: ColumnRoles
    is_label_required: bool = True
    block_bytes: int = text_blocks.BLOCK_BYTES

    def stretches(self, file: str, num_bytes: float) -> list[Stretch]:
        """Cut a file without quotes (`Reader.stretches`)."""
        return text_blocks.stretches(file, num_bytes, self._quoting)

    def chunks(self, file: str, stretch: Stretch = WHOLE) -> Iterator[RawChunk]:
        """Yield the rows of `file` in order. Raises FileNotFoundError, DataError, or ValueError for wrong columns."""
        names, header_rows = self._checked_header(file)
        quote, delimiter = self.roles.quote, self.roles.delimiter
        blocks = text_blocks.text_blocks(
            file, block_bytes=self.block_bytes, header_rows=header_rows, quoting=self._quoting, stretch=stretch
        )
        for block in blocks:
            for numbers in (self.number_types, {}):
                values, rows, bad = text_blocks.split_columns(
                    block, names, delimiter=delimiter, quote=quote, null_values=self.roles.null_values, numbers=numbers
                )
                raw = {name: values[name].combine_chunks() for name in names}
                checks = RowChecks(file, rows, text_blocks.line_quoter(raw, delimiter))
                table = with_kept(self.typed(raw, checks), raw, self.roles)
                if checks.is_good.all() or all(pa.types.is_string(column.type) for column in raw.values()):
                    break  # else the rows are read as text, so that the bad ones are quoted as they stand in the file
            yield checks.finish(table, bad, end_row=block.end_row, header_rows=header_rows, bytes_read=block.bytes_read)

    def row_counts(self, file: str, stretch: Stretch = WHOLE) -> Iterator[tuple[int, int]]:
        """Yield the number of lines after the header, and where they end."""
        return text_blocks.line_counts(file, stretch, self._checked_header(file)[1])

    def column_names(self, file: str) -> list[str]:
        """Return the names of all columns in `file`. Raises FileNotFoundError or DataError."""
        return self._header(file)[0]

    @property
    def number_types(self) -> dict[str, pa.DataType]:
        """The columns that are needed only as numbers, and their types."""
        roles = self.roles
        as_text = {roles.time_column, *roles.kept}
        as_text |= {name for sparse in roles.sparse if sparse.bins is None for name in sparse.columns}
        as_text |= {role.column for role in (roles.label, *roles.tasks.values()) if role.positive is not None}
        return dict.fromkeys({*roles.label_columns, *roles.numbers} - as_text, pa.float64())

    @property
    def _quoting(self) -> text_blocks.Quoting | None:
        return text_blocks.Quoting(self.roles.quote, self.roles.delimiter) if self.roles.quote is not None else None

    def typed(self, raw: dict[str, pa.Array], checks: RowChecks) -> pa.Table:
        """Convert raw columns to a `RawChunk.table`, and mark bad rows."""
        return typed_table(raw, self.roles, checks, is_label_required=self.is_label_required)

    def _checked_header(self, file: str) -> tuple[list[str], int]:
        names, header_rows = self._header(file)
        self.roles.check_columns(names, file, is_label_required=self.is_label_required)
        return names, header_rows

    def _header(self, file: str) -> tuple[list[str], int]:
        """Return (column names, number of rows up to and including the header)."""
        row, line = text_blocks.first_lines(file, is_first_good=True)[0]
        quoting = csv.QUOTE_NONE if self.roles.quote is None else csv.QUOTE_MINIMAL
        cells = next(csv.reader([line], delimiter=self.roles.delimiter, quotechar=self.roles.quote, quoting=quoting))
        if self.roles.header:
            return cells, row
        if not self.roles.columns:
            raise DataError(f"{file}: the schema has `header: false` but no column names. Add `columns: [...]` to it.")
        return list(self.roles.columns), 0


def typed_table(raw: dict[str, pa.Array], roles: ColumnRoles, checks: RowChecks, is_label_required: bool) -> pa.Table:
    """Convert raw columns to a `RawChunk.table` by their roles. Works for every format with named columns."""
    raw = {name: columns.without_blanks(columns.plain(values), roles.null_values) for name, values in raw.items()}
    values = raw.get(roles.label.column)
    label = columns.label_column(values, roles.label, checks, is_required=is_label_required, has_schema=True)
    typed = {LABEL: label}
    for name, role in roles.tasks.items():
        of_task = columns.label_column(raw.get(role.column), role, checks, is_required=False, has_schema=True)
        if role.given_click:
            of_task = pc.if_else(pc.equal(label, 1), of_task, pa.scalar(math.nan, pa.float32()))
        typed[task_column(name)] = of_task
    if (name := roles.row_weight) is not None:
        typed[WEIGHT] = columns.weight_column(raw.get(name), name, checks, is_required=is_label_required)
    numbers = {name: columns.number_column(raw[name], name, checks) for name in roles.numbers}
    typed |= {dense.name: numbers[dense.source] for dense in roles.dense}
    for sparse in roles.sparse:
        if sparse.bins is not None:
            typed[sparse.name] = numbers[sparse.source]
            continue
        keys, weights = columns.sparse_columns(raw, sparse, checks)
        typed[sparse.name] = keys
        if weights is not None:
            typed[weights_column(sparse.name)] = weights
    if roles.time_column is not None:
        typed[TIME] = columns.time_column(raw[roles.time_column], roles, checks)
    return pa.table(typed)


def with_kept(table: pa.Table, raw: dict[str, pa.Array], roles: ColumnRoles) -> pa.Table:
    """Return the table with the raw values of the columns to keep."""
    for name in roles.kept:
        values = raw[name]
        values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
        table = table.append_column(kept_column(name), values)
    return table
