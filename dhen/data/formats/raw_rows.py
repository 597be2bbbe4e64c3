"""Raw rows as the readers hand them on: typed columns of bounded size, and what was wrong with the other rows."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from dhen.data.formats.roles import ColumnRoles

LONGEST_QUOTE = 200
"""Characters of a bad row that are shown and kept."""


Counted = Callable[[int, int], None]
"""Is told rows and bytes of a file that were read so far."""


def say_nothing(rows: int, bytes_read: int) -> None:
    """For those who don't want to know."""


class DataError(ValueError):
    """Something in the user's data, or in its description, is wrong. The message says where and what to do."""


@dataclass(frozen=True)
class BadRow:
    """A row that can't be used. `row` is the 1-based line of a text file, the 1-based row of a Parquet file."""

    file: str
    row: int
    reason: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: row {self.row}: {self.reason}. The row reads {self.text!r}."


@dataclass(frozen=True)
class RawChunk:
    """Some consecutive rows of a file.

    rows: int64, the 1-based number in the file of each good row.
    table: one row a good row: `label` float32 (NaN where unknown), a float64 column a dense feature (null where
        blank), a string column a single-valued sparse feature (null where blank), a list<string> column a multi-valued
        one, with a list<float32> column `<feature>:weights` where its ids carry weights.
    bad: the rows of this stretch of the file that aren't in `table`, in order.
    end_row: the number of the last row of this stretch; blank lines may have been left out.
    header_rows: rows of the file that are no data.
    bytes_read: how far into the file (of its size on disk) this chunk ends.
    """

    file: str
    rows: np.ndarray
    table: pa.Table
    bad: tuple[BadRow, ...]
    end_row: int
    header_rows: int = 0
    bytes_read: int = 0


class Reader(Protocol):
    """One raw format. A reader is made for a set of files that all have the same columns."""

    @property
    def roles(self) -> ColumnRoles:
        """What each column is."""

    def chunks(self, file: str) -> Iterator[RawChunk]:
        """The rows of `file`, in order, in chunks whose size doesn't depend on the file's."""

    def count_rows(self, file: str, counted: Counted = say_nothing) -> int:
        """How many rows `file` has beside its header, good or bad, without parsing them.

        counted: told now and then how many there are so far.
        """


class RowChecks:
    """Collects what is wrong with the rows of a chunk: for each row the first complaint, with the lazily quoted row."""

    def __init__(self, file: str, rows: np.ndarray, quote: Callable[[int], str]) -> None:
        self.file = file
        self.rows = rows
        self.quote = quote
        self.is_good = np.ones(len(rows), dtype=bool)
        self._bad: list[BadRow] = []

    def refuse(self, is_bad: np.ndarray, reason: Callable[[int], str]) -> None:
        """Take the rows of the mask out; `reason(i)` is asked for row i of the chunk, for bad rows only."""
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
        """The chunk of the good rows. `earlier` are bad rows of the same stretch that never came into the table."""
        rows = self.rows
        if not self.is_good.all():
            table = table.filter(pa.array(self.is_good))
            rows = rows[self.is_good]
        bad = tuple(sorted((*earlier, *self._bad), key=lambda bad_row: bad_row.row))
        return RawChunk(self.file, rows, table, bad, end_row, header_rows, bytes_read)
