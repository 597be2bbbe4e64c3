"""Writes a prepared folder: each split as Parquet parts with full row groups, and the list of bad rows.

The files depend only on the rows and their order, not on the chunks that the rows came in.
"""

import csv
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import xxhash

from dhen.data.formats.raw_rows import BadRow
from dhen.data.schema import LABEL, SplitCounts

ROW_GROUP_ROWS = 32_768
ROW_GROUPS_PER_PART = 128
BAD_ROWS_FILE = "bad_rows.csv"


class SplitWriter:
    """Writes the rows of one split. Holds at most one row group and one chunk in memory."""

    def __init__(self, folder: Path, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        self.folder = folder
        self.rows = 0
        self.clicks = 0
        self.unlabelled = 0
        self._row_group_rows = row_group_rows
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._part: pyarrow.parquet.ParquetWriter | None = None
        self._row_groups = 0
        self._digest = xxhash.xxh3_128()
        folder.mkdir()

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows == 0:
            return
        labels = table[LABEL].to_numpy()
        self.rows += table.num_rows
        self.clicks += int(np.count_nonzero(labels == 1))
        self.unlabelled += int(np.count_nonzero(np.isnan(labels)))
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        while self._waiting_rows >= self._row_group_rows:
            self._write_row_group(self._row_group_rows)

    def close(self) -> None:
        """Write the remaining rows and close the last part."""
        if self._waiting_rows:
            self._write_row_group(self._waiting_rows)
        if self._part is not None:
            self._part.close()

    def counts(self, bad_rows: int) -> SplitCounts:
        """Return the counts of the rows written so far."""
        return SplitCounts(self.rows, self.clicks, bad_rows, self.unlabelled, digest=self._digest.hexdigest())

    def _write_row_group(self, num_rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        group, rest = waiting.slice(0, num_rows), waiting.slice(num_rows)
        if self._part is None or self._row_groups % ROW_GROUPS_PER_PART == 0:
            self._open_part(group.schema)
        group = group.combine_chunks()
        self._part.write_table(group, row_group_size=num_rows)
        for batch in group.to_batches():
            self._digest.update(batch.serialize())
        self._row_groups += 1
        self._waiting, self._waiting_rows = [rest] if rest.num_rows else [], rest.num_rows

    def _open_part(self, schema: pa.Schema) -> None:
        if self._part is not None:
            self._part.close()
        name = f"part-{self._row_groups // ROW_GROUPS_PER_PART:05d}.parquet"
        self._part = pyarrow.parquet.ParquetWriter(
            self.folder / name, schema, compression="zstd", compression_level=1, write_statistics=False,
            write_page_checksum=True,
        )  # fmt: skip


def list_bad_rows(folder: Path, bad_rows: tuple[BadRow, ...]) -> None:
    """Append rows to bad_rows.csv (file, row, reason, text), which exists from the first bad row on."""
    path = folder / BAD_ROWS_FILE
    header = [] if path.exists() else [["file", "row", "reason", "text"]]
    if bad_rows:
        with path.open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([*header, *map(astuple, bad_rows)])
