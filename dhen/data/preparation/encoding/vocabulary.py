"""Vocabularies: which keys of a feature have their own row in its table, and which row that is.

vocabulary/<table>.parquet has the columns `key` (string), `id` (int64) and `count` (int64), sorted by id. Ids start
at 1 and are assigned by descending count, then by key; after fine-tuning, the trained model's keys come first, with the
ids they had. Id 0 stands for blank, rare and unseen keys.

While data is prepared, vocabularies of any size take little memory: the counts of their keys are on disk
(key_counts.py), and ids are found in files that the processes of a machine share.
"""

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet
import xxhash

from dhen.data.formats.raw_rows import DataError
from dhen.data.hashing import hash_texts, salt_of
from dhen.data.preparation.encoding import key_counts
from dhen.data.schema import MISSING_ID, SCHEMA_FILE, SparseColumn

VOCABULARY_FOLDER = "vocabulary"
_SALT = salt_of("vocabulary")
_AGAIN = "Prepare the data again, or copy the model again."
_SCHEMA = pa.schema([("key", pa.string()), ("id", pa.int64()), ("count", pa.int64())])
_TEXTS = (pa.string(), pa.large_string(), pa.string_view())
_INTEGERS = (pa.int64(), pa.int32(), pa.uint64(), pa.uint32())


def build_vocabulary(
    files: Sequence[Path], folder: Path, feature: str, *, min_count: int, most_keys: int | None = None
) -> int | None:
    """Sum the counts in `files` and write the vocabulary into `folder`. Returns the number of rows of its table.

    most_keys: with more keys than that, before min_count, nothing is written and None is returned. Raises DataError if
    there are more than MOST_IN_MEMORY keys and DuckDB is not installed.
    """
    with tempfile.TemporaryDirectory(dir=folder) as name:
        num_keys, merged = key_counts.merge_in_parts(files, Path(name), min_count)
        if most_keys is not None and num_keys > most_keys:
            return None
        path, num_keys = vocabulary_path(folder, feature), 0
        path.parent.mkdir(exist_ok=True)
        with pyarrow.parquet.ParquetWriter(path, _SCHEMA, compression="zstd", use_dictionary=False) as writer:
            for batch in key_counts.sorted_counts(merged, Path(name) / "sorted"):
                ids = pa.array(np.arange(num_keys + 1, num_keys + len(batch) + 1))
                writer.write_table(pa.table([batch["key"].cast(pa.string()), ids, batch["count"]], schema=_SCHEMA))
                num_keys += len(batch)
    return num_keys + 1


class KeyIds:
    """The ids of known keys, found by a 64-bit hash of the key.

    hashes: uint64, ascending, all different. ids: int64. Of a billion unseen keys, one is taken for one of 50 million
    known keys with a probability of 1 in 400.
    """

    def __init__(self, hashes: np.ndarray, ids: np.ndarray) -> None:
        self._hashes, self._ids = hashes, ids

    @classmethod
    def load(cls, folder: Path, feature: str) -> "KeyIds":
        """Open what `save_key_ids` wrote. All processes of a machine share the memory."""
        return cls(*(np.load(path, mmap_mode="r") for path in _key_ids_paths(folder, feature)))

    def ids(self, keys: pa.Array) -> np.ndarray:
        """Return int64 ids, 0 for nulls and for unknown keys."""
        if len(self._hashes) == 0:
            return np.full(len(keys), MISSING_ID, dtype=np.int64)
        encoded = keys.dictionary_encode()
        hashes = hash_texts(encoded.dictionary, _SALT)
        at = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        ids = np.where(self._hashes[at] == hashes, self._ids[at], MISSING_ID)
        rows = encoded.indices.fill_null(len(ids)).to_numpy()
        return np.append(ids, MISSING_ID)[rows]


