"""Writes a prepared folder: each split as Parquet parts with full row groups, and the list of bad rows.

The files depend only on the rows and their order, not on the chunks that the rows came in.
"""

import csv
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, fields
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import xxhash

from dhen.data.formats.raw_rows import BadRow
from dhen.data.preparation.encoding.key_counts import query_on_disk
from dhen.data.schema import LABEL, ORDER, TIME, WEIGHT, SplitCounts, is_task_column

ROW_GROUP_ROWS = 32_768
ROW_GROUPS_PER_PART = 128
BAD_ROWS_FILE = "bad_rows.csv"
TaskCounts = dict[str, tuple[int, int]]


class SplitWriter:
    """Writes the rows of one split, and counts them. Holds at most one row group and one chunk in memory."""

    def __init__(self, folder: Path, max_lengths: Mapping[str, int] | None = None) -> None:
        """max_lengths: by feature; longer lists are counted."""
        self._max_lengths, self.cut_ids = max_lengths or {}, Counter()
        self.folder, self.rows, self.num_parts = folder, 0, 0
        self.bad_rows, self.unknown_keys = 0, Counter()
        self._clicks = self._unlabelled = self._row_groups = self._waiting_rows = 0
        self._weight: float | None = None
        self._tasks: TaskCounts = {}
        self._waiting: list[pa.Table] = []
        self._part: pyarrow.parquet.ParquetWriter | None = None
        self._digest = xxhash.xxh3_128()
        folder.mkdir()

    def write(self, table: pa.Table) -> None:
        """Append rows."""
        if table.num_rows == 0:
            return
        labels = table[LABEL].to_numpy()
        self.rows += table.num_rows
        self._clicks += int(np.count_nonzero(labels == 1))
        self._unlabelled += int(np.count_nonzero(np.isnan(labels)))
        for name, most in self._max_lengths.items():
            lengths = pc.list_value_length(table[name]).to_numpy()
            self.cut_ids[name] += int(np.maximum(lengths - most, 0).sum())
        if WEIGHT in table.column_names:
            self._weight = (self._weight or 0.0) + table[WEIGHT].to_numpy().sum(dtype=np.float64)
        self._tasks = add_counts(self._tasks, task_counts(table))
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        while self._waiting_rows >= ROW_GROUP_ROWS:
            self._write_row_group(ROW_GROUP_ROWS)

    def close(self) -> None:
        """Write the remaining rows and close the last part."""
        if self._waiting_rows:
            self._write_row_group(self._waiting_rows)
        if self._part is not None:
            self._part.close()

    def counts(self) -> SplitCounts:
        """Return the counts of the rows so far."""
        numbers = self.rows, self._clicks, self.bad_rows, self._unlabelled
        digest, cut_ids = self._digest.hexdigest(), dict(self.cut_ids)
        return SplitCounts(*numbers, dict(self.unknown_keys), digest, self._weight, cut_ids, self._tasks)

    def _write_row_group(self, num_rows: int) -> None:
        waiting = pa.concat_tables(self._waiting)
        group, rest = waiting.slice(0, num_rows).combine_chunks(), waiting.slice(num_rows)
        if self._row_groups % ROW_GROUPS_PER_PART == 0:
            if self._part is not None:
                self._part.close()
            self._part = pyarrow.parquet.ParquetWriter(
                self.folder / _part_name(self.num_parts), group.schema, compression="zstd", compression_level=1,
                write_statistics=False, write_page_checksum=True,
            )  # fmt: skip
            self.num_parts += 1
        self._part.write_table(group, row_group_size=num_rows)
        for batch in group.to_batches():
            self._digest.update(batch.serialize())
        self._row_groups += 1
        self._waiting, self._waiting_rows = [rest] if rest.num_rows else [], rest.num_rows


