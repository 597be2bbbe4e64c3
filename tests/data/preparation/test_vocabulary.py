"""Vocabularies: order, minimum count, exact lookup."""

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dhen.data.preparation import vocabulary as module
from dhen.data.preparation.vocabulary import KeyCounts, Vocabulary, load_vocabulary
from tests.data.preparation import reference_preparation as reference


def made_from(chunks, min_count=1):
    counts = KeyCounts()
    for chunk in chunks:
        counts.add(pa.array(chunk, pa.string()))
    return counts.vocabulary(min_count)


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
    monkeypatch.setattr(module, "_COMPACT_ROWS", 10)
    often = made_from(chunks)
    assert once.keys.equals(often.keys)
    assert once.counts.tolist() == often.counts.tolist()


def test_round_trip_through_a_folder(tmp_path):
    made = made_from([["x", "y", "y", None, "z.z"]])
    made.save(tmp_path, "C1")
    loaded = load_vocabulary(tmp_path, "C1")
    assert loaded.keys.to_pylist() == ["y", "x", "z.z"]
    assert loaded.counts.tolist() == [2, 1, 1]
    with pytest.raises(FileNotFoundError, match=r"C2\.parquet: no such file"):
        load_vocabulary(tmp_path, "C2")


def test_an_empty_vocabulary_knows_nothing():
    assert Vocabulary(pa.array([], pa.string()), pa.array([], pa.int64()).to_numpy()).ids(pa.array(["a"])).tolist() == [
        0
    ]