def hashes_and_ids(chunks: Iterable[pa.Array], feature: str) -> tuple[np.ndarray, np.ndarray]:
    """What `KeyIds` are made of, for keys with the ids 1, 2, 3, …. Raises DataError if two keys have the same hash."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(hash_texts(chunk, _SALT) for chunk in chunks)])
    order = np.argsort(hashes)
    hashes = hashes[order]
    _check_different(hashes, feature)
    return hashes, order + 1


def _check_different(hashes: np.ndarray, feature: str) -> None:
    if (hashes[1:] == hashes[:-1]).any():
        raise DataError(f"{feature!r}: two keys have the same 64-bit hash. Use `encoding: hash` for this feature.")


def save_key_ids(folder: Path, feature: str) -> None:
    """Write the `KeyIds` of the vocabulary in a folder beside it, for the processes that look keys up."""
    paths = _key_ids_paths(folder, feature)
    num_keys = pyarrow.parquet.read_metadata(vocabulary_path(folder, feature)).num_rows
    if num_keys <= key_counts.MOST_IN_MEMORY:
        keys = (batch["key"] for batch in _batches(folder, feature))
        for path, values in zip(paths, hashes_and_ids(keys, feature), strict=True):
            np.save(path, values)
        return
    by_id, by_hash = (folder / f".{feature}.{order}.parquet" for order in ("by_id", "by_hash"))
    with pyarrow.parquet.ParquetWriter(by_id, pa.schema([("hash", pa.uint64()), ("id", pa.int64())])) as writer:
        for batch in pyarrow.parquet.ParquetFile(vocabulary_path(folder, feature)).iter_batches(key_counts.BATCH_KEYS):
            writer.write_table(pa.table({"hash": hash_texts(batch["key"], _SALT), "id": batch["id"]}))
    key_counts.query_on_disk("SELECT hash, id FROM $files ORDER BY hash", [by_id], by_hash)
    hashes, ids = (
        np.lib.format.open_memmap(path, "w+", kind, (num_keys,)) for path, kind in zip(paths, ("u8", "i8"), strict=True)
    )
    first = 0
    for batch in pyarrow.parquet.ParquetFile(by_hash).iter_batches(key_counts.BATCH_KEYS):
        end = first + len(batch)
        hashes[first:end], ids[first:end] = batch["hash"].to_numpy(), batch["id"].to_numpy()
        _check_different(hashes[max(first - 1, 0) : end], feature)
        first = end
    by_id.unlink()
    by_hash.unlink()


def _key_ids_paths(folder: Path, feature: str) -> tuple[Path, Path]:
    return tuple(folder / VOCABULARY_FOLDER / f"{feature}.{what}.npy" for what in ("hashes", "ids"))


class Vocabulary(KeyIds):
    """The keys of a feature in the order of their ids: keys[i] has id i + 1."""

    def __init__(self, keys: pa.Array | pa.ChunkedArray, counts: np.ndarray, feature: str = "") -> None:
        self.keys = keys if isinstance(keys, pa.ChunkedArray) else pa.chunked_array([keys])
        self.counts = counts
        super().__init__(*hashes_and_ids(self.keys.chunks, feature))

    @property
    def num_embeddings(self) -> int:
        """Number of rows in the feature's table: one per key, plus row 0."""
        return len(self.keys) + 1

    def union(self, new: "Vocabulary") -> "Vocabulary":
        """These keys with their ids, then the other keys of `new`. A key of both counts the sum of both counts."""
        keys = pa.chunked_array([*self.keys.chunks, *new.keys.chunks], pa.string())
        both = pl.DataFrame({"key": pl.from_arrow(keys), "count": np.concatenate([self.counts, new.counts])})
        united = both.group_by("key", maintain_order=True).agg(pl.col("count").sum())
        return Vocabulary(united["key"].to_arrow().cast(pa.string()), united["count"].to_numpy())

    def save(self, folder: Path, feature: str) -> None:
        """Write vocabulary/<feature>.parquet into a prepared folder."""
        path = vocabulary_path(folder, feature)
        path.parent.mkdir(exist_ok=True)
        ids = pa.array(np.arange(1, len(self.keys) + 1, dtype=np.int64))
        table = pa.table({"key": self.keys, "id": ids, "count": pa.array(self.counts, pa.int64())})
        pyarrow.parquet.write_table(table, path, compression="zstd")


def vocabulary_path(folder: Path, feature: str) -> Path:
    """Return the path of a feature's vocabulary in a prepared folder or a saved model."""
    return Path(folder) / VOCABULARY_FOLDER / f"{feature}.parquet"


def copy_vocabulary(folder: Path, into: Path, feature: str) -> None:
    """Copy a feature's vocabulary from one prepared folder or saved model to another. Raises what `_batches` raises."""
    path = vocabulary_path(into, feature)
    path.parent.mkdir(exist_ok=True)
    for _ in _batches(folder, feature):
        pass
    shutil.copyfile(vocabulary_path(folder, feature), path)


def load_vocabulary(folder: Path, feature: str) -> Vocabulary:
    """Read a feature's vocabulary from a prepared folder or a saved model. Raises what `_batches` raises."""
    table = pa.Table.from_batches(_batches(folder, feature), _SCHEMA)
    return Vocabulary(table["key"], table["count"].to_numpy(), feature)


def key_ids(folder: Path, feature: str) -> KeyIds:
    """The ids of the keys of a feature's vocabulary, which is read as a stream. Raises what `_batches` raises."""
    return KeyIds(*hashes_and_ids((batch["key"] for batch in _batches(folder, feature)), feature))


