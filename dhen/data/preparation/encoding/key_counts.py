"""How often each key of a feature occurs, or only about how many distinct keys it has.

Counts of any number of keys take little memory: they go to disk when they get many, are merged in parts, and more than
MOST_IN_MEMORY are sorted by DuckDB.
"""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet

from dhen.data.formats.raw_rows import DataError
from dhen.data.hashing import hash_texts, salt_of

MOST_IN_MEMORY = 10_000_000
BATCH_KEYS = 1 << 18
MOST_HASHES = 16_384
_SALT = salt_of("key sketch")
_RUN_KEYS, _MOST_PARTS = 250_000, 128
_COMPACT_ROWS = 1 << 17
_DUCKDB = {"memory_limit": "1GB", "threads": 1, "preserve_insertion_order": False}
_COUNTS = pa.schema([("key", pa.large_string()), ("count", pa.int64())])


class KeyCounts:
    """Counts the keys of one feature over many chunks.

    merged: the distinct keys in memory, at about 60 bytes per key of up to 12 characters; up to as many more wait to be
    merged. folder: where they go when there are more than `run_keys`, as files to be merged.
    """

    def __init__(self, folder: Path, run_keys: int | None = None) -> None:
        self._folder, self._runs, self._run_keys = folder, 0, run_keys or _RUN_KEYS
        self.merged = pl.DataFrame(schema={"key": pl.String, "count": pl.Int64})
        self._waiting: list[pl.DataFrame] = []
        self._waiting_rows = 0

    def add(self, keys: pa.Array) -> None:
        """Count the keys in a chunk, except nulls."""
        counts = pl.DataFrame({"key": pl.Series(pl.from_arrow(keys))}).drop_nulls()
        self._waiting.append(counts.group_by("key").agg(pl.len().cast(pl.Int64).alias("count")))
        self._waiting_rows += len(self._waiting[-1])
        # A merge costs as much as all keys so far. Waiting until their number doubles keeps the total cost linear.
        if self._waiting_rows > max(_COMPACT_ROWS, len(self.merged)):
            self._merge()
        if len(self.merged) > self._run_keys:
            self.save()

    def _merge(self) -> None:
        self.merged = pl.concat([self.merged, *self._waiting]).group_by("key").agg(pl.col("count").sum())
        self._waiting, self._waiting_rows = [], 0

    def save(self) -> None:
        """Write the keys in memory to a Parquet file in the folder, and forget them."""
        self._merge()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{self._runs:05d}.parquet"
        self.merged.write_parquet(path, compression="zstd", compression_level=1, statistics=False)
        self.merged, self._runs = self.merged.clear(), self._runs + 1


def merge_in_parts(files: Sequence[Path], folder: Path, min_count: int) -> tuple[int, list[Path]]:
    """Sum the counts in `files`, in memory for one part of the keys after another.

    Returns the number of keys, and a file per part with those that were seen min_count times.
    """
    num_counts = sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    num_parts = min(num_counts // _RUN_KEYS + 1, _MOST_PARTS)
    parts = [folder / f"{part}.parquet" for part in range(num_parts)]
    with ExitStack() as stack:
        writers = [
            stack.enter_context(pyarrow.parquet.ParquetWriter(path, _COUNTS, use_dictionary=False)) for path in parts
        ]
        for file in files:
            for (part,), counts in pl.read_parquet(file).group_by(pl.col("key").hash() % num_parts):
                writers[part].write_table(_to_arrow(counts))
    num_keys = 0
    for path in parts:
        counts = pl.read_parquet(path).group_by("key").agg(pl.col("count").sum())
        num_keys += len(counts)
        counts.filter(pl.col("count") >= min_count).write_parquet(path, statistics=False)
    return num_keys, parts


def sorted_counts(files: Sequence[Path], target: Path) -> Iterator[pa.RecordBatch | pa.Table]:
    """Yield the counts in `files` by descending count, then by key. Uses `target` if they are many."""
    if sum(pyarrow.parquet.read_metadata(file).num_rows for file in files) > MOST_IN_MEMORY:
        query_on_disk("SELECT key, count FROM $files ORDER BY count DESC, key", files, target)
        yield from pyarrow.parquet.ParquetFile(target).iter_batches(BATCH_KEYS)
        return
    counts = pl.read_parquet(list(files)).sort(["count", "key"], descending=[True, False])
    yield from map(_to_arrow, counts.iter_slices(BATCH_KEYS))


def _to_arrow(counts: pl.DataFrame) -> pa.Table:
    return counts.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(_COUNTS)


def query_on_disk(query: str, files: Sequence[Path], target: Path) -> None:
    """Write what a query to DuckDB returns about Parquet files. Intermediate results go to disk beside the target."""
    try:
        import duckdb
    except ImportError as error:
        raise DataError(
            f"a vocabulary of more than {MOST_IN_MEMORY:,} keys is merged by DuckDB: pip install 'dhen[large]'. Or use "
            f"--id_encoding hash."
        ) from error
    query = query.replace("$files", f"read_parquet([{', '.join(map(_quoted, files))}])")
    spill = target.with_name(f"{target.name}.spill")
    try:
        with duckdb.connect(config=_DUCKDB | {"temp_directory": str(spill)}) as connection:
            connection.execute(f"COPY ({query}) TO {_quoted(target)} (FORMAT parquet)")
    except duckdb.Error as error:
        raise OSError(f"{target.parent}: DuckDB cannot sort the data: {error}") from error
    finally:
        shutil.rmtree(spill, ignore_errors=True)


def _quoted(path: Path) -> str:
    return "'" + str(path).replace("'", "''") + "'"


class KeySketch:
    """Estimates the number of distinct keys from their smallest hashes (Bar-Yossef et al., 2002).

    Keeps MOST_HASHES of them, so repetitions, the order of the keys and their pieces do not matter.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._smallest = path, np.empty(0, np.uint64)

    def add(self, keys: pa.Array) -> None:
        """Take the keys in a chunk, except nulls."""
        self._smallest = _smallest([self._smallest, hash_texts(keys.drop_null(), _SALT)])

    def save(self) -> None:
        """Write the hashes."""
        self._path.parent.mkdir(exist_ok=True)
        with self._path.open("wb") as file:
            np.save(file, self._smallest)


def estimated_keys(sketches: Iterable[Path]) -> int:
    """The number of distinct keys in all sketches together: exact below MOST_HASHES, else with an error of about 0.8 %.

    If the hashes are uniform in [0, 1) and the k-th smallest is h, then (k - 1) / h is an unbiased estimate.
    """
    smallest = _smallest([np.load(path) for path in sketches])
    if len(smallest) < MOST_HASHES:
        return len(smallest)
    return round((MOST_HASHES - 1) / (int(smallest[-1]) / 2**64))


def _smallest(hashes: list[np.ndarray]) -> np.ndarray:
    """The smallest different ones, ascending."""
    known = hashes[0]
    if len(known) == MOST_HASHES:
        hashes = [known, *(more[more < known[-1]] for more in hashes[1:])]
    return np.unique(np.concatenate(hashes))[:MOST_HASHES]
