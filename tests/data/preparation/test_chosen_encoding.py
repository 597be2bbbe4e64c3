"""Which encoding a feature gets: told, taken from a trained model, or chosen by its number of keys."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dhen.data.preparation import preprocessing
from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.settings import PreparationSettings
from dhen.data.preparation.vocabulary import Vocabulary, load_vocabulary
from dhen.data.schema import Schema

SCHEMA = """
label: label
sparse: [few, many, {name: told, encoding: hash, hash_size: 30}, {name: bags, separator: "|"}]
"""


def write_log(path: Path, first_key: int = 0, rows: int = 300) -> Path:
    """few: 3 keys, a tenth of the rows blank. many: another key in each row. bags: 0 to 2 of 5 keys."""
    lines = ["label,few,many,told,bags"]
    for row in range(rows):
        few = "" if row % 10 == 0 else f"f{first_key + row % 3}"
        bags = "|".join(f"b{first_key + (row + at) % 5}" for at in range(row % 3))
        lines.append(f"{row % 2},{few},m{first_key + row},t{row},{bags}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def settings(tmp_path) -> dict:
    (tmp_path / "schema.yaml").write_text(SCHEMA)
    train, test = write_log(tmp_path / "train.csv"), write_log(tmp_path / "test.csv", 2, 100)
    return {"train_file": str(train), "test_file": str(test), "dataset_schema": str(tmp_path / "schema.yaml")}


def encodings(schema: Schema) -> dict[str, tuple[str, int]]:
    return {column.name: (column.encoding, column.num_embeddings) for column in schema.sparse}


@pytest.mark.parametrize("most_merged", [0, 10**9], ids=["given up on the way", "given up at the end"])
def test_auto_takes_a_vocabulary_unless_there_are_too_many_keys(settings, tmp_path, monkeypatch, most_merged):
    whole = preprocessing.prepare(PreparationSettings(**settings), tmp_path / "whole")
    expected = {"few": ("vocabulary", 4), "many": ("vocabulary", 301), "told": ("hash", 30), "bags": ("vocabulary", 6)}
    assert encodings(whole) == expected
    monkeypatch.setattr(preprocessing, "MOST_KEYS", 100)
    monkeypatch.setattr("dhen.data.preparation.vocabulary._COMPACT_ROWS", most_merged)
    small_blocks = PreparationSettings(**settings, block_bytes=500)
    schema = preprocessing.prepare(small_blocks, tmp_path / "capped")
    assert encodings(schema) == expected | {"many": ("hash", 1_000_000)}
    assert not (tmp_path / "capped/vocabulary/many.parquet").exists()


@pytest.mark.parametrize(
    ("given", "few", "many"),
    [
        ({"id_encoding": "hash"}, ("hash", 100_000), ("hash", 100_000)),
        ({"hash_size": 50}, ("hash", 50), ("hash", 50)),
        ({"id_encoding": "vocabulary", "min_count": 2}, ("vocabulary", 4), ("vocabulary", 1)),
        ({"min_count": 2}, ("vocabulary", 4), ("vocabulary", 1)),
    ],
)
def test_what_is_told_comes_first(settings, tmp_path, given, few, many):
    schema = preprocessing.prepare(PreparationSettings(**settings, **given), tmp_path / "out")
    assert (encodings(schema)["few"], encodings(schema)["many"]) == (few, many)


def test_values_that_are_no_key_are_counted_by_split(settings, tmp_path):
    schema = preprocessing.prepare(PreparationSettings(**settings), tmp_path / "out")
    assert schema.splits["train"].unknown_keys == {"few": 0, "many": 0, "bags": 0}
    # In test, few has f2, f3, f4 (a third each, a tenth blank), bags b2 to b6 instead of b0 to b4.
    few = sum(row % 10 != 0 and row % 3 != 0 for row in range(100))
    bags = sum((row + at) % 5 >= 3 for row in range(100) for at in range(row % 3))
    assert schema.splits["test"].unknown_keys == {"few": few, "many": 0, "bags": bags}
    ids = pyarrow.parquet.read_table(tmp_path / "out/test")
    assert pa.compute.equal(ids["few"], 0).to_numpy().sum() == few + 10, "blanks have id 0 too, but are no unknown keys"
    assert Schema.load(tmp_path / "out").splits == schema.splits


def test_like_a_trained_model_its_keys_keep_their_ids(settings, tmp_path):
    old = tmp_path / "old"
    preprocessing.prepare(PreparationSettings(**settings, min_count=2), old)
    new_log = str(write_log(tmp_path / "new.csv", first_key=1))
    new = {**settings, "train_file": new_log, "test_file": None, "like": old}
    schema = preprocessing.prepare(PreparationSettings(**new), tmp_path / "union")
    before, after = (load_vocabulary(folder, "few") for folder in (old, tmp_path / "union"))
    assert after.keys.to_pylist()[:3] == before.keys.to_pylist()
    assert set(after.keys.to_pylist()) == {"f0", "f1", "f2", "f3"}
    counts = dict(zip(after.keys.to_pylist(), after.counts.tolist(), strict=True))
    assert counts == {"f0": 90, "f1": 180, "f2": 180, "f3": 90}
    assert [column.min_count for column in schema.sparse if column.name == "many"] == [2]
    only = preprocessing.prepare(PreparationSettings(**new, vocabulary_keys="new"), tmp_path / "only")
    assert set(load_vocabulary(tmp_path / "only", "few").keys.to_pylist()) == {"f1", "f2", "f3"}
    assert encodings(only)["few"] == ("vocabulary", 4)


def test_a_union_of_vocabularies_with_nothing_in_them():
    def vocabulary(*keys: str) -> Vocabulary:
        return Vocabulary(pa.array(keys, pa.string()), np.arange(1, len(keys) + 1))

    for old, new in itertools.product((vocabulary(), vocabulary("a", "b")), (vocabulary(), vocabulary("b", "c"))):
        union = old.union(new)
        assert union.keys.to_pylist() == [
            *old.keys.to_pylist(),
            *(k for k in new.keys.to_pylist() if k not in old.keys.to_pylist()),
        ]
        assert len(union.counts) == len(union.keys)
        assert union.counts.sum() == old.counts.sum() + new.counts.sum()


def test_settings_with_another_result_have_another_folder(settings, tmp_path):
    old = tmp_path / "old"
    preprocessing.prepare(PreparationSettings(**settings), old)
    variants = [
        {}, {"id_encoding": "hash"}, {"id_encoding": "vocabulary"}, {"hash_size": 100_000}, {"min_count": 2},
        {"like": old}, {"like": old, "vocabulary_keys": "new"}, {"like": old, "hash_size": 60},
    ]  # fmt: skip
    folders = [prepare_cached(PreparationSettings(**settings, **more), tmp_path / "cache") for more in variants]
    assert len({*folders}) == len(variants)
    same = PreparationSettings(**settings, id_encoding="hash", vocabulary_keys="new")
    assert prepare_cached(same, tmp_path / "cache") == folders[1]
