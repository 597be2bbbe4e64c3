"""The origin of prepared rows: rows to be scored keep the name of their raw file and their row number in it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from dhen.data.formats.raw_rows import RawChunk

FILE, ROW = ":file", ":row"
"""Columns in a prepared folder. Rows count from 1, as in bad_rows.csv: the line of a text file or the row of a Parquet
file. Feature names cannot start with a colon."""
_COLUMNS = pa.schema([(FILE, pa.string()), (ROW, pa.int64())])


def add_origins(prepared: pa.Table, chunk: RawChunk) -> pa.Table:
    """Return the prepared rows of a chunk with their file and row number added."""
    files = pa.repeat(pa.scalar(chunk.file), prepared.num_rows)
    return prepared.append_column(FILE, files).append_column(ROW, pa.array(chunk.rows))


class Origins:
    """Reads the files and row numbers of a prepared split in order; null if the folder does not have them.

    first_row: where to begin.
    """

    def __init__(self, folder: Path, split: str, first_row: int = 0) -> None:
        parts = sorted((folder / split).glob("*.parquet"))
        while len(parts) > 1 and (rows := pyarrow.parquet.read_metadata(parts[0]).num_rows) <= first_row:
            parts, first_row = parts[1:], first_row - rows
        self._batches = pyarrow.dataset.dataset(parts, schema=_COLUMNS, format="parquet").to_batches()
        self._waiting = _COLUMNS.empty_table()
        self.take(first_row)

    def take(self, count: int) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
        """Return (files, row numbers) of the next `count` rows."""
        while self._waiting.num_rows < count:
            self._waiting = pa.concat_tables([self._waiting, pa.Table.from_batches([next(self._batches)], _COLUMNS)])
        taken, self._waiting = self._waiting.slice(0, count), self._waiting.slice(count)
        return taken[FILE], taken[ROW]
