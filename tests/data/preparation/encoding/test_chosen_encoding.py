"""Which encoding a feature gets: told, taken from a trained model, or chosen by its number of keys."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from dhen.data.formats.raw_rows import DataError
from dhen.data.preparation import preprocessing, stages
from dhen.data.preparation.caching import prepare_cached
from dhen.data.preparation.encoding.encoder import hash_rows
from dhen.data.preparation.encoding.key_counts import KeySketch, estimated_keys
from dhen.data.preparation.encoding.vocabulary import Vocabulary, load_vocabulary
from dhen.data.preparation.head import whole_schema
from dhen.data.preparation.reading import pieces as cutting
from dhen.data.preparation.running.runners import nobody
from dhen.data.preparation.running.unfinished import Shard
from dhen.data.preparation.settings import Head, PreparationSettings
from dhen.data.schema import ESTIMATED_KEYS, SHARES, Schema, SparseColumn, SplitCounts

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
    monkeypatch.setattr(stages, "MOST_KEYS", 100)
    monkeypatch.setattr("dhen.data.preparation.encoding.key_counts._COMPACT_ROWS", most_merged)
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


def distinct_keys(num_keys: int, rows: int, seed: int = 0) -> pa.Array:
    """Keys in any order, many of them several times, and some blanks."""
    rng = np.random.default_rng(seed)
    numbers = np.concatenate([np.arange(num_keys), rng.integers(0, num_keys, rows - num_keys)])
    keys = [f"key {number}" for number in rng.permutation(numbers)]
    return pa.array([*keys, None, None], pa.string())


def sketches_of(keys: pa.Array, pieces: int, folder: Path) -> list[Path]:
    paths = [folder / f"keys-{pieces}/{piece}" for piece in range(pieces)]
    for piece, path in enumerate(paths):
        sketch = KeySketch(path)
        own = keys.slice(piece * len(keys) // pieces, len(keys) // pieces + 1)
        for first in range(0, len(own), 7_000):
            sketch.add(own.slice(first, 7_000))
        sketch.save()
    return paths


@pytest.mark.parametrize(("num_keys", "error"), [(0, 0), (1, 0), (16_383, 0), (16_384, 0.03), (150_000, 0.03)])
def test_distinct_keys_are_estimated_alike_in_any_pieces(tmp_path, num_keys, error):
    keys = distinct_keys(num_keys, num_keys + min(num_keys, 50_000))
    estimates = {estimated_keys(sketches_of(keys, pieces, tmp_path)) for pieces in (1, 2, 5)}
    assert len(estimates) == 1
    assert abs(estimates.pop() - num_keys) <= error * num_keys


def test_the_rows_for_some_keys():
    assert [hash_rows(keys, None) for keys in (0, 2048, 2049, 2560, 10**6)] == [4096, 4096, 5120, 5120, 2**21]
    assert hash_rows(10**6 + 50_000, None) == 2**21 * 5 // 4
    assert hash_rows(10**9, None) == 40_000_000
    assert hash_rows(10**6, 300_000) == 300_000
    for keys in np.random.default_rng(0).integers(2048, 10**7, 1000).tolist():
        assert 2 * keys <= hash_rows(keys, None) <= 2 * 1.25 * keys + 8


def test_a_hash_size_follows_the_keys_of_the_training_rows(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("dhen.data.preparation.encoding.encoder._LEAST_ROWS", 8)
    yaml = SCHEMA.replace("few, many", "{name: few, hash_size: auto}, {name: many, hash_size: auto}")
    (tmp_path / "schema.yaml").write_text(yaml)
    wanted = PreparationSettings(**settings, id_encoding="hash", max_hash_size=500)
    schema = preprocessing.prepare(wanted, tmp_path / "some")
    assert encodings(schema) == {
        "few": ("hash", 8), "many": ("hash", 500), "told": ("hash", 30), "bags": ("hash", 100_000)
    }  # fmt: skip
    assert schema.source["estimated_keys"] == {"few": 3, "many": 300}
    assert Schema.load(tmp_path / "some").source["estimated_keys"] == schema.source["estimated_keys"]
    assert preprocessing.settings_without_effect(wanted, schema) == []
    for_all = PreparationSettings(**settings, hash_size="auto")
    schema = preprocessing.prepare(for_all, tmp_path / "all")
    assert encodings(schema) == {"few": ("hash", 8), "many": ("hash", 640), "told": ("hash", 30), "bags": ("hash", 10)}
    assert preprocessing.settings_without_effect(for_all, schema) == []
    again = PreparationSettings(**settings, schema_from=tmp_path / "all")
    assert preprocessing.prepare(again, tmp_path / "again").sparse == schema.sparse


def test_a_hash_size_does_not_depend_on_pieces_and_shards(settings, tmp_path, monkeypatch):
    wanted = PreparationSettings(**settings, hash_size="auto")
    whole = preprocessing.prepare(wanted, tmp_path / "whole")
    monkeypatch.setattr(cutting, "PIECE_BYTES", 700)
    shards = [Shard(index, 2) for index in range(2)]
    with ThreadPoolExecutor() as threads:
        work = [threads.submit(preprocessing.prepare, wanted, tmp_path / "cut", shard=shard) for shard in shards]
        assert [each.result() for each in work] == [None, None]
    cut = preprocessing.prepare(wanted, tmp_path / "cut", runner=nobody)
    assert (cut.sparse, cut.source["estimated_keys"]) == (whole.sparse, whole.source["estimated_keys"])


def test_a_hash_size_by_keys_needs_training_rows(settings, tmp_path):
    with pytest.raises(DataError, match="the hash_size auto needs a train split"):
        preprocessing.prepare(
            PreparationSettings(**{**settings, "train_file": None}, hash_size="auto"), tmp_path / "out"
        )


def test_the_head_of_data_estimates_the_keys_of_all(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("dhen.data.preparation.encoding.encoder._LEAST_ROWS", 8)
    write_log(Path(settings["train_file"]), rows=30_000)
    wanted = PreparationSettings(**settings, hash_size="auto", head=Head(tmp_path / "head", 1_000))
    schema = whole_schema(prepare_cached(wanted, tmp_path / "cache"))
    rows = {column.name: column.num_embeddings for column in schema.sparse}
    assert schema.splits["train"].rows == pytest.approx(30_000, rel=0.1)
    assert rows["many"] == hash_rows(30_000, None)
    assert rows["few"] <= 16


def test_more_keys_than_rows_grow_no_faster_than_the_rows(tmp_path):
    """Bags may have ten new keys per row."""
    counts = SplitCounts(rows=100, clicks=10)
    source = {"settings": {"like": None, "max_hash_size": None}, SHARES: {"train": 0.1}, ESTIMATED_KEYS: {"u": 5_000}}
    columns = (SparseColumn("u", 16_384, is_multi_valued=True), SparseColumn("v", 100))
    Schema((), columns, {"train": counts}, source).save(tmp_path)
    assert [column.num_embeddings for column in whole_schema(tmp_path).sparse] == [hash_rows(50_000, None), 100]
    source[SHARES] = {"test": 0.1}
    Schema((), columns[1:], {"test": counts}, source | {ESTIMATED_KEYS: {}}).save(tmp_path)
    assert whole_schema(tmp_path).sparse == columns[1:], "without train rows, nothing grows"


def test_fine_tuning_keeps_the_sizes_that_auto_chose(settings, tmp_path):
    first = preprocessing.prepare(PreparationSettings(**settings, hash_size="auto"), tmp_path / "first")
    write_log(Path(settings["train_file"]), rows=9_000)
    again = PreparationSettings(**settings, hash_size="auto", like=tmp_path / "first")
    sizes = {column.name: column.num_embeddings for column in first.sparse if column.encoding == "hash"}
    schema = preprocessing.prepare(again, tmp_path / "again")
    assert {column.name: column.num_embeddings for column in schema.sparse if column.encoding == "hash"} == sizes
    other = preprocessing.prepare(PreparationSettings(**settings, hash_size="auto"), tmp_path / "other")
    assert {column.name: column.num_embeddings for column in other.sparse if column.encoding == "hash"} != sizes
