"""What readers yield: chunks of typed columns, and bad rows with the reason for each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from dhen.data.formats.roles import ColumnRoles

LONGEST_QUOTE = 200
"""Number of characters of a bad row that are shown and kept."""


class DataError(ValueError):
    """The user's data or its schema is wrong. The message says where, and what to do."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used. `row` counts from 1: the line of a text file or the row of a Parquet file."""

    file: str
    row: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}: {self.reason}. The row reads {self.text!r}."


@dataclass(frozen=True)
class RawChunk:
    """Consecutive rows of a file.

    rows: int64, the number of each good row in the file, from 1.
    table: the good rows. `label` is float32, NaN if unknown. Each dense feature is a float64 column, null if blank.
        So is each sparse feature with bins. Each other single-valued one is a string column, null if blank. Each
        multi-valued one is a list<string> column, in which a blank is null, with a list<float32> column
        `<feature>:weights` if its ids have weights. `:time` is float64, if the rows are to be put in order.
    bad: the bad rows in this part of the file, in order.
    end_row: the number of the last row in this part of the file, including blank lines.
    header_rows: number of header rows in the file.
    bytes_read: where this chunk ends in the file, in bytes on disk.
    """

    file: str
    rows: np.ndarray
    table: pa.Table
    bad: tuple[BadRow, ...]
    end_row: int
    header_rows: int = 0
    bytes_read: int = 0


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows of a file: those that begin within a range of its bytes, or a range of its Parquet row groups.

    end: None for the end of the file. num_bytes: about how many are read. rows_before: number of rows between the
    header and the first row of the stretch.
    """

    start: int = 0
    end: int | None = None
    num_bytes: int = 0
    rows_before: int = 0


WHOLE = Stretch()


class Reader(Protocol):
    """Reads one raw format. All files of one reader must have the same columns."""

    @property
    def roles(self) -> ColumnRoles:
        """The role of each column."""

    def stretches(self, file: str, num_bytes: float) -> list[Stretch]:
        """Cut a file, if it can be cut, into stretches of at least `num_bytes`. Their rows_before is not known yet."""

    def chunks(self, file: str, stretch: Stretch = WHOLE) -> Iterator[RawChunk]:
        """Yield the rows of a file or a stretch in order, in chunks of bounded size."""

    def row_counts(self, file: str, stretch: Stretch = WHOLE) -> Iterator[tuple[int, int]]:
        """Yield the number of rows so far, good or bad, without the header or parsing, and where in the file."""


class RowChecks:
    """Collects the bad rows in a chunk: the first reason for each, and its text, which is quoted only if needed."""

    def __init__(self, file: str, rows: np.ndarray, quote: Callable[[int], str]) -> None:
        self.file = file
        self.rows = rows
        self.quote = quote
        self.is_good = np.ones(len(rows), dtype=bool)
        self._bad: list[BadRow] = []

    def refuse(self, is_bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Mark the rows in the mask as bad. `reason(i)` is called only for bad rows; i is the index in the chunk."""
        if not is_bad.any():
            return
        for index in np.flatnonzero(is_bad & self.is_good):
            text = self.quote(int(index))[:LONGEST_QUOTE]
            self._bad.append(BadRow(self.file, int(self.rows[index]), reason(int(index)), text))
        self.is_good &= ~is_bad

    def finish(
        self,
        table: pa.Table,
        earlier: tuple[BadRow, ...] = (),
        *,
        end_row: int,
        header_rows: int = 0,
        bytes_read: int = 0,
    ) -> RawChunk:
        """Return the chunk with the good rows of `table`. `earlier`: bad rows that never made it into `table`."""
        rows = self.rows
        if not self.is_good.all():
            table = table.filter(pa.array(self.is_good))
            rows = rows[self.is_good]
        bad = tuple(sorted((*earlier, *self._bad), key=lambda bad_row: bad_row.row))
        return RawChunk(self.file, rows, table, bad, end_row, header_rows, bytes_read)