def list_bad_rows(folder: Path, bad_rows: tuple[BadRow, ...]) -> None:
    """Append rows to the bad_rows.csv of a piece, which exists from the first bad row on and has no header."""
    if bad_rows:
        with (folder / BAD_ROWS_FILE).open("a", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(map(astuple, bad_rows))


def join_bad_rows(folders: Iterable[Path], into: Path) -> BadRow | None:
    """Join the lists of bad rows of several pieces, in this order, under a header. Returns the first bad row."""
    files = [folder / BAD_ROWS_FILE for folder in folders if (folder / BAD_ROWS_FILE).exists()]
    if not files:
        return None
    with (into / BAD_ROWS_FILE).open("w+", encoding="utf-8", newline="") as joined:
        csv.writer(joined).writerow(item.name for item in fields(BadRow))
        for path in files:
            with path.open(encoding="utf-8", newline="") as file:
                shutil.copyfileobj(file, joined)
        joined.seek(0)
        first = next(csv.DictReader(joined))
        return BadRow(**first | {"row": int(first["row"])})


def join_parts(folders: Iterable[tuple[Path, int]], into: Path) -> None:
    """Move the parts of several folders into one, in this order. Goes on where an earlier call was killed.

    folders: each with its number of parts.
    """
    into.mkdir(exist_ok=True)
    parts = (folder / _part_name(index) for folder, count in folders for index in range(count))
    for number, part in enumerate(parts):
        target = into / _part_name(number)
        if part.exists() or not target.exists():
            os.replace(part, target)


def join_by_time(folders: Sequence[Path], into: Path) -> str:
    """Sort the rows of several folders into one, on disk with DuckDB, else in memory. Returns their digest."""
    sorting = into.with_name(f"sorting-{into.name}")
    for left in (into, sorting):  # by an earlier call that was killed
        shutil.rmtree(left, ignore_errors=True)
    files = [file for folder in folders for file in sorted(folder.glob("*.parquet"))]
    schema = pa.schema([field for field in pyarrow.parquet.read_schema(files[0]) if field.name not in (TIME, ORDER)])
    with closing(SplitWriter(into)) as writer:
        if find_spec("duckdb"):
            sorting.mkdir()
            target = sorting / "sorted.parquet"
            query_on_disk(f'SELECT * FROM $files ORDER BY "{TIME}", "{ORDER}"', files, target)
            tables = (pa.Table.from_batches([rows]) for rows in pyarrow.parquet.ParquetFile(target).iter_batches())
        else:
            tables = [pl.read_parquet(files).sort(TIME, ORDER).to_arrow()]
        for table in tables:
            writer.write(table.select(schema.names).cast(schema))
    shutil.rmtree(sorting, ignore_errors=True)
    return writer.counts().digest


def sum_of(counts: Sequence[SplitCounts]) -> SplitCounts:
    """The counts of the rows of several folders, one after another."""
    if len(counts) == 1:
        return counts[0]
    numbers = {name: sum(getattr(c, name) for c in counts) for name in ("rows", "clicks", "bad_rows", "unlabelled")}
    weights = [count.weight for count in counts if count.weight is not None]
    by_name = {
        key: {name: sum(getattr(c, key).get(name, 0) for c in counts) for name in getattr(counts[0], key)}
        for key in ("unknown_keys", "cut_ids")
    }
    digest = xxhash.xxh3_128("".join(count.digest for count in counts).encode()).hexdigest()
    weight = math.fsum(weights) if weights else None
    tasks = reduce(add_counts, (count.tasks for count in counts))
    return SplitCounts(**numbers, **by_name, digest=digest, weight=weight, tasks=tasks)


def task_counts(table: pa.Table) -> TaskCounts:
    """By further task: the rows that have its label, and those in which it is 1."""
    counts = {}
    for name in filter(is_task_column, table.column_names):
        labels = table[name].to_numpy()
        counts[name.partition(":")[0]] = int((labels >= 0).sum()), int((labels == 1).sum())
    return counts


def add_counts(one: TaskCounts, other: TaskCounts) -> TaskCounts:
    """The sums of both, by task."""
    pairs = {name: (one.get(name, (0, 0)), other.get(name, (0, 0))) for name in one | other}
    return {name: tuple(map(sum, zip(*pair, strict=True))) for name, pair in pairs.items()}


def _part_name(index: int) -> str:
    return f"part-{index:05d}.parquet"
