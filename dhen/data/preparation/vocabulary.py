"""Vocabularies: which keys of a feature have their own row in its table, and which row that is.

vocabulary/<feature>.parquet has the columns `key` (string), `id` (int64) and `count` (int64), sorted by id. Ids start
at 1 and are assigned by descending count, then by key; after fine-tuning, the trained model's keys come first, with the
ids they had. Id 0 stands for blank, rare and unseen keys.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from dhen.data.schema import MISSING_ID

VOCABULARY_FOLDER = "vocabulary"
_COMPACT_ROWS = 1 << 20


class KeyCounts:
    """Counts the keys of one feature over many chunks.

    Holds in memory every distinct key of the data, at about 60 bytes per key of up to 12 characters. Up to a million
    more keys (or as many as the distinct ones) wait to be merged.
    """

    def __init__(self) -> None:
        self._merged = pl.DataFrame(schema={"key": pl.String, "count": pl.Int64})
        self._waiting: list[pl.DataFrame] = []
        self._waiting_rows = 0

    @property
    def num_merged(self) -> int:
        """The number of distinct keys, without those that wait to be merged."""
        return len(self._merged)

    def add(self, keys: pa.Array) -> None:
        """Count the keys in a chunk, except nulls."""
        counts = pl.DataFrame({"key": pl.Series(pl.from_arrow(keys))}).drop_nulls()
        self.add_counts(counts.group_by("key").agg(pl.len().cast(pl.Int64).alias("count")))

    def add_counts(self, counts: pl.DataFrame) -> None:
        """Add keys (`key`, String) that are counted already (`count`, Int64)."""
        self._waiting.append(counts)
        self._waiting_rows += len(counts)
        # A merge costs as much as all keys so far. Waiting until their number doubles keeps the total cost linear.
        if self._waiting_rows > max(_COMPACT_ROWS, len(self._merged)):
            self.merge()

    def save(self, path: Path) -> None:
        """Write all keys and counts to a Parquet file."""
        self.merge()
        path.parent.mkdir(exist_ok=True)
        self._merged.write_parquet(path, compression="zstd", compression_level=1, statistics=False)

    def vocabulary(self, min_count: int) -> "Vocabulary":
        """Return the keys seen at least `min_count` times, with their ids."""
        self.merge()
        kept = self._merged.filter(pl.col("count") >= min_count).sort(["count", "key"], descending=[True, False])
        return Vocabulary(pa.array(kept["key"].to_arrow(), pa.string()), kept["count"].to_numpy())

    def merge(self) -> None:
        """Merge the keys that wait."""
        self._merged = pl.concat([self._merged, *self._waiting]).group_by("key").agg(pl.col("count").sum())
        self._waiting, self._waiting_rows = [], 0


def merged_counts(files: Sequence[Path], most_keys: int | None) -> KeyCounts | None:
    """The sum of the counts in several files; None if a file is missing or there are more than `most_keys` keys."""
    counts = KeyCounts()
    for file in files:
        if not file.exists():
            return None
        counts.add_counts(pl.read_parquet(file))
        if most_keys is not None and counts.num_merged > most_keys:
            return None
    counts.merge()
    return counts if most_keys is None or counts.num_merged <= most_keys else None


class Vocabulary:
    """The keys of a feature in the order of their ids: keys[i] has id i + 1."""

    def __init__(self, keys: pa.Array, counts: np.ndarray) -> None:
        self.keys = keys
        self.counts = counts
        # The sorted keys serve all chunks. A hash join would be built for each of them.
        series = pl.Series(pl.from_arrow(keys))
        order = series.arg_sort()
        self._sorted, self._ids = series.gather(order), order.to_numpy().astype(np.int64) + 1

    @property
    def num_embeddings(self) -> int:
        """Number of rows in the feature's table: one per key, plus row 0."""
        return len(self.keys) + 1

    def ids(self, keys: pa.Array) -> np.ndarray:
        """Return int64 ids, 0 for nulls and for keys that are not in the vocabulary."""
        if len(self.keys) == 0:
            return np.full(len(keys), MISSING_ID, dtype=np.int64)
        encoded = keys.dictionary_encode()
        distinct = pl.Series(pl.from_arrow(encoded.dictionary))
        at = np.minimum(self._sorted.search_sorted(distinct).to_numpy(), len(self._sorted) - 1)
        is_known = (self._sorted.gather(at) == distinct).to_numpy()
        ids = pa.array(np.where(is_known, self._ids[at], MISSING_ID))
        return pc.fill_null(ids.take(encoded.indices), MISSING_ID).to_numpy()

    def union(self, new: "Vocabulary") -> "Vocabulary":
        """These keys with their ids, then the other keys of `new`. A key of both counts the sum of both counts."""
        ids = new.ids(self.keys)
        counts = self.counts + np.where(
            ids == MISSING_ID, 0, new.counts[np.maximum(ids - 1, 0)] if len(new.keys) else 0
        )
        is_other = self.ids(new.keys) == MISSING_ID
        others = new.keys.filter(pa.array(is_other))
        return Vocabulary(pa.concat_arrays([self.keys, others]), np.concatenate([counts, new.counts[is_other]]))

    def save(self, folder: Path, feature: str) -> None:
        """Write vocabulary/<feature>.parquet into a prepared folder."""
        path = vocabulary_path(folder, feature)
        path.parent.mkdir(exist_ok=True)
        ids = pa.array(np.arange(1, len(self.keys) + 1, dtype=np.int64))
        table = pa.table({"key": self.keys, "id": ids, "count": pa.array(self.counts, pa.int64())})
        pyarrow.parquet.write_table(table, path, compression="zstd")


def vocabulary_path(folder: Path, feature: str) -> Path:
    """Return the path of a feature's vocabulary in a prepared folder."""
    return Path(folder) / VOCABULARY_FOLDER / f"{feature}.parquet"


def copy_vocabulary(folder: Path, into: Path, feature: str) -> None:
    """Copy a feature's vocabulary from one prepared folder or saved model to another."""
    path = vocabulary_path(into, feature)
    path.parent.mkdir(exist_ok=True)
    shutil.copyfile(vocabulary_path(folder, feature), path)


def load_vocabulary(folder: Path, feature: str) -> Vocabulary:
    """Read a feature's vocabulary from a prepared folder or a saved model.

    Raises FileNotFoundError, or ValueError if its ids are not 1, 2, 3, ….
    """
    path = vocabulary_path(folder, feature)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file, but {feature!r} is encoded by a vocabulary. Prepare the data again."
        )
    table = pyarrow.parquet.read_table(path, columns=["key", "id", "count"])
    if not np.array_equal(table["id"].to_numpy(), np.arange(1, table.num_rows + 1)):
        raise ValueError(f"{path}: the ids do not run from 1 to {table.num_rows}. Prepare the data again.")
    return Vocabulary(table["key"].combine_chunks().cast(pa.string()), table["count"].to_numpy())