def digest_of_keys(folder: Path, feature: str, most: int | None = None) -> str:
    """A digest of the keys of a feature's vocabulary in the order of their ids, whatever their counts.

    most: only of this many, the first ones.
    """
    digest = xxhash.xxh3_128()
    for batch in _batches(folder, feature):
        keys = batch["key"] if most is None else batch["key"][: max(0, most + 1 - batch["id"][0].as_py())]
        digest.update(hash_texts(keys, _SALT))
    return digest.hexdigest()


def check_vocabulary(folder: Path, column: SparseColumn) -> None:
    """Check a vocabulary that another program wrote. Of more than MOST_IN_MEMORY keys, not whether all are different.

    Raises FileNotFoundError, or ValueError naming the file.
    """
    feature, path = column.table_name, vocabulary_path(folder, column.table_name)
    for batch in _batches(folder, feature):
        if (at := pc.index(batch["key"], "").as_py()) >= 0:
            raise ValueError(f"{path}: the key of id {batch['id'][at]} is empty. A blank has id 0: leave the key out.")
    num_keys = pyarrow.parquet.read_metadata(path).num_rows
    if column.num_embeddings != num_keys + 1:
        raise ValueError(
            f"{path}: there are {num_keys:,} keys, but {SCHEMA_FILE} says that {feature!r} has num_embeddings "
            f"{column.num_embeddings:,}. Use {num_keys + 1:,}: one per key, and row 0."
        )
    if num_keys > key_counts.MOST_IN_MEMORY:
        return
    try:
        hashes_and_ids((batch["key"] for batch in _batches(folder, feature)), feature)
    except DataError as error:
        keys = pl.Series(pa.chunked_array(batch["key"] for batch in _batches(folder, feature)))
        twice = keys.filter(keys.is_duplicated())
        cause = f"the key {twice[0]!r} appears twice. Write each key once." if len(twice) else error
        raise ValueError(f"{path}: {cause}") from error


def shared_ids(old: Path, new: Path, feature: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The keys that two vocabularies share, batch by batch: their ids in the old one, ascending, and in the new one.

    Reads both as streams. Meanwhile a key of the new one takes 24 bytes, or none if it begins with the old one, as a
    union does.
    """
    digest = digest_of_keys(old, feature)
    num_old = pyarrow.parquet.read_metadata(vocabulary_path(old, feature)).num_rows
    if digest == digest_of_keys(new, feature, num_old):
        for first in range(1, num_old + 1, key_counts.BATCH_KEYS):
            ids = np.arange(first, min(first + key_counts.BATCH_KEYS, num_old + 1))
            yield ids, ids
        return
    new_ids = key_ids(new, feature)
    for batch in _batches(old, feature):
        ids = new_ids.ids(batch["key"])
        is_shared = ids != MISSING_ID
        yield batch["id"].to_numpy()[is_shared], ids[is_shared]


def _batches(folder: Path, feature: str) -> Iterator[pa.RecordBatch]:
    """Yield a vocabulary in the order of its ids, after checking its columns, their types and that none has nulls.

    Raises FileNotFoundError, or ValueError naming the file, also if the ids are not 1, 2, 3, ….
    """
    path, first = vocabulary_path(folder, feature), 1
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, but {feature!r} has a vocabulary. {_AGAIN}")
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow)
            for batch in file.iter_batches(key_counts.BATCH_KEYS, columns=_SCHEMA.names):
                batch = batch.select(_SCHEMA.names).cast(_SCHEMA)
                for name in _SCHEMA.names:
                    if batch[name].null_count:
                        row = first - 1 + pc.index(batch[name].is_null(), True).as_py()
                        raise ValueError(f"{path}: column {name!r} is null in row {row:,}. Write no nulls.")
                if not np.array_equal(batch["id"].to_numpy(), np.arange(first, first + len(batch))):
                    raise ValueError(f"{path}: the ids are not 1 to {file.metadata.num_rows}. Prepare the data again.")
                yield batch
                first += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: cannot be read: {error}. {_AGAIN}") from error


def _check_columns(path: Path, columns: pa.Schema) -> None:
    for name, wanted in zip(_SCHEMA.names, _SCHEMA.types, strict=True):
        found = columns.field(name).type if name in columns.names else "missing"
        values = found.value_type if isinstance(found, pa.DictionaryType) else found
        if values not in (_TEXTS if name == "key" else _INTEGERS):
            raise ValueError(f"{path}: column {name!r} must be {wanted}, but is {found}. Prepare the data again.")
