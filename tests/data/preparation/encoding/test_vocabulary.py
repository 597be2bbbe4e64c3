"""Vocabularies: order, minimum count, exact lookup."""

import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation.encoding import key_counts
from dhen.data.preparation.encoding import vocabulary as module
from dhen.data.preparation.encoding.key_counts import KeyCounts
from dhen.data.preparation.encoding.vocabulary import (
    KeyIds,
    Vocabulary,
    build_vocabulary,
    digest_of_keys,
    load_vocabulary,
    save_key_ids,
    shared_ids,
)
from tests.data.preparation import reference_preparation as reference
from tools.bench.preparation import measure, vocabulary


def made_from(chunks, min_count=1):
    with tempfile.TemporaryDirectory() as folder:
        built(Path(folder), chunks, min_count=min_count)
        return load_vocabulary(Path(folder), "it's")


@settings(deadline=None)
@given(st.lists(st.lists(st.none() | st.sampled_from(["a", "b", "é", "10", "9", "Z"]))), st.integers(1, 4))
def test_ids_go_by_descending_count_then_key(chunks, min_count):
    made = made_from(chunks, min_count)
    expected = reference.vocabulary([key for chunk in chunks for key in chunk], min_count)
    asked = ["a", "b", "é", "10", "9", "Z", "never seen", None]
    assert made.ids(pa.array(asked)).tolist() == [expected.get(key, 0) for key in asked]
    assert made.num_embeddings == len(expected) + 1


def test_merging_in_between_changes_nothing(monkeypatch):
    chunks = [[f"{i * j % 97}" for i in range(50)] for j in range(30)]
    once = made_from(chunks)
    monkeypatch.setattr(key_counts, "_COMPACT_ROWS", 10)
    often = made_from(chunks)
    assert once.keys.equals(often.keys)
    assert once.counts.tolist() == often.counts.tolist()


def test_round_trip_through_a_folder(tmp_path):
    made = made_from([["x", "y", "y", None, "z.z"]])
    made.save(tmp_path, "C1")
    loaded = load_vocabulary(tmp_path, "C1")
    assert loaded.keys.equals(made.keys)
    assert loaded.keys.to_pylist() == ["y", "x", "z.z"]
    assert loaded.counts.tolist() == [2, 1, 1]
    with pytest.raises(FileNotFoundError, match=r"C2\.parquet: no such file"):
        load_vocabulary(tmp_path, "C2")


def test_an_empty_vocabulary_knows_nothing():
    assert Vocabulary(pa.array([], pa.string()), pa.array([], pa.int64()).to_numpy()).ids(pa.array(["a"])).tolist() == [
        0
    ]


def built(folder, chunks, **options):
    counts = KeyCounts(folder / "runs")
    for chunk in chunks:
        counts.add(pa.array(chunk, pa.string()))
    counts.save()
    rows = build_vocabulary(sorted((folder / "runs").iterdir()), folder, "it's", **options)
    if rows is not None:
        save_key_ids(folder, "it's")
        assert rows == load_vocabulary(folder, "it's").num_embeddings
    return rows


def test_on_disk_it_is_the_same_as_in_memory(tmp_path, monkeypatch):
    pytest.importorskip("duckdb", reason="DuckDB is an extra: pip install 'dhen[large]'")
    chunks = [[f"{i * j % 977}é" for i in range(400)] for j in range(30)]
    (tmp_path / "memory").mkdir()
    (tmp_path / "disk").mkdir()
    built(tmp_path / "memory", chunks, min_count=3)
    for name, value in {"MOST_IN_MEMORY": 100, "_RUN_KEYS": 50, "_COMPACT_ROWS": 10, "BATCH_KEYS": 64}.items():
        monkeypatch.setattr(key_counts, name, value)
    built(tmp_path / "disk", chunks, min_count=3)
    assert len(list((tmp_path / "disk/runs").iterdir())) > 5
    memory, disk = (load_vocabulary(tmp_path / name, "it's") for name in ("memory", "disk"))
    assert disk.keys.to_pylist() == memory.keys.to_pylist() == made_from(chunks, 3).keys.to_pylist()
    assert disk.counts.tolist() == memory.counts.tolist()
    assert digest_of_keys(tmp_path / "memory", "it's") == digest_of_keys(tmp_path / "disk", "it's")
    asked = pa.array([*(f"{i}é" for i in range(1000)), None, ""])
    ids = made_from(chunks, 3).ids(asked).tolist()
    assert ids.count(0) < 900 < len(ids)
    assert [KeyIds.load(tmp_path / name, "it's").ids(asked).tolist() for name in ("memory", "disk")] == [ids, ids]
    assert [path.name for path in (tmp_path / "disk").iterdir() if path.name.startswith(".")] == []


def test_too_many_keys_make_none(tmp_path):
    chunks = [[f"{i}" for i in range(100)]]
    assert built(tmp_path, chunks, min_count=1, most_keys=99) is None
    assert built(tmp_path, chunks, min_count=1, most_keys=100) == 101


def test_a_million_keys_take_less_than_200_mib(tmp_path):
    """Beside imports. The benchmark counts them, builds their vocabulary and looks keys up."""
    _, peak, before = measure(partial(vocabulary, 1_000_000), tmp_path)
    assert peak - before < 200


def test_other_keys_have_another_digest(tmp_path):
    digests = set()
    for keys in (["a", "b"], ["b", "a"], ["a"], ["ab"], []):
        Vocabulary(pa.array(keys, pa.string()), np.ones(len(keys), np.int64)).save(tmp_path, "C1")
        digests.add(digest_of_keys(tmp_path, "C1"))
    assert len(digests) == 5


@pytest.mark.parametrize("new", [["c", "a", "x", "e", "y"], ["a", "b", "c", "d", "e", "new"], ["x"], [], ["a", "b"]])
@pytest.mark.parametrize("old", [["a", "b", "c", "d", "e"], []])
def test_shared_keys_have_an_id_in_both(tmp_path, monkeypatch, old, new):
    monkeypatch.setattr(key_counts, "BATCH_KEYS", 2)
    folders = {tmp_path / "old": old, tmp_path / "new": new}
    for folder, keys in folders.items():
        folder.mkdir()
        Vocabulary(pa.array(keys, pa.string()), np.ones(len(keys), np.int64)).save(folder, "C1")
    with monkeypatch.context() as patch:
        if old == new[: len(old)]:  # a union
            patch.setattr(module, "hashes_and_ids", None)
        batches = list(shared_ids(*folders, "C1"))
    ids = [pair for batch in batches for pair in zip(*(of.tolist() for of in batch), strict=True)]
    assert ids == [(old.index(key) + 1, new.index(key) + 1) for key in old if key in new]
    assert all(len(of_old) <= 2 for of_old, _ in batches)


def test_two_keys_of_one_hash_are_refused(monkeypatch):
    monkeypatch.setattr(module, "hash_texts", lambda texts, salt: np.zeros(len(texts), np.uint64))
    with pytest.raises(DataError, match=r"'user': two keys have the same 64-bit hash. Use `encoding: hash`"):
        Vocabulary(pa.array(["a", "b"]), np.ones(2, np.int64), "user")


def test_without_duckdb_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    monkeypatch.setattr(key_counts, "MOST_IN_MEMORY", 10)
    with pytest.raises(DataError, match=r"more than 10 keys.* pip install 'dhen\[large\]'.*--id_encoding hash"):
        built(tmp_path, [[f"{i}" for i in range(100)]], min_count=1)
